"""Carries out what the supervision tree decides: one task for each child that is starting or stopping.

    spawn, an end, a node's death -> Supervisor -> Start | Stop | Retire | GiveUp -> Hosts -> up | ended -> Supervisor

Knows nothing of processes, messages or sockets: `Hosts` does, and tests have one without any.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

from .actor import Actor
from .errors import ActorDied, LaunchError, RemoteError, RuntimeFault
from .events import EventLog
from .exits import Exit
from .strategy import Action, GiveUp, NewEpoch, Retire, Start, Stop, Supervisor
from .supervisor import RestartPolicy


@dataclass(eq=False)
class Member:
    """A supervised actor."""

    name: str
    actor: Actor
    node: str
    policy: RestartPolicy
    group: str
    incarnation: int = 0
    epoch: int = 1
    """Of its group, when it was started."""
    restarted: bool = False
    """It has been started more than once."""
    first: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    """Done when it was up for the first time; carries why that will never be."""
    retired: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    """Done when it is down for good."""
    task: asyncio.Task[None] | None = None
    """What starts or stops it; at most one at a time."""


class Hosts(Protocol):
    """Where members live."""

    async def open(self, node: str) -> None:
        """Makes sure that a node runs. Raises LaunchError."""

    async def start(self, member: Member) -> None:
        """Starts its next incarnation in its node. Raises RuntimeFault or TimeoutError."""

    async def stop(self, member: Member, why: Exit) -> None:
        """Returns when it runs no more, in a bounded time: asks, waits, kills its node."""

    def tell(self, member: Member, state: Any, why: Exit | None) -> None:
        """Tells everybody its state."""


class Children:
    """The members of a system. `start_task` runs work that must not fail; `on_failed` gets the end of all hope."""

    def __init__(
        self,
        hosts: Hosts,
        supervisor: Supervisor,
        events: EventLog,
        start_task: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]],
        on_failed: Callable[[BaseException], None],
    ) -> None:
        self.table: dict[str, Member] = {}
        self.restarts: Counter[str] = Counter()
        """By actor."""
        self.supervisor = supervisor
        self._hosts = hosts
        self._events = events
        self._start_task = start_task
        self._on_failed = on_failed
        self._loop = asyncio.get_running_loop()
        self._openings: dict[str, asyncio.Task[None]] = {}
        self._turn: asyncio.Handle | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False

    async def spawn(self, member: Member) -> None:
        """Adds a member and waits until it is up. Raises what its first start raised; then it is none any more.

        If its node dies meanwhile, the supervisor decides as it does later on, and this waits for what comes of it.
        """
        self.table[member.name] = member
        self.supervisor.add(member.name, member.policy, member.group, self._loop.time())
        self._hosts.tell(member, "starting", None)
        self._soon()
        try:
            await member.first
        except BaseException as error:
            self._drop(member, error)
            raise

    async def dismiss(self, names: Iterable[str], why: Exit) -> None:
        """Has these members stopped, in parallel; returns when they run no more and are none."""
        leaving = [self.table[name] for name in names if name in self.table]
        self.supervisor.dismiss([member.name for member in leaving], why)
        self._soon()
        await asyncio.gather(*(member.retired for member in leaving))
        for member in leaving:
            if self.table.get(member.name) is member:
                del self.table[member.name]
                self.supervisor.remove(member.name)

    def ended(self, name: str, incarnation: int, why: Exit) -> None:
        """An actor has ended by itself or failed, says its node."""
        member = self.table.get(name)
        if member is None or self._closed or incarnation != member.incarnation:
            return
        state = self.supervisor.children[name].state
        if state not in ("starting", "up"):
            return  # It was asked to stop, and `_stop` sees its end.
        if state == "starting" and member.task is not None:
            member.task.cancel()  # It was up: this report has overtaken the answer.
        self._is_up(member)
        self._note_exit(member, why)
        self._failed([member], why)

    def restart(self, name: str, why: Exit) -> None:
        """Stops a member in good order and starts it again, with those that share its fate. It counts as no failure.
        Raises ValueError if it is never restarted."""
        if self._closed:
            raise ValueError("the system is stopping")
        self.supervisor.restart(name, why, self._loop.time())
        self._soon()

    def node_died(self, node: str, why: Exit) -> list[Member]:
        """All that lived there have ended. Returns them: the caller tells everybody."""
        residents = [member for member in self.table.values() if member.node == node]
        for member in residents:
            if member.task is not None:
                member.task.cancel()
        if not self._closed:
            self.supervisor.ended([member.name for member in residents], why, self._loop.time())
            self._soon()
        return residents

    def waits(self) -> list[dict[str, Any]]:
        """What the supervisor itself waits for, as Waits.rows says it."""
        return [
            {"owner": "supervisor", "target": name, "method": "start", "why": why, "left_s": round(max(left, 0.0), 3)}
            for name, why, left in self.supervisor.waiting(self._loop.time())
        ]

    def close(self) -> None:
        """Decides nothing any more; whoever waits for a first start is told."""
        self._closed = True
        for handle in (self._turn, self._timer):
            if handle is not None:
                handle.cancel()
        self._disappoint(ActorDied("the system is stopping"))

    # Doing what was decided ---------------------------------------------------------------------------------

    def _soon(self) -> None:
        """Decides in the loop's next turn, when all that happens in this one is known."""
        if self._turn is None and not self._closed:
            self._turn = self._loop.call_soon(self._decide)

    def _decide(self) -> None:
        self._turn = None
        now = self._loop.time()
        for action in self.supervisor.decide(now):
            self._do(action)
        if self._timer is not None:
            self._timer.cancel()
        due = self.supervisor.due(now)
        self._timer = None if due is None else self._loop.call_at(due, self._soon)

    def _do(self, action: Action) -> None:
        match action:
            case Start(name, epoch, why):
                member = self.table[name]
                member.epoch = epoch
                member.task = self._start_task(self._start(member, why))
            case Stop(name, why):
                member = self.table[name]
                self._hosts.tell(member, "down", why)
                member.task = self._start_task(self._stop(member, member.task, why))
            case Retire(name, why):
                member = self.table[name]
                self._hosts.tell(member, "stopped", why)
                self._fail_first(member, ActorDied(f"{name} did not start and stays down: {why}"))
                self._is_retired(member)
            case NewEpoch(group, epoch, why):
                self._events.write("group_restart", group=group, epoch=epoch, reason=why.detail)
            case GiveUp(error):
                self._disappoint(error)
                self._on_failed(error)

    async def _start(self, member: Member, why: Exit | None) -> None:
        """`why` it is started again; None for the first time, whose failure is its spawner's to repair."""
        member.restarted = why is not None
        opening = self._openings.get(member.node)
        if opening is None:
            opening = self._openings[member.node] = self._start_task(self._open(member.node))
            opening.add_done_callback(lambda _: self._openings.pop(member.node))
        await asyncio.shield(opening)
        if why is not None:
            self.restarts[member.name] += 1
            restart = self.restarts[member.name]
            self._events.write("actor_restart", actor=member.name, restart=restart, reason=why.detail)
        try:
            await self._hosts.start(member)
        except (RuntimeFault, TimeoutError) as error:
            if not member.restarted and not member.first.done():
                self._drop(member, error)
                return
            trace = error.remote_traceback if isinstance(error, RemoteError) else ""
            exit = Exit(kind="exception", detail=f"did not start: {first_line(error)}", traceback=trace)
            self._note_exit(member, exit)
            self._failed([member], exit)
            return
        if self.supervisor.children[member.name].state == "starting":
            self.supervisor.up(member.name)
            self._is_up(member)
            self._soon()

    async def _open(self, node: str) -> None:
        """Opens a node for all that are to start there. If something killed it, it is tried again, as often as their
        budgets allow; if it can't start, that is the error of those who spawn there for the first time."""
        try:
            await self._hosts.open(node)
        except LaunchError as error:
            self._events.write("node_start_failed", node=node, reason=str(error))
            killed = error.exit is not None and error.exit.kind != "exit_code"
            again = []
            for member in [m for m in self.table.values() if m.node == node and self._state(m) == "starting"]:
                if member.task is not None:
                    member.task.cancel()
                if killed or member.restarted or member.first.done():
                    again.append(member)
                else:
                    self._drop(member, error)
            kind = "lost" if error.exit is None else error.exit.kind
            self._failed(again, Exit(kind=kind, detail=f"did not start: {first_line(error)}"))

    async def _stop(self, member: Member, earlier: asyncio.Task[None] | None, why: Exit) -> None:
        if earlier is not None and not earlier.done():
            earlier.cancel()
            await asyncio.wait([earlier])
        await self._hosts.stop(member, why)
        if self.table.get(member.name) is member:
            self.supervisor.ended([member.name], why, self._loop.time())
            self._soon()

    def _failed(self, members: list[Member], why: Exit) -> None:
        for member in members:
            self._hosts.tell(member, "down", why)
        self.supervisor.ended([member.name for member in members], why, self._loop.time())
        self._soon()

    def _note_exit(self, member: Member, why: Exit) -> None:
        self._events.write(
            "actor_exit", actor=member.name, incarnation=member.incarnation,
            kind=why.kind, reason=why.detail, traceback=why.traceback,
        )  # fmt: skip

    def _drop(self, member: Member, error: BaseException) -> None:
        """A member that never was up is none."""
        if self.table.get(member.name) is not member:
            return
        del self.table[member.name]
        stopping = self._state(member) == "stopping"
        self.supervisor.remove(member.name)
        if member.task is not None and member.task is not asyncio.current_task() and not stopping:
            member.task.cancel()
        if not self._closed:
            why = Exit(kind="exception", detail=f"did not start: {first_line(error)}")
            self._hosts.tell(member, "stopped", why)
        self._fail_first(member, error)
        self._is_retired(member)
        self._soon()

    def _state(self, member: Member) -> str:
        return self.supervisor.children[member.name].state

    def _is_up(self, member: Member) -> None:
        if not member.first.done():
            member.first.set_result(None)

    def _is_retired(self, member: Member) -> None:
        if not member.retired.done():
            member.retired.set_result(None)

    def _fail_first(self, member: Member, error: BaseException) -> None:
        if not member.first.done():
            member.first.set_exception(error)
            member.first.exception()  # Its spawner may have given up.

    def _disappoint(self, error: BaseException) -> None:
        for member in list(self.table.values()):
            self._fail_first(member, error)


def first_line(error: BaseException) -> str:
    """What happened, without the remote traceback; of a `start` that raised, only what it raised."""
    text = str(error.args[0] if isinstance(error, RemoteError) else error)
    return text.partition(".spawn raised ")[2] or text or type(error).__name__
