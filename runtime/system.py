"""The root of a system: spawns actors in nodes, supervises both, and ends everything in order.

    async with System(run_dir) as system:
        verifier = await system.spawn(Verifier(), name="verifier", node="scorers")
        await verifier.judge(x)

    System (this process, node "root")
      +- node scorers (a process)  --pidfd--> exit seen in milliseconds
      |    +- verifier             --cast---> failure reported
      +- node trainer ...

All supervision decisions are made here, one_for_one: an actor that fails is started again in its node; a node that dies
is started again with all its actors. A budget that is exceeded ends the system: `failed` carries the reason. Knows
nothing of what the actors do, nor how processes are started: see nodes.py.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from .actor import Actor, message
from .agent import NodeAgent, agent_status, interface_of
from .arena import ARENA_BYTES
from .classes import class_path
from .codec import dumps
from .deadline import timeout
from .directory import Status
from .errors import ActorDied, LaunchError, RemoteError, RestartBudgetExceeded, RuntimeFault
from .events import EventLog
from .launcher import NodeSpec
from .mailbox import Lane
from .node import Node
from .nodes import ROOT, HostedNode, Nodes
from .ref import Ref
from .supervisor import RestartBudget, RestartPolicy


@dataclass(eq=False)
class _Child:
    """A supervised actor."""

    actor: Actor
    name: str
    node: str
    budget: RestartBudget
    incarnation: int = 0
    ended: int = 0
    """The last incarnation that has reported its end."""
    restart: asyncio.Task[None] | None = None
    """At most one restart is under way."""


@dataclass(kw_only=True)
class _Root(Actor):
    """The actor `$root`: what nodes report."""

    def __post_init__(self) -> None:
        self.system: System

    @message(lane=Lane.SYSTEM)
    async def hello(self, key: str, pid: int) -> None:
        """A node process is up."""
        self.system._nodes.on_hello(key)

    @message(lane=Lane.SYSTEM)
    async def actor_ended(self, name: str, incarnation: int, error: list[str] | None) -> None:
        """An actor has stopped, or failed with an error as protocol.pack_error writes it."""
        self.system._on_actor_ended(name, incarnation, error)

    @message(lane=Lane.SYSTEM)
    async def emit(self, event: str, fields: dict[str, Any]) -> None:
        """A line for events.jsonl."""
        self.system.events.write(event, **fields)


class System:
    """A running system. Use as an async context manager; leaving it stops everything."""

    def __init__(
        self,
        run_dir: Path | None = None,
        *,
        nodes: Mapping[str, NodeSpec] | None = None,
        seed: int = 0,
        arena_bytes: int = ARENA_BYTES,
    ) -> None:
        """`run_dir`: where events.jsonl and logs/ go; None for a temporary one. `nodes`: specs of nodes that need
        more than a name; others are made as actors ask for them. `arena_bytes`: what each node may lend to others on
        its host, as shared memory for large arrays; it takes what it needs and keeps it, warm."""
        self._given_dir = run_dir
        self.run_dir: Path
        """Where events.jsonl and logs/ are."""
        self.failed: asyncio.Future[None]
        """Raises RestartBudgetExceeded or LaunchError when the system can't go on."""
        self.restarts: Counter[str] = Counter()
        """Restarts by actor."""
        self._specs = dict(nodes or {})
        self._seed = seed
        self._arena_bytes = arena_bytes
        self._nodes: Nodes
        self._children: dict[str, _Child] = {}
        self._revivals: dict[str, asyncio.Task[None]] = {}
        """What brings a dead node back; at most one each."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopped: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self.failed = asyncio.get_running_loop().create_future()
        # Sockets live in a private directory (mode 0700) with a short path: ipc allows 107 bytes.
        self._scratch = Path(tempfile.mkdtemp(prefix="headrace-"))
        try:
            self.run_dir = self._given_dir or self._scratch
            (self.run_dir / "logs").mkdir(parents=True, exist_ok=True)
            self.events = EventLog(self.run_dir / "events.jsonl")
            try:
                await self._open_root()
            except BaseException:
                self.events.close()
                raise
        except BaseException:
            shutil.rmtree(self._scratch, ignore_errors=True)
            raise
        self.events.write("system_start", pid=os.getpid(), run_dir=str(self.run_dir))
        return self

    async def _open_root(self) -> None:
        self.node = Node(f"{ROOT}#1", f"ipc://{self._scratch}/{ROOT}-1", self.events, arena_bytes=self._arena_bytes)
        status = Status(name="$root", node=self.node.key, state="up", incarnation=1, **interface_of(_Root))
        self._nodes = Nodes(
            self.node, [status], self._specs, self.events, sockets=self._scratch, logs=self.run_dir / "logs",
            on_death=self._on_node_death, start_task=self._task,
            arena_bytes=self._arena_bytes,
        )  # fmt: skip
        self._agent = NodeAgent()
        self._agent.done.add_done_callback(self._on_agent_done)
        actor = _Root()
        actor.system = self
        for host, name in ((self._agent, f"$node@{ROOT}"), (actor, "$root")):
            await self._agent.host(self.node, host, name, 1).up
        self._nodes.publish(status, agent_status(self.node.key))

    async def __aexit__(self, kind: type[BaseException] | None, error: Any, trace: TracebackType | None) -> None:
        await self.stop("orderly stop" if error is None else f"{type(error).__name__}: {error}")

    def find(self, name: str) -> Ref:
        """The ref to an actor by name."""
        return self.node.ref(name)

    def tree(self) -> list[dict[str, Any]]:
        """One row per actor: name, node, pid (0: no process yet), state, incarnation, restarts, reason."""
        rows, pids = [], self.pids()
        for child in self._children.values():
            status = self.node.directory.get(child.name)
            rows.append(
                {
                    "name": child.name, "node": child.node, "pid": pids.get(child.node, 0),
                    "state": status.state, "incarnation": status.incarnation,
                    "restarts": self.restarts[child.name], "reason": status.reason,
                }
            )  # fmt: skip
        return rows

    def pids(self) -> dict[str, int]:
        """Process id of each node that was started, the root's own first."""
        return self._nodes.pids()

    async def spawn(self, actor: Actor, *, name: str, node: str = ROOT, policy: RestartPolicy | None = None) -> Ref:
        """Starts an actor in a node and returns its ref when its `start` has returned.

        Its fields travel to the node; its class must be importable there. Raises what `start` raised, or LaunchError.
        If the node dies meanwhile, the supervisor decides as it does later on, and this waits for what comes of it.
        """
        if name in self._children:
            raise ValueError(f"an actor named {name!r} is running; names are unique")
        _check_name("actor", name, "_/")
        _check_name("node", node, "_-")
        class_path(type(actor), here=node == ROOT)  # Refuses at once what no process could load.
        budget = RestartBudget(name, policy or RestartPolicy(), self._seed)
        # A name that was in use goes on counting: nothing of the earlier actor may be taken for the new one's.
        last = self.node.directory.last_incarnation(name)
        child = self._children[name] = _Child(actor, name, node, budget, last)
        try:
            self._set_status(child, "starting", "")
            await self._nodes.open(node)
            try:
                await self._start(child)
            except ActorDied:
                if self._nodes[node].ready:
                    raise
                await self._revived(name)
        except BaseException as error:
            self._set_status(child, "stopped", f"did not start: {_first_line(error)}")
            del self._children[name]
            if child.restart is not None:
                child.restart.cancel()
            raise
        return self.find(name)

    def declare(self, name: str, kind: type[Actor]) -> None:
        """Makes a name known before its actor is spawned: calls to it wait for it instead of failing."""
        self._nodes.publish(Status(name=name, node="", state="starting", incarnation=0, **interface_of(kind)))

    async def stop(self, reason: str = "orderly stop", *, patience_s: float | None = None) -> None:
        """Stops all nodes, in parallel: asks, waits a bounded time, terminates, kills. Safe to call twice."""
        if self._stopped is None:
            self._stopped = asyncio.get_running_loop().create_task(self._stop(reason, patience_s))
        await asyncio.shield(self._stopped)

    async def _stop(self, reason: str, patience_s: float | None) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._nodes.stop(patience_s)
        await self._agent.shutdown()
        await self._agent.close()
        await self.node.close()
        self.events.write("system_stop", reason=reason)
        self.events.close()
        shutil.rmtree(self._scratch, ignore_errors=True)
        if self.failed.done():
            self.failed.exception()  # Who did not ask why it failed does not want to know.
        else:
            self.failed.cancel()

    # Nodes --------------------------------------------------------------------------------------------------

    def _on_node_death(self, node: HostedNode, reason: str) -> list[Status]:
        residents = [child for child in self._children.values() if child.node == node.name]
        for task in (self._revivals.get(node.name), *(child.restart for child in residents)):
            if task is not None:
                task.cancel()
        self._revivals[node.name] = self._task(self._revive(node, residents, reason))
        return [self._status(child, "down", f"its node ended: {reason}") for child in residents]

    async def _revive(self, node: HostedNode, residents: list[_Child], reason: str) -> None:
        """Opens a dead node again with its actors; if it dies as it starts, as often as their budgets allow."""
        while True:
            delays = [(child, self._delay(child, reason)) for child in residents]
            residents = [child for child, delay in delays if delay is not None]
            if not residents:
                return
            await asyncio.sleep(max(delay for _, delay in delays if delay is not None))
            try:
                await self._nodes.open(node.name)
            except LaunchError as error:
                reason = str(error)
                self.events.write("node_start_failed", node=node.name, reason=reason)
            else:
                break
        for child in residents:
            child.restart = self._task(self._restart(child, 0.0, reason))

    # Actors -------------------------------------------------------------------------------------------------

    async def _start(self, child: _Child) -> None:
        node = self._nodes[child.node]
        if not node.ready:
            raise ActorDied(f"{child.name}: its node {node.key} is down")
        child.incarnation += 1
        self._set_status(child, "starting", "")
        kind = type(child.actor)
        path = class_path(kind, here=child.node == ROOT)
        fields = {f.name: getattr(child.actor, f.name) for f in dataclasses.fields(child.actor) if f.init}  # type: ignore[arg-type]
        agent = self.find(f"$node@{child.node}")
        async with timeout(child.budget.policy.start_s):
            await agent.spawn(child.name, child.incarnation, path, dumps(fields))
        if not node.ready:
            raise ActorDied(f"{child.name}: its node {node.key} died as it started")
        if child.ended < child.incarnation:
            self._set_status(child, "up", "")
            pid = self.pids()[child.node]
            self.events.write("actor_up", actor=child.name, node=child.node, incarnation=child.incarnation, pid=pid)

    async def _revived(self, name: str) -> None:
        """Waits until an actor is up again. Raises ActorDied if it stays down, or what the system failed with."""
        up = asyncio.ensure_future(self.node.directory.when_up(name))
        ends: list[asyncio.Future[Any]] = [up, self.failed]
        try:
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            if not up.done():
                self.failed.result()
            up.result()
        finally:
            up.cancel()

    def _on_actor_ended(self, name: str, incarnation: int, error: list[str] | None) -> None:
        child = self._children.get(name)
        if child is None or self._stopped is not None or incarnation != child.incarnation:
            return
        child.ended = incarnation
        reason = "stopped by itself" if error is None else f"{error[0]}: {error[1]}"
        trace = "" if error is None else error[2]
        self.events.write("actor_exit", actor=name, incarnation=incarnation, reason=reason, traceback=trace)
        self._set_status(child, "down", reason)
        if error is None and not child.budget.after_stop():
            self._set_status(child, "stopped", reason)
            return
        try:
            delay = self._delay(child, reason)
        except RestartBudgetExceeded as exceeded:
            self._fail(exceeded)
            return
        if delay is not None:
            child.restart = self._task(self._restart(child, delay, reason))

    def _delay(self, child: _Child, reason: str) -> float | None:
        """Seconds until its next restart; None if there will be none: it has stopped. Raises RestartBudgetExceeded."""
        delay = child.budget.after_failure(asyncio.get_running_loop().time(), reason)
        if delay is None:
            self._set_status(child, "stopped", reason)
        return delay

    async def _restart(self, child: _Child, delay: float, reason: str) -> None:
        await asyncio.sleep(delay)
        if self._children.get(child.name) is not child:
            return  # Its `spawn` was given up meanwhile.
        self.restarts[child.name] += 1
        self.events.write("actor_restart", actor=child.name, restart=self.restarts[child.name], reason=reason)
        try:
            await self._start(child)
        except (RuntimeFault, TimeoutError) as error:
            if not self._nodes[child.node].ready:
                return  # Its node died meanwhile, and comes back with all its actors.
            trace = error.remote_traceback if isinstance(error, RemoteError) else ""
            self._on_actor_ended(child.name, child.incarnation, ["did not start", _first_line(error), trace])

    def _status(self, child: _Child, state: Any, reason: str) -> Status:
        return Status(
            name=child.name, node=self._nodes[child.node].key, state=state, incarnation=child.incarnation,
            reason=reason, **interface_of(type(child.actor)),
        )  # fmt: skip

    def _set_status(self, child: _Child, state: Any, reason: str) -> None:
        self._nodes.publish(self._status(child, state, reason))

    # When nothing helps -------------------------------------------------------------------------------------

    def _fail(self, error: BaseException) -> None:
        if not self.failed.done():
            self.failed.set_exception(error)
            self.events.write("system_failed", reason=_first_line(error))

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


def _first_line(error: BaseException) -> str:
    """What happened, without the remote traceback; of a `start` that raised, only what it raised."""
    text = str(error.args[0] if isinstance(error, RemoteError) else error)
    return text.partition(".spawn raised ")[2] or text or type(error).__name__
