"""The `$node` actor, through which the root runs a node: spawns and stops its actors, tells it of the others.

Imports an actor's module when it is told to spawn it. Decides nothing: a failed actor is reported to the root, whose
supervisor decides.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from typing import Any

from .actor import Actor, message
from .cell import STOP_S, Cell
from .classes import load_actor
from .codec import loads
from .deadline import unlimited
from .directory import Status
from .exits import Exit
from .mailbox import Lane
from .memory import Memory
from .node import Node
from .protocol import pack_error, window_of
from .repl.inside import Visits

DRAIN_LOOK_S = 0.005
"""How often it is looked whether the actors have finished their work."""

CANCEL_S = 1.0
"""Time that a cancelled actor may take to end; what is stuck in a thread ends with the process."""


def interface_of(actor: type[Actor]) -> dict[str, Any]:
    """What a class answers, as its directory entry says it."""
    window, window_bytes = window_of(actor.mailbox_capacity, actor.mailbox_bytes)
    return {
        "class_name": actor.__name__,
        "messages": {name: [int(spec.lane), spec.deadline_s] for name, spec in actor.messages.items()},
        "window": window,
        "window_bytes": window_bytes,
    }


@dataclass(kw_only=True)
class NodeAgent(Visits):
    """The actor `$node@<name>` of every node: hosts, lists and stops its cells."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._cells: dict[str, asyncio.Task[None]] = {}
        self._stopping = False
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done after `shutdown`; raises what one of the runtime's own actors here failed with."""

    def host(self, node: Node, actor: Actor, name: str, incarnation: int, epoch: int = 1, state: Any = None) -> Cell:
        """Puts an actor into this node, with the state of an earlier incarnation; a cell of the same name must have
        ended."""
        actor._node, actor._name, actor._epoch = node, name, epoch
        cell = node.cells[name] = Cell(actor, name, incarnation, node)
        memory = actor._memory = Memory(node, cell, state)
        if actor.snapshot_every_s is not None or state is not None:
            cell.memory = memory
        work = self._run(node, cell)
        self._cells[name] = asyncio.get_running_loop().create_task(work, name=name, context=unlimited())
        return cell

    async def _run(self, node: Node, cell: Cell) -> None:
        failure: BaseException | None = None
        try:
            await cell.run()
        except BaseException as error:  # noqa: BLE001 (the edge of an actor: the supervisor gets it)
            failure = error
        if node.cells.get(cell.name) is cell:
            del node.cells[cell.name]
        started = cell.up.exception() is None
        if self._stopping or not started:
            return
        if cell.name.startswith("$"):
            self.end(failure)
        else:
            # At once, not when the root says so: a caller that asks again must wait, not find an empty place.
            known = node.directory.get(cell.name)
            exit = _exit_of(failure)
            if known.state != "down":  # If it is, the root has asked for this end, and said why.
                node.directory.update(replace(known, state="down", exit=exit))
            node.cast("$root", "actor_ended", (cell.name, cell.incarnation, exit), {})

    @message(concurrent=True, lane=Lane.SYSTEM)
    async def spawn(
        self, name: str, incarnation: int, class_path: str, config: bytes, epoch: int = 1, state: Any = None
    ) -> None:
        """Starts an actor; returns when its `start` has. Raises what `start` raised. `state`: of its last snapshot, as
        memory.py packs it."""
        kind = load_actor(class_path)  # Imports the types that its fields are of.
        actor = kind(**loads(config))
        await self.stop_actor(name)
        cell = self.host(self._require_node(), actor, name, incarnation, epoch, state)
        try:
            await asyncio.shield(cell.up)
        except asyncio.CancelledError:
            await self.stop_actor(name)
            raise

    @message(concurrent=True, lane=Lane.SYSTEM)
    async def stop_actor(self, name: str) -> bool:
        """Asks an actor to stop and waits a bounded time; then cancels it. Returns whether none is left."""
        task, cell = self._cells.get(name), self._require_node().cells.get(name)
        if task is None or task.done():
            return True
        if cell is not None:
            cell.close()
        _, late = await asyncio.wait([task], timeout=STOP_S)
        if late:
            task.cancel()
            await asyncio.wait([task], timeout=CANCEL_S)
        return task.done()

    @message(concurrent=True, lane=Lane.SYSTEM)
    async def drain(self, seconds: float) -> int | None:
        """Waits until no actor here has work. Returns how many messages they have handled so far; None if it took too
        long."""
        cells = [cell for name, cell in self._require_node().cells.items() if not name.startswith("$")]
        end = asyncio.get_running_loop().time() + seconds
        for cell in cells:
            while not cell.idle:
                if asyncio.get_running_loop().time() > end:
                    return None
                await asyncio.sleep(DRAIN_LOOK_S)
        return sum(cell.handled for cell in cells) if all(cell.idle for cell in cells) else -1

    @message(concurrent=True, lane=Lane.SYSTEM)
    async def update(self, statuses: list[Status], addresses: dict[str, str], dead: dict[str, str]) -> None:
        """Takes changes of the directory: actors, nodes to connect to, nodes that died and why.

        Concurrent, as `spawn` is, and without a wait: what the root says first is done first.
        """
        node = self._require_node()
        for key, reason in dead.items():
            node.peer_down(key, reason)
        for key, address in addresses.items():
            if key != node.key:
                node.transport.connect(key, address)
        for status in statuses:
            node.directory.update(status)

    @message(concurrent=True, lane=Lane.SYSTEM, deadline_s=10.0)
    async def shutdown(self) -> None:
        """Stops all actors, in parallel; the process ends after the answer."""
        self._stopping = True
        for cell in self._require_node().cells.values():
            if cell.actor._memory is not None:
                cell.actor._memory.dismiss()
        try:
            await asyncio.gather(*(self.stop_actor(name) for name in list(self._cells) if not name.startswith("$")))
        finally:
            self.end(None)

    def end(self, failure: BaseException | None) -> None:
        """Ends the node, after what is under way in this turn of the loop."""
        if self.done.done():
            return
        if failure is None:
            self.done.set_result(None)
        else:
            self.done.set_exception(failure)

    async def close(self) -> None:
        """Ends the runtime's own actors here, this one included; `shutdown` has ended the others."""
        tasks = [task for task in self._cells.values() if not task.done()]
        for cell in list(self._require_node().cells.values()):
            cell.close()
        if tasks:
            await asyncio.wait(tasks, timeout=CANCEL_S)

    @message(concurrent=True, lane=Lane.SYSTEM)
    async def waits(self) -> list[dict[str, Any]]:
        """Who in this node waits for whom."""
        return self._require_node().wait_rows()

    @message(concurrent=True, lane=Lane.SYSTEM)
    async def dead_letters(self) -> list[dict[str, Any]]:
        """The last messages that could not be delivered here."""
        return list(self._require_node().dead_letters)

    @message(concurrent=True, lane=Lane.SYSTEM)
    async def counters(self) -> dict[str, int]:
        """What was sent, handled, lost, refused here; see node.py."""
        return dict(self._require_node().counters)

    def _require_node(self) -> Node:
        assert self._node is not None
        return self._node


def _exit_of(failure: BaseException | None) -> Exit:
    if failure is None:
        return Exit(kind="stopped", detail="stopped by itself")
    name, text, trace, _ = pack_error(failure)
    return Exit(kind="exception", detail=f"{name}: {text}".splitlines()[0], traceback=trace)


def agent_status(key: str, state: Any = "up") -> Status:
    """The directory entry of a node's agent."""
    name, _, incarnation = key.partition("#")
    return Status(name=f"$node@{name}", node=key, state=state, incarnation=int(incarnation), **interface_of(NodeAgent))
