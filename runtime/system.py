"""The root of a system: starts nodes, spawns actors, supervises both, and ends everything in order.

    async with System(run_dir) as system:
        verifier = await system.spawn(Verifier(), name="verifier", node="scorers")
        await verifier.judge(x)

    System (this process, node "root")
      +- node scorers (a process)  --pidfd--> exit seen in milliseconds
      |    +- verifier             --cast---> failure reported
      +- node trainer ...

All supervision decisions are made here, one_for_one: an actor that fails is started again in its node; a node that dies is
started again with all its actors. A budget that is exceeded ends the system: `failed` carries the reason. Knows nothing of
what the actors do.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from .actor import Actor, message
from .agent import NodeAgent, agent_status, pack_spec, specs_of
from .codec import dumps
from .directory import Status
from .errors import LaunchError, RestartBudgetExceeded, RuntimeFault
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


@dataclass(eq=False)
class _NodeState:
    """A node as the root sees it."""

    spec: NodeSpec
    incarnation: int = 0
    key: str = ""
    address: str = ""
    process: NodeProcess | None = None
    hello: asyncio.Future[None] | None = None
    ready: asyncio.Event = field(default_factory=asyncio.Event)


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
        self._scratch = Path(tempfile.mkdtemp(prefix="headrace-"))
        self.run_dir = run_dir or self._scratch
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
        (self.run_dir / "logs").mkdir(parents=True, exist_ok=True)
        self.failed = asyncio.get_running_loop().create_future()
        self.events = EventLog(self.run_dir / "events.jsonl")
        address = self._address(ROOT, 1)
        self.node = Node(f"{ROOT}#1", address, self.events)
        self._nodes[ROOT] = root = _NodeState(NodeSpec(name=ROOT), 1, self.node.key, address)
        root.ready.set()
        self._agent = NodeAgent()
        actor = _Root()
        actor.system = self
        for host, name in ((self._agent, f"$node@{ROOT}"), (actor, "$root")):
            await self._agent.host(self.node, host, name, 1).up
        self._publish(self._root_status(), agent_status(self.node.key))
        self.events.write("system_start", pid=os.getpid(), run_dir=str(self.run_dir))
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: Any, trace: TracebackType | None) -> None:
        await self.stop("orderly stop" if error is None else f"{type(error).__name__}: {error}")

    def find(self, name: str) -> Ref:
        """The ref to an actor by name."""
        return self.node.ref(name)

    def tree(self) -> list[dict[str, Any]]:
        """One row per actor: name, node, pid, state, incarnation, restarts, reason."""
        rows = []
        for child in self._children.values():
            status = self.node.directory.get(child.name)
            process = self._nodes[child.node].process
            rows.append(
                {
                    "name": child.name, "node": child.node, "pid": process.pid if process else os.getpid(),
                    "state": status.state, "incarnation": status.incarnation,
                    "restarts": self.restarts[child.name], "reason": status.reason,
                }
            )  # fmt: skip
        return rows

    def pids(self) -> dict[str, int]:
        """Process id of each node."""
        return {n: s.process.pid if s.process else os.getpid() for n, s in self._nodes.items()}

    async def spawn(
        self, actor: Actor, *, name: str, node: str = ROOT, policy: RestartPolicy | None = None
    ) -> Ref:
        """Starts an actor in a node and returns its ref when its `start` has returned.

        Its fields travel to the node; its class must be importable there. Raises what `start` raised, or LaunchError.
        """
        if name in self._children:
            raise ValueError(f"an actor named {name!r} is running; names are unique")
        if not name.isidentifier() and not all(part.isalnum() for part in name.replace("_", "").split("/")):
            raise ValueError(f"actor name {name!r}: letters, digits, '_' and '/' only")
        budget = RestartBudget(name, policy or RestartPolicy(), self._seed)
        child = self._children[name] = _Child(actor, name, node, budget)
        try:
            await self._ensure_node(node)
            await self._start(child)
        except BaseException as error:
            self._set_status(child, "stopped", f"did not start: {error}")
            del self._children[name]
            raise
        return self.find(name)

    def declare(self, name: str, kind: type[Actor]) -> None:
        """Makes a name known before its actor is spawned: calls to it wait for it instead of failing."""
        self._publish(
            Status(name=name, node="", state="starting", incarnation=0, class_name=kind.__name__, messages=specs_of(kind))
        )

    async def stop(self, reason: str = "orderly stop") -> None:
        """Stops all nodes, in parallel: asks, waits a bounded time, terminates, kills. Safe to call twice."""
        if self._stopping:
            return
        self._stopping = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*(self._stop_node(state) for state in self._nodes.values() if state.process))
        await self._agent.shutdown()
        await self.node.close()
        self.events.write("system_stop", reason=reason)
        self.events.close()
        shutil.rmtree(self._scratch, ignore_errors=True)
        if not self.failed.done():
            self.failed.cancel()

    # Nodes --------------------------------------------------------------------------------------------------

    async def _ensure_node(self, name: str) -> None:
        state = self._nodes.get(name)
        if state is None:
            state = self._nodes[name] = _NodeState(self._specs.get(name) or NodeSpec(name=name))
            await self._start_node(state)
        await state.ready.wait()

    async def _start_node(self, state: _NodeState) -> None:
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
        state.process = start_process(state.spec, spec, self.run_dir / "logs" / f"{name}.log")
        self.events.write("node_start", node=name, pid=state.process.pid, incarnation=state.incarnation)
        self.node.transport.connect(state.key, state.address)
        done, _ = await asyncio.wait(
            [state.hello, state.process.exited], timeout=HELLO_S, return_when=asyncio.FIRST_COMPLETED
        )
        if state.hello not in done:
            why = state.process.exited.result() if done else f"no hello within {HELLO_S:g} s"
            state.process.kill()
            raise LaunchError(f"node {name} did not start: {why}\n{state.process.log_tail()}".rstrip())
        self._task(self._watch_node(state, state.process))
        addresses = {s.key: s.address for s in self._nodes.values() if s.ready.is_set() and s.key != root.key}
        self._broadcast([agent_status(state.key)], {state.key: state.address}, {})
        state.ready.set()
        self.node.directory.update(agent_status(state.key))
        self.find(f"$node@{name}").update.cast(self.node.directory.all(), addresses, {})

    def _on_hello(self, key: str) -> None:
        for state in self._nodes.values():
            if state.key == key and state.hello is not None and not state.hello.done():
                state.hello.set_result(None)

    async def _watch_node(self, state: _NodeState, process: NodeProcess) -> None:
        reason = await process.exited
        if self._stopping:
            return
        state.ready.clear()
        tail = process.log_tail()
        self.events.write("node_exit", node=state.spec.name, pid=process.pid, reason=reason, log=tail[-500:])
        residents = [c for c in self._children.values() if c.node == state.spec.name]
        self.node.peer_down(state.key, reason)
        statuses = [self._set_status(c, "down", f"its node was {reason}", publish=False) for c in residents]
        statuses.append(agent_status(state.key, "down"))
        for status in statuses:
            self.node.directory.update(status)
        self._broadcast(statuses, {}, {state.key: reason})
        try:
            delays = [self._delay(child, reason) for child in residents]
            back = [(c, d) for c, d in zip(residents, delays, strict=True) if d is not None]
            if back:
                await asyncio.sleep(max(delay for _, delay in back))
                await self._start_node(state)
                await asyncio.gather(*(self._restart(child, 0.0, reason) for child, _ in back))
        except RuntimeFault as error:
            self._fail(error)

    async def _stop_node(self, state: _NodeState) -> None:
        process = state.process
        assert process is not None
        if not process.exited.done() and state.ready.is_set():
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
        self._set_status(child, "starting", "")
        kind = type(child.actor)
        path = f"{kind.__module__}:{kind.__qualname__}"
        fields = {f.name: getattr(child.actor, f.name) for f in dataclasses.fields(child.actor) if f.init}  # type: ignore[arg-type]
        agent = self.find(f"$node@{child.node}")
        await agent.spawn(child.name, child.incarnation, path, dumps(fields))
        self._set_status(child, "up", "")
        self.events.write(
            "actor_up", actor=child.name, node=child.node, incarnation=child.incarnation, pid=self.pids()[child.node]
        )

    def _on_actor_ended(self, name: str, incarnation: int, error: list[str] | None) -> None:
        child = self._children.get(name)
        if child is None or self._stopping or incarnation != child.incarnation:
            return
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
            self._task(self._restart(child, delay, reason))

    def _delay(self, child: _Child, reason: str) -> float | None:
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
            if self._stopping or not self._nodes[child.node].ready.is_set():
                return  # Its node died meanwhile, and comes back with all its actors.
            self._on_actor_ended(child.name, child.incarnation, ["start", str(error), ""])

    def _set_status(self, child: _Child, state: Any, reason: str, *, publish: bool = True) -> Status:
        kind = type(child.actor)
        status = Status(
            name=child.name, node=self._nodes[child.node].key, state=state, incarnation=child.incarnation,
            reason=reason, class_name=kind.__name__, messages=specs_of(kind),
        )  # fmt: skip
        if publish:
            self._publish(status)
        return status

    # Telling everybody --------------------------------------------------------------------------------------

    def _publish(self, *statuses: Status) -> None:
        for status in statuses:
            self.node.directory.update(status)
        self._broadcast(list(statuses), {}, {})

    def _broadcast(self, statuses: list[Status], addresses: dict[str, str], dead: dict[str, str]) -> None:
        for name, state in self._nodes.items():
            if name != ROOT and state.ready.is_set():
                self.find(f"$node@{name}").update.cast(statuses, addresses, dead)

    def _root_status(self) -> Status:
        return Status(
            name="$root", node=self.node.key, state="up", incarnation=1, class_name="Root", messages=specs_of(_Root)
        )

    def _fail(self, error: RuntimeFault) -> None:
        self.events.write("system_failed", reason=str(error))
        if not self.failed.done():
            self.failed.set_exception(error)

    def _task(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._task_done)

    def _task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None and not self.failed.done():
            self.failed.set_exception(task.exception())  # type: ignore[arg-type]

    def _address(self, name: str, incarnation: int) -> str:
        # Sockets live in a private directory (mode 0700) with a short path: ipc allows 107 bytes.
        path = self._scratch / f"{name}-{incarnation}"
        if len(str(path).encode()) > MAX_IPC_PATH_BYTES:
            raise LaunchError(f"socket path {path} is longer than {MAX_IPC_PATH_BYTES} bytes: set TMPDIR to a shorter one")
        return f"ipc://{path}"
