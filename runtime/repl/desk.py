"""What can be asked of a running system. Each question is a method here; door.py hands over the answers.

Runs on the door's own loop. What changes or calls anything goes to the root's loop (`_on_root`); what only looks goes
to the inspectors of the nodes, which are threads: it is answered while any loop, the root's too, is blocked.
"""

from __future__ import annotations

import asyncio
import functools
import os
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..deadline import timeout
from ..errors import InspectError, RuntimeFault, UnknownActor
from ..exits import Exit
from ..inspector import Question, inspect_node, steady
from ..nodes import ROOT
from ..stacks import dump
from .inside import EVALUATE_S

if TYPE_CHECKING:
    from ..children import Children, Member
    from ..node import Node
    from ..nodes import Nodes
    from ..system import System
    from .live import LiveSettings

LOOK_S = 0.5
"""Time for a process to answer a look; one that never lets go of its interpreter does not."""

ANSWER_S = 5.0
"""Time for a node to do a small thing on its loop."""

Send = Callable[[str, Any], Awaitable[None]]
"""Sends an ("out" | "item", value) before the end."""
Row = dict[str, Any]


class Desk:
    """Made by the root, on its loop."""

    def __init__(self, system: System, nodes: Nodes, children: Children, live: LiveSettings) -> None:
        self._system = system
        self._nodes = nodes
        self._children = children
        self._live = live
        self._loop = asyncio.get_running_loop()

    @property
    def _node(self) -> Node:
        return self._system.node

    # Looking ------------------------------------------------------------------------------------------------

    async def hello(self) -> Row:
        """Run, process, actors by name with their messages, exposed names."""
        statuses = [s for s in steady(self._node.directory.all) if not s.name.startswith("$")]
        exposed: dict[str, str] = {}
        for _, names in await self._look_all("exposed"):
            exposed = {**(names or {}), **exposed}  # Of two that have the same name, the first.
        return {
            "run": str(self._system.run_dir), "pid": os.getpid(),
            "actors": {s.name: sorted(s.messages) for s in statuses if s.state != "stopped"},
            "classes": {s.name: s.class_name for s in statuses}, "exposed": exposed,
        }  # fmt: skip

    async def tree(self) -> Row:
        """Groups and actors, with their mailboxes."""
        boxes = {row["name"]: row for _, rows in await self._look_all("actors") for row in rows or ()}
        actors = [
            {
                **row,
                **{key: boxes.get(row["name"], {}).get(key) for key in ("waiting", "capacity", "running", "paused")},
            }
            for row in steady(self._system.tree)
        ]
        return {"run": self._system.run_dir.name, "groups": steady(self._system.groups), "actors": actors}

    async def ps(self) -> list[Row]:
        """One row per process."""
        homes: dict[str, list[str]] = {}
        for row in steady(self._system.tree):
            homes.setdefault(row["node"], []).append(row["name"])
        return [
            {"node": n, "pid": p, **_process(p), "actors": homes.get(n, [])} for n, p in self._system.pids().items()
        ]

    async def pids(self) -> dict[str, int]:
        """Process id of each node."""
        return self._system.pids()

    async def groups(self) -> list[Row]:
        """One row per group of actors."""
        return steady(self._system.groups)

    async def waits(self) -> list[Row]:
        """Who waits for whom; what the supervisor holds back."""
        return await self._rows("waits") + [{"node": ROOT, **row} for row in steady(self._children.waits)]

    async def dead_letters(self) -> list[Row]:
        """Messages that could not be delivered."""
        return await self._rows("dead_letters")

    async def counters(self) -> list[Row]:
        """What each node has counted."""
        return [{"node": n, **(found or {"unanswered": True})} for n, found in await self._look_all("counters")]

    async def peek(self, actor: str, path: str = "") -> str:
        """What is at a path in an actor, shown, whatever it is doing."""
        return str(await self._look(self._home(actor), "peek", actor=actor, at=path))

    async def names(self, actor: str, path: str = "") -> list[str]:
        """Names at a path in an actor, for completion."""
        found: list[str] = await self._look(self._home(actor), "names", actor=actor, at=path)
        return found

    async def stack(self, name: str) -> str:
        """Where the threads of an actor's process, or of a node's, are, and the tasks of the actor."""
        node = self._home(name)
        try:
            text = str(await self._look(node, "stacks"))
            tasks = await self._look(node, "tasks")
        except InspectError as error:
            process = self._nodes[node].process
            if process is None:
                raise
            return f"{error}\n{await asyncio.to_thread(dump, process.pid, process.log)}"
        own = [task for task in tasks if task["name"].partition(".")[0].partition(":")[0] == name]
        lines = [f"Task {task['name']}:\n" + "".join(f"  {line}\n" for line in task["at"]) for task in own]
        return text + "\n" + "\n".join(lines)

    async def explain(self, sample: Any) -> list[Row]:
        """What all actors that have a message `explain` know of a sample."""
        told = []
        for name, messages in (await self.hello())["actors"].items():
            if "explain" in messages:
                try:
                    told.append({"actor": name, "told": await self._call(name, "explain", [sample], within_s=ANSWER_S)})
                except (RuntimeFault, TimeoutError) as error:
                    told.append({"actor": name, "told": None, "error": str(error).partition("\n")[0]})
        return told

    async def settings(self) -> list[Row]:
        """The settings that may be changed."""
        return steady(lambda: self._live.rows(list(self._children.table.values())))

    # Calling ------------------------------------------------------------------------------------------------

    async def call(self, session: str, actor: str, method: str, args: list[Any], kwargs: Row) -> Any:
        """Calls an actor; see Ref."""
        return await self._call(actor, method, args, kwargs, name=session)

    async def cast(self, actor: str, method: str, args: list[Any], kwargs: Row) -> None:
        """Casts to an actor; see Ref."""

        async def cast() -> None:
            self._node.cast(actor, method, tuple(args), kwargs)

        await self._on_root(cast())

    async def stream(self, send: Send, session: str, actor: str, method: str, args: list[Any], kwargs: Row) -> None:
        """Streams the answers of an actor; see Ref."""
        await self._forward(send, session, actor, method, args, kwargs)

    async def invoke(self, session: str, name: str, method: str, args: list[Any], kwargs: Row) -> Any:
        """Calls a method of what an actor has exposed."""
        for node, names in await self._look_all("exposed"):
            if names and name in names:
                return await self._call(f"$node@{node}", "invoke", [name, method, args, kwargs], name=session)
        raise UnknownActor(f"nothing is exposed as {name!r} now")

    async def evaluate(self, send: Send, session: str, actor: str, source: str) -> Any:
        """Evaluates code inside an actor; returns ["value" | "error", text]. Cancelled, it interrupts the code."""
        node = self._home(actor)
        end: list[Any] = []

        async def take(kind: str, item: Any) -> None:
            if item[0] == "out":
                await send("out", item[1])
            else:
                end[:] = item

        try:
            await self._forward(take, session, f"$node@{node}", "evaluate", [actor, session, source], {})
        except asyncio.CancelledError:
            await self.interrupt(session, node)
            raise
        return end

    async def interrupt(self, session: str, node: str) -> None:
        """Ends what a session computes in a node, even if it holds up the loop there."""
        try:
            await self._look(node, "interrupt", session=session)
        except InspectError as error:
            self._node.emit("attach_interrupt_failed", node=node, reason=str(error))

    async def trace(self, send: Send, session: str, actor: str, seconds: float) -> None:
        """Follows the messages of an actor: rows, as they come."""
        await self._forward(send, session, f"$node@{self._home(actor)}", "trace", [actor, seconds], {})

    async def leave(self, session: str) -> None:
        """A session has ended; the nodes forget its names."""

        async def leave() -> None:
            for node in self._nodes.names():
                self._node.cast(f"$node@{node}", "leave", (session,), {})

        await self._on_root(leave())

    # Changing -----------------------------------------------------------------------------------------------

    async def pause(self, actor: str, paused: bool = True) -> int:
        """Holds back an actor's messages, or gives them out again; returns how many wait."""
        waiting: int = await self._call(f"$node@{self._home(actor)}", "pause", [actor, paused], within_s=ANSWER_S)
        self._node.emit("actor_paused" if paused else "actor_resumed", actor=actor)
        return waiting

    async def restart(self, actor: str) -> None:
        """Has the supervisor stop an actor in good order and start it again, with those that share its fate."""
        self._member(actor)

        async def restart() -> None:
            self._children.restart(actor, Exit(kind="stopped", detail="restarted by hand"))

        await self._on_root(restart())

    async def kill(self, actor: str) -> int:
        """Kills the process of an actor; the supervisor does what it does when a process dies. Returns its pid."""
        node = self._nodes[self._member(actor).node]
        if node.process is None:
            raise ValueError(
                f"{actor} lives in {node.name}, the process that was started: ending that ends the run (Ctrl-C there); "
                f"restart({actor!r}) restarts the actor alone"
            )
        self._node.emit("killed_by_hand", actor=actor, pid=node.process.pid)
        pid = node.process.pid
        node.process.kill()
        return pid

    async def change(self, name: str, value: Any) -> Row:
        """Changes a setting; see LiveSettings.change."""
        done: Row = await self._on_root(self._live.change(list(self._children.table.values()), name, value))
        return done

    # Inside -------------------------------------------------------------------------------------------------

    def _home(self, name: str) -> str:
        """The node of an actor, or a node of that name. Raises UnknownActor, with the nearest names."""
        member = self._children.table.get(name)
        if member is not None:
            return member.node
        if name in steady(self._nodes.names):
            return name
        self._node.directory.get(name)
        raise UnknownActor(f"{name} runs no more")

    def _member(self, actor: str) -> Member:
        self._home(actor)
        member = self._children.table.get(actor)
        if member is None:
            raise UnknownActor(f"{actor} is a node; name an actor")
        return member

    async def _on_root(self, work: Coroutine[Any, Any, Any], name: str = "attach") -> Any:
        """Runs on the root's loop; cancelled, it is cancelled there."""

        async def named() -> Any:
            task = asyncio.current_task()
            assert task is not None
            task.set_name(name)
            return await work

        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(named(), self._loop))

    async def _call(
        self, actor: str, method: str, args: list[Any], kwargs: Row | None = None, *, within_s: float = 0.0,
        name: str = "attach",
    ) -> Any:  # fmt: skip
        async def call() -> Any:
            if not within_s:
                return await self._node.call(actor, method, tuple(args), kwargs or {})
            async with timeout(within_s):
                return await self._node.call(actor, method, tuple(args), kwargs or {})

        return await self._on_root(call(), name)

    async def _forward(self, send: Send, session: str, actor: str, method: str, args: list[Any], kwargs: Row) -> None:
        """Sends the items of a stream on; the callee is held back while they are not read."""
        here = asyncio.get_running_loop()

        async def forward() -> None:
            items = self._node.stream(actor, method, tuple(args), kwargs)
            try:
                async for item in items:
                    async with asyncio.timeout(EVALUATE_S):
                        await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(_sent(send, item), here))
            finally:
                await items.aclose()

        await self._on_root(forward(), session)

    async def _look(self, node: str, ask: Question, **details: str) -> Any:
        path = self._nodes.inspector_of(node)
        return await asyncio.to_thread(functools.partial(inspect_node, path, ask, LOOK_S, **details))

    async def _look_all(self, ask: Question) -> list[tuple[str, Any]]:
        """Node and answer of each; None of one that does not answer."""

        async def look(node: str) -> tuple[str, Any]:
            try:
                return node, await self._look(node, ask)
            except InspectError:
                return node, None

        return await asyncio.gather(*(look(node) for node in steady(self._nodes.names)))

    async def _rows(self, ask: Question) -> list[Row]:
        found = await self._look_all(ask)
        missing = [{"node": n, "unanswered": f"no answer within {LOOK_S:g} s"} for n, rows in found if rows is None]
        return [{"node": node, **row} for node, rows in found for row in rows or ()] + missing


async def _sent(send: Send, item: Any) -> None:
    await send("item", item)


def _process(pid: int) -> Row:
    """State, resident bytes, processor seconds and threads of a process; empty if it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return {"state": "X", "rss_bytes": 0, "cpu_s": 0.0, "threads": 0}
    ticks = os.sysconf("SC_CLK_TCK")
    return {
        "state": fields[0], "rss_bytes": int(fields[21]) * os.sysconf("SC_PAGE_SIZE"),
        "cpu_s": round((int(fields[11]) + int(fields[12])) / ticks, 2), "threads": int(fields[17]),
    }  # fmt: skip
