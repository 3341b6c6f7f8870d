"""The node processes of a system: starts them, tells them and each other what is new, sees their deaths, ends them.

    down --open--> starting --hello--> ready --exit--> down, `on_death` is asked      stop: ask, wait, terminate, kill

Nodes whose loop hangs are the business of vigil.py; whether a dead node is opened again is that of system.py.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .agent import agent_status
from .arena import ARENA_BYTES
from .directory import Status
from .errors import InspectError, LaunchError, RuntimeFault
from .events import EventLog
from .exits import Exit
from .inspector import Inspector, inspect_node
from .launcher import Launcher, NodeProcess, NodeSpec
from .node import Node
from .process import pack_spec
from .remote import RemoteNodes
from .stacks import dump, own_stacks
from .vigil import Vigil

ROOT = "root"
HELLO_S = 30.0
"""Time a node process may take from its start to its first message."""

STOP_NODE_S = 8.0
"""Time a node may take to stop its actors and end."""

STACKS_S = 0.5
"""Time for a process to tell its stacks by itself; then it is made to write them."""

TERMINATE_S = 1.0
"""Time a process may take to end by a signal."""


@dataclass(eq=False)
class HostedNode:
    """A node as the root sees it."""

    spec: NodeSpec
    incarnation: int = 0
    key: str = ""
    address: str = ""
    process: NodeProcess | None = None
    """None for the root itself, and before the first start."""
    ready: bool = False
    hello: asyncio.Future[None] | None = None
    starting: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def name(self) -> str:
        return self.spec.name


class Nodes:
    """All nodes of a system, the root among them. `on_death` gets a node and how it ended, and returns the new statuses
    of the actors that lived there; `start_task` runs work that must not fail."""

    def __init__(
        self,
        root: Node,
        root_statuses: list[Status],
        specs: Mapping[str, NodeSpec],
        events: EventLog,
        *,
        sockets: Path,
        logs: Path,
        on_death: Callable[[HostedNode, Exit], list[Status]],
        start_task: Callable[[Coroutine[Any, Any, None]], object],
        remote: RemoteNodes,
        arena_bytes: int = ARENA_BYTES,
    ) -> None:
        self._root = root
        self._root_statuses = root_statuses
        self._specs = specs
        self._events = events
        self._sockets = sockets
        self._on_death = on_death
        self._start_task = start_task
        self._remote = remote
        self._arena_bytes = arena_bytes
        self._closed = False
        self._told: dict[str, tuple[str, ...]] = {}
        """State of each actor as all nodes know it, and its node if they can reach that."""
        self._nodes = {ROOT: HostedNode(NodeSpec(name=ROOT), 1, root.key, root.transport.address, ready=True)}
        self._inspector = Inspector(root, self.inspector_of(ROOT))
        self._vigil = Vigil(root, events)
        self._launcher = Launcher(sockets, logs, self._vigil.fd)

    def __getitem__(self, name: str) -> HostedNode:
        """The node of that name, started or not."""
        if name not in self._nodes:
            self._nodes[name] = HostedNode(self._specs.get(name) or NodeSpec(name=name))
        return self._nodes[name]

    def names(self) -> list[str]:
        """The nodes that run now, the root first."""
        return [hosted.name for hosted in self._nodes.values() if hosted.ready]

    def pids(self) -> dict[str, int]:
        """Process id of each node that was started, the root's own first."""
        return {ROOT: os.getpid(), **{n: s.process.pid for n, s in self._nodes.items() if s.process is not None}}

    def inspector_of(self, name: str) -> str:
        """Path of the socket where a node answers what it does; see inspector.py."""
        return f"{self._sockets}/{name}-{self[name].incarnation}~"

    async def stacks(self, name: str) -> str:
        """The Python stacks of all threads of a node, also of one that hangs; if there are none, why, in brackets."""
        process = self[name].process
        if name == ROOT:
            return own_stacks()
        if process is None or process.exited.done():
            return "[no stacks: the process does not run]"
        try:
            return str(await asyncio.to_thread(inspect_node, self.inspector_of(name), "stacks", STACKS_S))
        except InspectError:
            return await asyncio.to_thread(dump, process.pid, process.log)

    async def open(self, name: str) -> None:
        """Makes sure that a node is ready. Raises LaunchError."""
        hosted = self[name]
        async with hosted.starting:
            if not hosted.ready:
                await self._start(hosted)

    def on_hello(self, key: str, address: str) -> None:
        """A node's first message: it can be reached at `address`."""
        for hosted in self._nodes.values():
            if hosted.key == key and hosted.hello is not None and not hosted.hello.done():
                hosted.address = address
                hosted.hello.set_result(None)

    def publish(self, *statuses: Status) -> None:
        """Tells all nodes, the root first. That an actor is starting somewhere is told once: whatever else is new,
        callers wait, and its node can be answered."""
        news = []
        for status in statuses:
            told = status.state, *self._addresses([status])
            if status.state != "starting" or self._told.get(status.name) != told:
                news.append(status)
            self._told[status.name] = told
            self._root.directory.update(status)
        self._broadcast(news, {})

    async def stop(self, patience_s: float | None = None) -> None:
        """Ends all nodes but the root, in parallel: asks, waits `patience_s` (STOP_NODE_S), terminates, kills."""
        self._closed = True
        patience_s = STOP_NODE_S if patience_s is None else patience_s
        processes = [(hosted, hosted.process) for hosted in self._nodes.values() if hosted.process]
        await asyncio.gather(*(self._stop(hosted, process, patience_s) for hosted, process in processes))
        self._vigil.close()
        await self._launcher.close()
        self._inspector.close()

    async def close(self, name: str) -> None:
        """Ends one node in which nothing lives any more, as `stop` does all, and forgets it."""
        hosted = self._nodes.get(name)
        if hosted is None or self._closed:
            return
        if hosted.process is not None:
            await self._stop(hosted, hosted.process, STOP_NODE_S)

    async def _start(self, hosted: HostedNode) -> None:
        name = hosted.name
        self._require_open(name)
        incarnation = hosted.incarnation + 1
        key, reach = f"{name}#{incarnation}", self._remote.fields(hosted.spec, self._sockets, incarnation)
        hello = asyncio.get_running_loop().create_future()
        hosted.incarnation, hosted.key, hosted.hello = incarnation, key, hello
        hosted.process = None
        word = self._vigil.take()
        env = {**os.environ, **hosted.spec.env} if hosted.spec.warm else None
        spec = pack_spec(
            key=key, name=name, incarnation=incarnation, parent=os.getpid(), word=word, env=env,
            root_key=self._root.key, inspector=self.inspector_of(name), **reach,
            statuses=[*self._root_statuses, agent_status(key)], path=[p for p in sys.path if p],
            arena_bytes=self._arena_bytes,
        )  # fmt: skip
        try:
            hosted.process = process = await self._launcher.start(hosted.spec, spec)
        except BaseException:
            self._vigil.give(word)
            raise
        process.exited.add_done_callback(lambda _: self._vigil.end(key, word))
        self._events.write("node_start", node=name, pid=process.pid, incarnation=incarnation)
        try:
            self._require_open(name)
        except LaunchError:
            process.kill()
            raise
        ends: list[asyncio.Future[Any]] = [hello, process.exited]
        try:
            done, _ = await asyncio.wait(ends, timeout=HELLO_S, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            process.kill()
            raise
        if hello not in done:
            end = process.exited.result() if done else None
            process.kill()
            why = end or f"no hello within {HELLO_S:g} s"
            error = LaunchError(f"node {name} did not start: {why}\n{process.log_tail()}".rstrip())
            error.exit = end
            raise error
        self._welcome(hosted)
        self._vigil.begin(key, word, process, hosted.spec.hang_s)
        self._start_task(self._watch(hosted, process))

    def _require_open(self, name: str) -> None:
        if self._closed:
            raise LaunchError(f"node {name} was not started: the system is stopping")

    def _welcome(self, hosted: HostedNode) -> None:
        """Makes a new node known to the root, and the actors to it. Only now that it said hello its socket is bound.

        The other nodes get its address with the first actor that lives there.
        """
        self._root.transport.connect(hosted.key, hosted.address)
        status = agent_status(hosted.key)
        self._root.directory.update(status)
        hosted.ready = True
        known = [other for other in self._root.directory.all() if not _is_agent(other)]
        self._root.ref(status.name).update.cast(known, self._addresses(known), {})

    async def _watch(self, hosted: HostedNode, process: NodeProcess) -> None:
        lost = self._remote.watch(hosted.spec, hosted.key)
        ends: list[asyncio.Future[Exit]] = [process.exited, lost]
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        end = process.exited.result() if process.exited.done() else lost.result()
        if not process.exited.done():
            process.kill(verdict=end)  # It can't be heard; if this reaches it, it need not find out by itself.
        self._remote.forget(hosted.key)
        hosted.ready = False
        reason = end.detail
        self._events.write(
            "node_exit", node=hosted.name, pid=process.pid, kind=end.kind, code=end.code, reason=reason,
            log=process.log_tail()[-500:],
            **({"traceback": end.traceback} if end.traceback else {}),
        )  # fmt: skip
        self._root.peer_down(hosted.key, reason)
        self._root.directory.update(agent_status(hosted.key, "down"))
        statuses = self._on_death(hosted, end)
        for status in statuses:
            self._told[status.name] = (status.state,)
            self._root.directory.update(status)
        self._broadcast(statuses, {hosted.key: reason})

    async def _stop(self, hosted: HostedNode, process: NodeProcess, patience_s: float) -> None:
        if hosted.ready and not process.exited.done():
            asking = asyncio.ensure_future(self._root.ref(f"$node@{hosted.name}").shutdown())
            # It may die before it answers, and nobody else would tell.
            ends: list[asyncio.Future[Any]] = [asking, process.exited]
            try:
                async with asyncio.timeout(patience_s):
                    await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
                    if not process.exited.done():
                        await asking
                        await asyncio.shield(process.exited)
            except (RuntimeFault, TimeoutError) as error:
                reason = str(error) or f"it had not ended after {patience_s:g} s"
                self._events.write("node_stop_late", node=hosted.name, reason=reason)
            finally:
                asking.cancel()
                await asyncio.gather(asking, return_exceptions=True)
        for number in (signal.SIGTERM, signal.SIGKILL):
            if process.exited.done():
                return
            process.kill(number)
            await asyncio.wait([process.exited], timeout=TERMINATE_S)

    def _broadcast(self, statuses: list[Status], dead: dict[str, str]) -> None:
        if self._closed or not (statuses or dead):
            return
        addresses = self._addresses(statuses)
        for hosted in self._nodes.values():
            if hosted.ready and hosted.name != ROOT:
                self._root.ref(f"$node@{hosted.name}").update.cast(statuses, addresses, dead)

    def _addresses(self, statuses: list[Status]) -> dict[str, str]:
        """Where the nodes are that these actors live in."""
        keys = {status.node for status in statuses}
        return {n.key: n.address for n in self._nodes.values() if n.ready and n.name != ROOT and n.key in keys}


def _is_agent(status: Status) -> bool:
    """Only the root talks to the agents of nodes."""
    return status.name.startswith("$node@")
