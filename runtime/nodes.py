"""The node processes of a system: starts them, tells them and each other what is new, sees their deaths, ends them.

    down --open--> starting --hello--> ready --exit--> down, `on_death` is asked      stop: ask, wait, terminate, kill

Decides nothing: whether a dead node is opened again is the business of system.py.
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
from .errors import LaunchError, RuntimeFault
from .events import EventLog
from .launcher import NodeProcess, NodeSpec, start_process
from .node import Node
from .process import pack_spec
from .transport import check_address

ROOT = "root"
HELLO_S = 30.0
"""Time a node process may take from its start to its first message."""

STOP_NODE_S = 8.0
"""Time a node may take to stop its actors and end."""

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
    """All nodes of a system, the root among them. `on_death` gets a node and the reason in words, and returns the new
    statuses of the actors that lived there; `start_task` runs work that must not fail."""

    def __init__(
        self,
        root: Node,
        root_statuses: list[Status],
        specs: Mapping[str, NodeSpec],
        events: EventLog,
        *,
        sockets: Path,
        logs: Path,
        on_death: Callable[[HostedNode, str], list[Status]],
        start_task: Callable[[Coroutine[Any, Any, None]], object],
        arena_bytes: int = ARENA_BYTES,
    ) -> None:
        self._root = root
        self._root_statuses = root_statuses
        self._specs = specs
        self._events = events
        self._sockets = sockets
        self._logs = logs
        self._on_death = on_death
        self._start_task = start_task
        self._arena_bytes = arena_bytes
        self._closed = False
        self._nodes = {ROOT: HostedNode(NodeSpec(name=ROOT), 1, root.key, root.transport.address, ready=True)}

    def __getitem__(self, name: str) -> HostedNode:
        """The node of that name, started or not."""
        if name not in self._nodes:
            self._nodes[name] = HostedNode(self._specs.get(name) or NodeSpec(name=name))
        return self._nodes[name]

    def pids(self) -> dict[str, int]:
        """Process id of each node that was started, the root's own first."""
        return {ROOT: os.getpid(), **{n: s.process.pid for n, s in self._nodes.items() if s.process is not None}}

    async def open(self, name: str) -> None:
        """Makes sure that a node is ready. Raises LaunchError."""
        hosted = self[name]
        async with hosted.starting:
            if not hosted.ready:
                await self._start(hosted)

    def on_hello(self, key: str) -> None:
        """A node's first message."""
        for hosted in self._nodes.values():
            if hosted.key == key and hosted.hello is not None and not hosted.hello.done():
                hosted.hello.set_result(None)

    def publish(self, *statuses: Status) -> None:
        """Tells all nodes, the root first."""
        for status in statuses:
            self._root.directory.update(status)
        self._broadcast(list(statuses), {}, {})

    async def stop(self, patience_s: float | None = None) -> None:
        """Ends all nodes but the root, in parallel: asks, waits `patience_s` (STOP_NODE_S), terminates, kills."""
        self._closed = True
        patience_s = STOP_NODE_S if patience_s is None else patience_s
        processes = [(hosted, hosted.process) for hosted in self._nodes.values() if hosted.process]
        await asyncio.gather(*(self._stop(hosted, process, patience_s) for hosted, process in processes))

    async def _start(self, hosted: HostedNode) -> None:
        name = hosted.name
        if self._closed:
            raise LaunchError(f"node {name} was not started: the system is stopping")
        incarnation = hosted.incarnation + 1
        key, address = f"{name}#{incarnation}", f"ipc://{self._sockets}/{name}-{incarnation}"
        check_address(address)
        hello = asyncio.get_running_loop().create_future()
        hosted.incarnation, hosted.key, hosted.address, hosted.hello = incarnation, key, address, hello
        spec = pack_spec(
            key=key, name=name, incarnation=incarnation, address=address, parent=os.getpid(),
            root_key=self._root.key, root_address=self._root.transport.address,
            statuses=[*self._root_statuses, agent_status(key)], path=[p for p in sys.path if p],
            arena_bytes=self._arena_bytes,
        )  # fmt: skip
        hosted.process = process = start_process(hosted.spec, spec, self._logs / f"{name}.log")
        self._events.write("node_start", node=name, pid=process.pid, incarnation=incarnation)
        ends: list[asyncio.Future[Any]] = [hello, process.exited]
        done, _ = await asyncio.wait(ends, timeout=HELLO_S, return_when=asyncio.FIRST_COMPLETED)
        if hello not in done:
            why = process.exited.result() if done else f"no hello within {HELLO_S:g} s"
            process.kill()
            raise LaunchError(f"node {name} did not start: {why}\n{process.log_tail()}".rstrip())
        self._welcome(hosted)
        self._start_task(self._watch(hosted, process))

    def _welcome(self, hosted: HostedNode) -> None:
        """Makes a new node and all others known to each other. Its socket is bound only now that it has said hello."""
        self._root.transport.connect(hosted.key, hosted.address)
        others = {n.key: n.address for n in self._nodes.values() if n.ready and n.name != ROOT}
        status = agent_status(hosted.key)
        self._broadcast([status], {hosted.key: hosted.address}, {})
        hosted.ready = True
        self._root.directory.update(status)
        self._root.ref(status.name).update.cast(self._root.directory.all(), others, {})

    async def _watch(self, hosted: HostedNode, process: NodeProcess) -> None:
        reason = await asyncio.shield(process.exited)
        hosted.ready = False
        self._events.write("node_exit", node=hosted.name, pid=process.pid, reason=reason, log=process.log_tail()[-500:])
        self._root.peer_down(hosted.key, reason)
        statuses = [agent_status(hosted.key, "down"), *self._on_death(hosted, reason)]
        for status in statuses:
            self._root.directory.update(status)
        self._broadcast(statuses, {}, {hosted.key: reason})

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

    def _broadcast(self, statuses: list[Status], addresses: dict[str, str], dead: dict[str, str]) -> None:
        if self._closed:
            return
        for hosted in self._nodes.values():
            if hosted.ready and hosted.name != ROOT:
                self._root.ref(f"$node@{hosted.name}").update.cast(statuses, addresses, dead)
