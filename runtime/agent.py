"""The process of a node: `python -m headrace.runtime.agent`, and the `$node` actor through which the root runs it.

    read spec from stdin -> die with the launcher -> bind -> hello to the root -> spawn / stop actors -> shutdown

Started by launcher.py only. Imports an actor's module when it is told to spawn it, so that a node without torch actors
is up in a fraction of a second. Decides nothing: a failed actor is reported to the root, whose supervisor decides.
"""

from __future__ import annotations

import asyncio
import ctypes
import faulthandler
import importlib
import importlib.util
import os
import signal
import sys
import traceback
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

from .actor import Actor, message
from .cell import STOP_S, Cell
from .codec import decode, encode, loads
from .deadline import unlimited
from .directory import Status
from .mailbox import Lane
from .node import Node
from .protocol import pack_error, window_of

CANCEL_S = 1.0
"""Time that a cancelled actor may take to end; what is stuck in a thread ends with the process."""

_PR_SET_PDEATHSIG = 1
_PROGRAM = "headrace_program"


def interface_of(actor: type[Actor]) -> dict[str, Any]:
    """What a class answers, as its directory entry says it."""
    return {
        "class_name": actor.__name__,
        "messages": {name: (int(spec.lane), spec.deadline_s) for name, spec in actor.messages.items()},
        "window": window_of(actor.mailbox_capacity),
    }


@dataclass(kw_only=True)
class NodeAgent(Actor):
    """The actor `$node@<name>` of every node: hosts, lists and stops its cells."""

    def __post_init__(self) -> None:
        self._cells: dict[str, asyncio.Task[None]] = {}
        self._stopping = False
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done after `shutdown`; raises what one of the runtime's own actors here failed with."""

    def host(self, node: Node, actor: Actor, name: str, incarnation: int) -> Cell:
        """Puts an actor into this node; a cell of the same name must have ended."""
        actor._node, actor._name = node, name
        cell = node.cells[name] = Cell(actor, name, incarnation, node)
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
            node.directory.update(replace(known, state="down", reason=str(failure or "stopped")))
            packed = None if failure is None else pack_error(failure)
            node.cast("$root", "actor_ended", (cell.name, cell.incarnation, packed), {})

    @message(concurrent=True, lane=Lane.SYSTEM)
    async def spawn(self, name: str, incarnation: int, class_path: str, config: bytes) -> None:
        """Starts an actor; returns when its `start` has. Raises what `start` raised."""
        kind = load_actor(class_path)  # Imports the types that its fields are of.
        actor = kind(**loads(config))
        await self.stop_actor(name)
        cell = self.host(self._require_node(), actor, name, incarnation)
        try:
            await asyncio.shield(cell.up)
        except asyncio.CancelledError:
            await self.stop_actor(name)
            raise

    @message(concurrent=True, lane=Lane.SYSTEM)
    async def stop_actor(self, name: str) -> None:
        """Asks an actor to stop and waits a bounded time; then cancels it. Does nothing if there is none."""
        task, cell = self._cells.get(name), self._require_node().cells.get(name)
        if task is None or task.done():
            return
        if cell is not None:
            cell.close()
        _, late = await asyncio.wait([task], timeout=STOP_S)
        if late:
            task.cancel()
            await asyncio.wait([task], timeout=CANCEL_S)

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
        return self._require_node().waits.rows()

    @message(concurrent=True, lane=Lane.SYSTEM)
    async def dead_letters(self) -> list[dict[str, Any]]:
        """The last messages that could not be delivered here."""
        return list(self._require_node().dead_letters)

    def _require_node(self) -> Node:
        assert self._node is not None
        return self._node


def class_path(kind: type[Actor], *, here: bool) -> str:
    """`module:Class`, or `file.py:Class` for a class of the program itself; `here` says that this process will load it.

    Raises ValueError if the loading process could not find it.
    """
    module, name = kind.__module__, kind.__qualname__
    if module == "__main__" and not here:
        module = getattr(sys.modules["__main__"], "__file__", None) or ""
        module = os.path.abspath(module) if module.endswith(".py") else ""
    if not module or "." in name:
        raise ValueError(
            f"{kind.__module__}.{name} can't be found by the process of a node: "
            "define actor classes at the top level of a file or module"
        )
    return f"{module}:{name}"


def load_actor(path: str) -> type[Actor]:
    """The class at `class_path`. The path comes from the root's own configuration, never from an actor's message."""
    module, _, name = path.rpartition(":")
    loaded = getattr(_load_program(module) if module.endswith(".py") else importlib.import_module(module), name)
    assert isinstance(loaded, type) and issubclass(loaded, Actor), path
    return loaded


def _load_program(file: str) -> ModuleType:
    """The program that was started, as a module here; what is under its `__name__ == "__main__"` does not run again."""
    main = sys.modules["__main__"]
    if os.path.abspath(getattr(main, "__file__", None) or "") == file:
        return main
    if _PROGRAM not in sys.modules:
        spec = importlib.util.spec_from_file_location(_PROGRAM, file)
        assert spec is not None and spec.loader is not None, file
        module = sys.modules[_PROGRAM] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[_PROGRAM]


def agent_status(key: str, state: Any = "up") -> Status:
    """The directory entry of a node's agent."""
    name, _, incarnation = key.partition("#")
    return Status(name=f"$node@{name}", node=key, state=state, incarnation=int(incarnation), **interface_of(NodeAgent))


async def serve(spec: dict[str, Any]) -> None:
    """Runs a node until the root tells it to shut down."""
    node = Node(spec["key"], spec["address"])
    agent = NodeAgent()
    await agent.host(node, agent, f"$node@{spec['name']}", spec["incarnation"]).up
    node.transport.connect(spec["root_key"], spec["root_address"])
    for status in spec["statuses"]:
        node.directory.update(status)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, agent.end, None)
    node.cast("$root", "hello", (spec["key"], os.getpid()), {})
    await agent.done
    await node.close()


def die_with(parent: int) -> None:
    """Has the kernel kill this process when its launcher ends, however that happens."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def main() -> None:
    spec = decode(sys.stdin.buffer.read())
    die_with(spec["parent"])
    faulthandler.enable()
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # What was printed before a kill is kept.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.path[:0] = [p for p in spec["path"] if p not in sys.path]
    import uvloop

    loop = uvloop.new_event_loop()
    asyncio.set_event_loop(loop)
    code = 1
    try:
        loop.run_until_complete(serve(spec))
        code = 0
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        # Threads that still compute, and tasks that don't let themselves be cancelled, must not hold up the exit.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def pack_spec(**spec: Any) -> bytes:
    """The spec that `main` reads."""
    data, buffers = encode(spec)
    assert not buffers
    return data
