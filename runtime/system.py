"""The root of a system: starts nodes, spawns actors, supervises both, and ends everything in order.

    async with System(run_dir) as system:
        verifier = await system.spawn(Verifier(), name="verifier", node="scorers")
        await verifier.judge(x)

    System (this process, node "root")
      +- node scorers (a process)  --pidfd--> exit seen in milliseconds
      |    +- verifier             --cast---> failure reported
      +- node trainer ...

All supervision decisions are made here, one_for_one: an actor that fails is started again in its node; a node that dies
is started again with all its actors. A budget that is exceeded ends the system: `failed` carries the reason. Knows
nothing of what the actors do.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import re
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from .actor import Actor, message
from .agent import NodeAgent, agent_status, interface_of, pack_spec
from .codec import dumps
from .directory import Status
from .errors import ActorDied, LaunchError, RemoteError, RestartBudgetExceeded, RuntimeFault
from .events import EventLog
from .launcher import NodeProcess, NodeSpec, start_process
from .mailbox import Lane
from .node import Node
from .ref import Ref
from .supervisor import RestartBudget, RestartPolicy
from .transport import MAX_IPC_PATH_BYTES

ROOT = "root"
HELLO_S = 30.0
"""Time a node process may take from its start to its first message."""

STOP_NODE_S = 8.0
TERMINATE_S = 1.0


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


@dataclass(eq=False)
class _NodeState:
    """A node as the root sees it."""

    spec: NodeSpec
    incarnation: int = 0
    key: str = ""
    address: str = ""
    process: NodeProcess | None = None
    hello: asyncio.Future[None] | None = None
    ready: bool = False
    starting: asyncio.Lock = field(default_factory=asyncio.Lock)
    revival: asyncio.Task[None] | None = None
    """What brings it back after a death; at most one is under way."""


@dataclass(kw_only=True)
class _Root(Actor):
    """The actor `$root`: what nodes report."""

    def __post_init__(self) -> None:
        self.system: System

    @message(lane=Lane.SYSTEM)
    async def hello(self, key: str, pid: int) -> None:
        """A node process is up."""
        self.system._on_hello(key)

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
        self, run_dir: Path | None = None, *, nodes: Mapping[str, NodeSpec] | None = None, seed: int = 0
    ) -> None:
        """`run_dir`: where events.jsonl and logs/ go; None for a temporary one. `nodes`: specs of nodes that need
        more than a name; others are made as actors ask for them."""
        self._given_dir = run_dir
        self.run_dir: Path
        """Where events.jsonl and logs/ are."""
        self.failed: asyncio.Future[None]
        """Raises RestartBudgetExceeded or LaunchError when the system can't go on."""
        self.restarts: Counter[str] = Counter()
        """Restarts by actor."""
        self._specs = dict(nodes or {})
        self._seed = seed
        self._nodes: dict[str, _NodeState] = {}
        self._children: dict[str, _Child] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopping = False

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
        address = self._address(ROOT, 1)
        self.node = Node(f"{ROOT}#1", address, self.events)
        self._nodes[ROOT] = _NodeState(NodeSpec(name=ROOT), 1, self.node.key, address, ready=True)
        self._agent = NodeAgent()
        self._agent.done.add_done_callback(self._on_agent_done)
        actor = _Root()
        actor.system = self
        for host, name in ((self._agent, f"$node@{ROOT}"), (actor, "$root")):
            await self._agent.host(self.node, host, name, 1).up
        self._publish(self._root_status(), agent_status(self.node.key))

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
        return {ROOT: os.getpid(), **{n: s.process.pid for n, s in self._nodes.items() if s.process is not None}}

    async def spawn(self, actor: Actor, *, name: str, node: str = ROOT, policy: RestartPolicy | None = None) -> Ref:
        """Starts an actor in a node and returns its ref when its `start` has returned.

        Its fields travel to the node; its class must be importable there. Raises what `start` raised, or LaunchError.
        If the node dies meanwhile, the supervisor decides as it does later on, and this waits for what comes of it.
        """
        if name in self._children:
            raise ValueError(f"an actor named {name!r} is running; names are unique")
        _check_name("actor", name, "_/")
        _check_name("node", node, "_-")
        kind = type(actor)
        if "." in kind.__qualname__ or (node != ROOT and kind.__module__ == "__main__"):
            raise ValueError(
                f"{kind.__module__}.{kind.__qualname__} can't be found by the process of node {node!r}: "
                "define actor classes at the top level of a module that can be imported"
            )
        budget = RestartBudget(name, policy or RestartPolicy(), self._seed)
        child = self._children[name] = _Child(actor, name, node, budget)
        try:
            self._set_status(child, "starting", "")
            await self._ensure_node(node)
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
        self._publish(Status(name=name, node="", state="starting", incarnation=0, **interface_of(kind)))

    async def stop(self, reason: str = "orderly stop") -> None:
        """Stops all nodes, in parallel: asks, waits a bounded time, terminates, kills. Safe to call twice."""
        if self._stopping:
            return
        self._stopping = True
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(self._stop_node(state) for state in self._nodes.values() if state.process))
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

    async def _ensure_node(self, name: str) -> None:
        state = self._nodes.get(name)
        if state is None:
            state = self._nodes[name] = _NodeState(self._specs.get(name) or NodeSpec(name=name))
        async with state.starting:
            if not state.ready:
                await self._start_node(state)

    async def _start_node(self, state: _NodeState) -> None:
        if self._stopping:
            raise LaunchError(f"node {state.spec.name} was not started: the system is stopping")
        name = state.spec.name
        state.incarnation += 1
        state.key = f"{name}#{state.incarnation}"
        state.address = self._address(name, state.incarnation)
        state.hello = asyncio.get_running_loop().create_future()
        root = self._nodes[ROOT]
        spec = pack_spec(
            key=state.key, name=name, incarnation=state.incarnation, address=state.address, parent=os.getpid(),
            root_key=root.key, root_address=root.address, statuses=[self._root_status(), agent_status(state.key)],
            path=[p for p in sys.path if p],
        )  # fmt: skip
        state.process = process = start_process(state.spec, spec, self.run_dir / "logs" / f"{name}.log")
        self.events.write("node_start", node=name, pid=process.pid, incarnation=state.incarnation)
        ends: list[asyncio.Future[Any]] = [state.hello, process.exited]
        done, _ = await asyncio.wait(ends, timeout=HELLO_S, return_when=asyncio.FIRST_COMPLETED)
        if state.hello not in done:
            why = process.exited.result() if done else f"no hello within {HELLO_S:g} s"
            process.kill()
            raise LaunchError(f"node {name} did not start: {why}\n{process.log_tail()}".rstrip())
        # Only now its socket is surely bound.
        self.node.transport.connect(state.key, state.address)
        addresses = {s.key: s.address for s in self._nodes.values() if s.ready and s.key != root.key}
        self._broadcast([agent_status(state.key)], {state.key: state.address}, {})
        state.ready = True
        self.node.directory.update(agent_status(state.key))
        self.find(f"$node@{name}").update.cast(self.node.directory.all(), addresses, {})
        self._task(self._watch_node(state, process))

    def _on_hello(self, key: str) -> None:
        for state in self._nodes.values():
            if state.key == key and state.hello is not None and not state.hello.done():
                state.hello.set_result(None)

    async def _watch_node(self, state: _NodeState, process: NodeProcess) -> None:
        reason = await asyncio.shield(process.exited)
        name, state.ready = state.spec.name, False
        self.events.write("node_exit", node=name, pid=process.pid, reason=reason, log=process.log_tail()[-500:])
        self.node.peer_down(state.key, reason)
        residents = [c for c in self._children.values() if c.node == name]
        statuses = [self._status(c, "down", f"its node was {reason}") for c in residents]
        statuses.append(agent_status(state.key, "down"))
        for status in statuses:
            self.node.directory.update(status)
        self._broadcast(statuses, {}, {state.key: reason})
        for task in (state.revival, *(c.restart for c in residents)):
            if task is not None:
                task.cancel()
        state.revival = self._task(self._revive(state, residents, reason))

    async def _revive(self, state: _NodeState, residents: list[_Child], reason: str) -> None:
        """Starts a dead node again with its actors; if it dies while it starts, as often as their budgets allow."""
        while True:
            delays = [(child, self._delay(child, reason)) for child in residents]
            residents = [child for child, delay in delays if delay is not None]
            if not residents:
                return
            await asyncio.sleep(max(delay for _, delay in delays if delay is not None))
            try:
                await self._ensure_node(state.spec.name)
            except LaunchError as error:
                reason = str(error)
                self.events.write("node_start_failed", node=state.spec.name, reason=reason)
            else:
                break
        for child in residents:
            child.restart = self._task(self._restart(child, 0.0, reason))

    async def _stop_node(self, state: _NodeState) -> None:
        process = state.process
        assert process is not None
        if not process.exited.done() and state.ready:
            try:
                async with asyncio.timeout(STOP_NODE_S):
                    await self.find(f"$node@{state.spec.name}").shutdown()
                    await asyncio.shield(process.exited)
            except (RuntimeFault, TimeoutError) as error:
                self.events.write("node_stop_late", node=state.spec.name, reason=str(error))
        for number in (signal.SIGTERM, signal.SIGKILL):
            if process.exited.done():
                return
            process.kill(number)
            await asyncio.wait([process.exited], timeout=TERMINATE_S)

    # Actors -------------------------------------------------------------------------------------------------

    async def _start(self, child: _Child) -> None:
        child.incarnation += 1
        node = self._nodes[child.node]
        self._set_status(child, "starting", "")
        kind = type(child.actor)
        path = f"{kind.__module__}:{kind.__qualname__}"
        fields = {f.name: getattr(child.actor, f.name) for f in dataclasses.fields(child.actor) if f.init}  # type: ignore[arg-type]
        agent = self.find(f"$node@{child.node}")
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
        if child is None or self._stopping or incarnation != child.incarnation:
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
        self.restarts[child.name] += 1
        self.events.write("actor_restart", actor=child.name, restart=self.restarts[child.name], reason=reason)
        try:
            await self._start(child)
        except RuntimeFault as error:
            if not self._nodes[child.node].ready:
                return  # Its node died meanwhile, and comes back with all its actors.
            trace = error.remote_traceback if isinstance(error, RemoteError) else ""
            self._on_actor_ended(child.name, child.incarnation, ["did not start", _first_line(error), trace])

    def _status(self, child: _Child, state: Any, reason: str) -> Status:
        node = self._nodes.get(child.node)
        return Status(
            name=child.name, node=node.key if node is not None else "", state=state, incarnation=child.incarnation,
            reason=reason, **interface_of(type(child.actor)),
        )  # fmt: skip

    def _set_status(self, child: _Child, state: Any, reason: str) -> None:
        self._publish(self._status(child, state, reason))

    # Telling everybody --------------------------------------------------------------------------------------

    def _publish(self, *statuses: Status) -> None:
        for status in statuses:
            self.node.directory.update(status)
        self._broadcast(list(statuses), {}, {})

    def _broadcast(self, statuses: list[Status], addresses: dict[str, str], dead: dict[str, str]) -> None:
        for name, state in self._nodes.items():
            if name != ROOT and state.ready:
                self.find(f"$node@{name}").update.cast(statuses, addresses, dead)

    def _root_status(self) -> Status:
        return Status(name="$root", node=self.node.key, state="up", incarnation=1, **interface_of(_Root))

    def _fail(self, error: BaseException) -> None:
        if not self.failed.done():
            self.events.write("system_failed", reason=_first_line(error))
            self.failed.set_exception(error)

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

    def _address(self, name: str, incarnation: int) -> str:
        path = self._scratch / f"{name}-{incarnation}"
        if len(str(path).encode()) > MAX_IPC_PATH_BYTES:
            raise LaunchError(
                f"socket path {path} is longer than {MAX_IPC_PATH_BYTES} bytes: set TMPDIR to a shorter one"
            )
        return f"ipc://{path}"


def _check_name(what: str, name: str, marks: str) -> None:
    """Names appear in logs, paths and configuration keys."""
    if not name.isascii() or not all(part.isalnum() for part in re.split(f"[{marks}]", name.strip("_"))):
        raise ValueError(f"{what} name {name!r}: use letters, digits and {' '.join(marks)}")


def _first_line(error: BaseException) -> str:
    """What happened, without the remote traceback."""
    return str(error.args[0] if isinstance(error, RemoteError) else error) or type(error).__name__
