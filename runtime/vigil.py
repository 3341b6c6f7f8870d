"""Watches over the loops of a system's nodes, the root's own among them, and says in events.jsonl what it sees.

    quiet for SUSPECT_S -> node_suspect, with the stacks of all threads -> beats again -> node_recovered
                                                                        -> hang_s      -> node_hung: killed, Exit "hung"

A loop that is late while its node loads the class of an actor is no event: imports block. Knows nothing of who starts
a node again.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections import Counter

from .events import EventLog
from .exits import Exit
from .inspector import steady
from .launcher import NodeProcess
from .liveness import Beats, Pulse, Verdict, Watch
from .node import Node
from .stacks import dump, own_stacks

MAX_SUSPICIONS = 50
"""Of one incarnation of a node that become events, with their ends; more would flood the file."""


class Vigil:
    """Of one system. The words are taken and given back on the loop; reading them has a thread of its own."""

    def __init__(self, root: Node, events: EventLog) -> None:
        self._root = root
        self._events = events
        self._loop = asyncio.get_running_loop()
        self._processes: dict[str, NodeProcess | None] = {}
        self._suspicions: Counter[str] = Counter()
        self._beats = Beats()
        word = self._beats.take()
        self._pulse = Pulse(self._beats.fd, word)
        self._watch = Watch(self._beats, self._on_verdict)
        self.begin(root.key, word, None, None)

    @property
    def fd(self) -> int:
        """The file of the words, for nodes to inherit."""
        return self._beats.fd

    def take(self) -> int:
        """A word for a node that is to be started. Raises LaunchError."""
        return self._beats.take()

    def give(self, word: int) -> None:
        """Of a node that was not started."""
        self._beats.give(word)

    def begin(self, key: str, word: int, process: NodeProcess | None, hang_s: float | None) -> None:
        """Watches a node that has said hello; None is the root. `hang_s`: when it is killed; None: never."""
        if process is None or not process.exited.done():
            self._processes[key] = process
            self._watch.add(key, word, hang_s=hang_s, look=lambda: self._look(key, process))

    def end(self, key: str, word: int) -> None:
        """Of a node whose process has ended."""
        self._watch.remove(key)
        self._processes.pop(key, None)
        del self._suspicions[key]
        self._beats.give(word)

    def close(self) -> None:
        self._processes.clear()
        self._watch.close()
        self._pulse.stop()
        self._beats.close()

    def _look(self, key: str, process: NodeProcess | None) -> str | None:
        """In the thread: the stacks of a node whose loop is late; None if it may be loading a class."""
        agent = f"$node@{key.partition('#')[0]}"
        asked = steady(lambda: [(row["target"], row["method"]) for row in self._root.waits.rows()])
        if (agent, "spawn") in asked:
            return None
        return own_stacks() if process is None else dump(process.pid, process.log)

    def _on_verdict(self, key: str, verdict: Verdict, quiet_s: float, stacks: str) -> None:
        """In the thread."""
        self._loop.call_soon_threadsafe(self._judge, key, verdict, round(quiet_s, 3), stacks)

    def _judge(self, key: str, verdict: Verdict, quiet_s: float, stacks: str) -> None:
        if key not in self._processes:
            return
        process = self._processes[key]
        self._suspicions[key] += verdict == "suspect"
        if self._suspicions[key] <= MAX_SUSPICIONS or verdict == "hung":
            pid = os.getpid() if process is None else process.pid
            more = {"stacks": stacks} if stacks else {}
            self._events.write(f"node_{verdict}", node=key.partition("#")[0], pid=pid, quiet_s=quiet_s, **more)
        if verdict == "hung" and process is not None:
            detail = f"hung: its loop did not run for {quiet_s:g} s, so it was killed (NodeSpec.hang_s)"
            process.kill(verdict=Exit(kind="hung", detail=detail, code=int(signal.SIGKILL), traceback=stacks))
