"""The root of a system: spawns actors in nodes, supervises both, and ends everything in order.

    async with System(run_dir) as system:
        verifier = await system.spawn(Verifier(), name="verifier", node="scorers")
        await verifier.judge(x)

    System (this process, node "root")
      +- node scorers (a process)  --pidfd--> exit seen in milliseconds
      |    +- verifier             --cast---> failure reported
      +- node trainer ...

All supervision is here, in the root: strategy.py decides, children.py does it, hosting.py knows how. A node that dies
is started again as its actors are. A failure that no group could repair ends the system: `failed` carries the reason.
This is the facade; it knows nothing of what the actors do, nor how processes are started: see nodes.py.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Coroutine, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from .actor import Actor
from .agent import NodeAgent, agent_status, interface_of
from .arena import ARENA_BYTES
from .children import Children, Member, first_line
from .classes import class_path
from .copies import CopyKeeper
from .curve import Keys
from .detector import HeartbeatPolicy
from .directory import Status
from .events import EventLog
from .exits import Exit
from .group import ActorGroup
from .hosting import Hosting
from .launcher import NodeSpec
from .memory import Snapshots
from .node import Node
from .nodes import ROOT, STOP_NODE_S, HostedNode, Nodes
from .ref import Ref
from .remote import RemoteNodes
from .repl.desk import Desk
from .repl.door import Door
from .repl.live import LiveSettings, read_changed
from .root import Root
from .rundir import RunDirectory, claim
from .strategy import Group, Strategy, Supervisor
from .supervisor import RestartPolicy
from .survey import drain_nodes, survey


class System:
    """A running system. Use as an async context manager; leaving it stops everything."""

    def __init__(
        self,
        run_dir: Path | RunDirectory | None = None,
        *,
        nodes: Mapping[str, NodeSpec] | None = None,
        seed: int = 0,
        max_state_bytes: int = 256 << 20,
        arena_bytes: int = ARENA_BYTES,
        keys: Keys | None = None,
        listen: str = "127.0.0.1:0",
        heartbeats: HeartbeatPolicy | None = None,
    ) -> None:
        """`run_dir`: where events.jsonl and logs/ go, and `bin/attach` finds the system; None for a temporary one. A
        path is claimed: entering raises DirectoryInUse if another system works there; a RunDirectory has been claimed
        already. `nodes`: specs of nodes
        that need more than a name; others are made as actors ask for them. `max_state_bytes`: for all snapshots of
        actors together. `arena_bytes`: what each node may lend to others on its host, as shared memory for large
        arrays; it takes what it needs and keeps it, warm. 0: none.

        For nodes on tcp: `keys` of the system, None for new ones; `listen`, host and port where they reach the root;
        `heartbeats`, how both sides watch each other."""
        self._arena_bytes = arena_bytes
        self._keys = keys
        self._listen = listen
        self._heartbeats = heartbeats
        self._given_dir = run_dir
        self.run_dir: Path
        """Where events.jsonl and logs/ are."""
        self.failed: asyncio.Future[None]
        """Raises RestartBudgetExceeded or LaunchError when the system can't go on."""
        self._specs = dict(nodes or {})
        self._supervisor = Supervisor(seed)
        self._snapshots = Snapshots(max_state_bytes)
        self._nodes: Nodes
        self._children: Children
        self._door: Door | None = None
        self.live: LiveSettings
        """Settings that may be changed while the system runs."""
        self._claim = -1
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopped: asyncio.Task[None] | None = None

    @property
    def restarts(self) -> Counter[str]:
        """Restarts by actor."""
        return self._children.restarts

    async def __aenter__(self) -> Self:
        self.failed = asyncio.get_running_loop().create_future()
        # Sockets live in a private directory (mode 0700) with a short path: ipc allows 107 bytes.
        self._scratch = Path(tempfile.mkdtemp(prefix="headrace-"))
        try:
            self._open_run_dir()
            self.events = EventLog(self.run_dir / "events.jsonl")
            try:
                await self._open_root()
            except BaseException:
                self.events.close()
                raise
        except BaseException:
            self._give_back()
            raise
        self.events.write("system_start", pid=os.getpid(), run_dir=str(self.run_dir))
        return self

    def _open_run_dir(self) -> None:
        given = self._given_dir
        self.run_dir = given.path if isinstance(given, RunDirectory) else given or self._scratch
        (self.run_dir / "logs").mkdir(parents=True, exist_ok=True)
        if isinstance(given, Path):
            self._claim = claim(given)

    def _give_back(self) -> None:
        shutil.rmtree(self._scratch, ignore_errors=True)
        if self._claim >= 0:
            os.close(self._claim)
            self._claim = -1

    async def _open_root(self) -> None:
        kept = None if self._given_dir is None else self.run_dir
        changed = {} if kept is None else read_changed(kept / "settings.json")  # Before anything is open.
        self.node = Node(f"{ROOT}#1", f"ipc://{self._scratch}/{ROOT}-1", self.events, arena_bytes=self._arena_bytes)
        status = Status(name="$root", node=self.node.key, state="up", incarnation=1, **interface_of(Root))
        self._remote = RemoteNodes(
            self.node, self.events, keys=self._keys, policy=self._heartbeats, listen=self._listen
        )
        self._nodes = Nodes(
            self.node, [status], self._specs, self.events, sockets=self._scratch, logs=self.run_dir / "logs",
            on_death=self._on_node_death, start_task=self._task, remote=self._remote,
            arena_bytes=self._arena_bytes,
        )  # fmt: skip
        self._hosting = Hosting(self.node, self._nodes, self._snapshots, self.events)
        self._children = Children(self._hosting, self._supervisor, self.events, self._task, self._fail)
        self._agent = NodeAgent()
        self._agent.done.add_done_callback(self._on_agent_done)
        keeper = CopyKeeper(self._children, self._nodes, self._specs, self._spawn)
        root = Root(
            nodes=self._nodes, children=self._children, snapshots=self._snapshots, events=self.events, keeper=keeper
        )
        for host, name in ((self._agent, f"$node@{ROOT}"), (root, "$root")):
            await self._agent.host(self.node, host, name, 1).up
        self._nodes.publish(status, agent_status(self.node.key))
        self.live = LiveSettings(None if kept is None else kept / "settings.json", self.node, self.events, changed)
        if kept is not None:
            self._door = Door(Desk(self, self._nodes, self._children, self.live), kept, self._scratch)

    async def __aexit__(self, kind: type[BaseException] | None, error: Any, trace: TracebackType | None) -> None:
        await self.stop("orderly stop" if error is None else f"{type(error).__name__}: {error}")

    # Actors -------------------------------------------------------------------------------------------------

    def find(self, name: str) -> Ref:
        """The ref to an actor by name."""
        return self.node.ref(name)

    async def spawn(self, actor: Actor, *, name: str, node: str = ROOT, policy: RestartPolicy | None = None) -> Ref:
        """Starts an actor in a node and returns its ref when its `start` has returned.

        Its fields travel to the node; its class must be importable there. Raises what `start` raised, or LaunchError.
        If the node dies meanwhile, the supervisor decides as it does later on, and this waits for what comes of it.
        """
        return await self._spawn(actor, name, node, policy, self._supervisor.root)

    def group(
        self,
        name: str,
        *,
        strategy: Strategy = "one_for_one",
        policy: RestartPolicy | None = None,
        parent: ActorGroup | None = None,
    ) -> ActorGroup:
        """A new group of actors that are supervised together.

        `strategy`: one_for_one restarts the member that failed, one_for_all all members, rest_for_one also those that
        were spawned after it. `policy` bounds the restarts of all members together; beyond, the group has failed: it is
        a failure in `parent`, whose strategy decides, or without one the end of the system (a `temporary` group just
        stays down). Raises ValueError if the name is in use.
        """
        _check_name("group", name, "_-")
        above = self._supervisor.root.name if parent is None else parent.name
        return ActorGroup(self, self._supervisor.add_group(name, strategy, policy or RestartPolicy(), above))

    def declare(self, name: str, kind: type[Actor]) -> None:
        """Makes a name known before its actor is spawned: calls to it wait for it instead of failing."""
        self._nodes.publish(Status(name=name, node="", state="starting", incarnation=0, **interface_of(kind)))

    async def _spawn(self, actor: Actor, name: str, node: str, policy: RestartPolicy | None, group: Group) -> Ref:
        if name in self._children.table:
            raise ValueError(f"an actor named {name!r} is running; names are unique")
        _check_name("actor", name, "_/")
        _check_name("node", node, "_-")
        class_path(type(actor), here=node == ROOT)  # Refuses at once what no process could load.
        # A name that was in use goes on counting: nothing of the earlier actor may be taken for the new one's.
        last = self.node.directory.last_incarnation(name)
        self._snapshots.forget(name)
        actor = self.live.applied(actor)
        await self._children.spawn(Member(name, actor, node, policy or group.policy, group.name, last))
        return self.find(name)

    # Looking ------------------------------------------------------------------------------------------------

    def tree(self) -> list[dict[str, Any]]:
        """One row per actor: name, group, node, pid (0: no process yet), state, incarnation, restarts, reason."""
        rows, pids = [], self.pids()
        for member in self._children.table.values():
            status = self.node.directory.get(member.name)
            rows.append(
                {
                    "name": member.name, "group": member.group, "node": member.node, "pid": pids.get(member.node, 0),
                    "state": status.state, "incarnation": status.incarnation,
                    "restarts": self.restarts[member.name], "reason": status.reason,
                }
            )  # fmt: skip
        return rows

    def groups(self) -> list[dict[str, Any]]:
        """One row per group: name, parent, strategy, epoch, restarts that its members needed, number of members."""
        return [
            {
                "name": group.name, "parent": "" if group.parent is None else group.parent.name,
                "strategy": group.strategy, "epoch": group.epoch, "restarts": group.budget.total,
                "members": len(group.children),
            }
            for group in self._supervisor.groups.values()
        ]  # fmt: skip

    def pids(self) -> dict[str, int]:
        """Process id of each node that was started, the root's own first."""
        return self._nodes.pids()

    async def waits(self, *, within_s: float = 1.0) -> list[dict[str, Any]]:
        """Who waits for whom, for which message, why, since when and until when (seconds from now), in all nodes; also
        which restarts the supervisor holds back, and why.

        A node that does not answer within `within_s` has one row, with `unanswered`: why.
        """
        return await self._survey(self.node.wait_rows() + self._children.waits(), "waits", within_s)

    async def dead_letters(self, *, within_s: float = 1.0) -> list[dict[str, Any]]:
        """The last messages of each node that could not be delivered, and why; silent nodes as in `waits`."""
        return await self._survey(list(self.node.dead_letters), "dead_letters", within_s)

    async def counters(self, *, within_s: float = 1.0) -> list[dict[str, Any]]:
        """What was counted in each node, a row each; silent nodes as in `waits`."""
        return await self._survey([dict(self.node.counters)], "counters", within_s)

    async def stacks(self, node: str) -> str:
        """The Python stacks of all threads of a node, also of one whose loop is blocked."""
        return await self._nodes.stacks(node)

    async def _survey(self, own: list[dict[str, Any]], what: str, within_s: float) -> list[dict[str, Any]]:
        return await survey(self.node, own, [name for name in self._nodes.names() if name != ROOT], what, within_s)

    # Stopping -----------------------------------------------------------------------------------------------

    async def stop(self, reason: str = "orderly stop", *, patience_s: float | None = None, drain: bool = False) -> None:
        """Stops all nodes, in parallel: asks, waits `patience_s`, terminates, kills. Safe to call twice.

        `drain`: first lets the actors handle what is in their mailboxes, and what comes of it, within `patience_s`.
        """
        if self._stopped is None:
            self._stopped = asyncio.get_running_loop().create_task(self._stop(reason, patience_s, drain))
        await asyncio.shield(self._stopped)

    async def _stop(self, reason: str, patience_s: float | None, drain: bool) -> None:
        if drain:
            patience = STOP_NODE_S if patience_s is None else patience_s
            if not await drain_nodes(self.node, self._nodes.names(), patience):
                self.events.write("drain_late", reason=f"the actors had not finished their work after {patience:g} s")
        if self._door is not None:
            await self._door.close()
        self._children.close()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._nodes.stop(patience_s)
        self._remote.close()
        await self._agent.shutdown()
        await self._agent.close()
        await self.node.close()
        self.events.write("system_stop", reason=reason)
        self.events.close()
        self._give_back()
        if self.failed.done():
            self.failed.exception()  # Who did not ask why it failed does not want to know.
        else:
            self.failed.cancel()

    # What happens -------------------------------------------------------------------------------------------

    def _on_node_death(self, node: HostedNode, exit: Exit) -> list[Status]:
        why = Exit(kind=exit.kind, detail=f"its node ended: {exit}", code=exit.code, traceback=exit.traceback)
        residents = self._children.node_died(node.name, why)
        down = [member for member in residents if self._supervisor.children[member.name].state != "retired"]
        return [self._hosting.status(member, "down", why) for member in down]

    def _fail(self, error: BaseException) -> None:
        if not self.failed.done():
            self.failed.set_exception(error)
            self.events.write("system_failed", reason=first_line(error))

    def _task(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._on_task_done)
        return task

    def _on_task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None:
            self._fail(error)

    def _on_agent_done(self, done: asyncio.Future[None]) -> None:
        error = done.exception()
        if error is not None:
            self._fail(error)


def _check_name(what: str, name: str, marks: str) -> None:
    """Names appear in logs, paths and configuration keys."""
    if not name.isascii() or not all(part.isalnum() for part in re.split(f"[{marks}]", name.strip("_"))):
        raise ValueError(f"{what} name {name!r}: use letters, digits and {' '.join(marks)}")
