"""Who in this node waits for an answer of whom, for which message, since when and until when.

    begin -> [asked: a message went to a node] -> answered | failed (its node died) | too late
                                              '-> withdrawn -> acknowledged | its node died | nobody acknowledged

One timer serves all: it is set to the earliest deadline, and looks through the table when that has come. Knows nothing
of sockets or cells.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import Callable
from math import inf
from typing import Any, TypeVar

from .deadline import Scope, current_scope, deadline_of_call
from .errors import ActorDied, DeadlineExceeded, RuntimeFault
from .protocol import STREAM_WINDOW, Kind, unpack_error
from .turns import current_task

ACKNOWLEDGE_S = 10.0
"""Time that a callee has to say that it has stopped; then the wait is written off, counted and logged."""

_TICK_S = 0.0005
"""Timers may be early by so much."""


class Pending:
    """Somebody here waits for the answer of a call."""

    node: str = ""
    """Key of the node that was asked; "" as long as nothing was sent."""
    bulk: bool = False
    """The message went by the way of large ones."""
    withdrawn: bool = False
    """Given up; the callee was told, and has not acknowledged."""

    def __init__(
        self,
        id: int,
        target: str,
        method: str,
        worker: Scope | asyncio.Task[Any] | None,
        since: float,
        deadline: float,
        future: asyncio.Future[Any],
    ) -> None:
        self.id = id
        self.target = target
        self.method = method
        self.worker = worker
        self.since = since
        self.deadline = deadline
        self.future = future
        """The answer of a call; for a stream, done when there is something new."""

    @property
    def owner(self) -> str:
        """Who waits: an actor's message, or the name of a task."""
        worker = self.worker
        return worker.get_name() if isinstance(worker, asyncio.Task) else worker.owner if worker is not None else ""

    def __str__(self) -> str:
        return f"{self.owner or 'this program'} waits for {self.target}.{self.method}"

    def settle(self, error: RuntimeFault) -> None:
        """Ends the wait with an error."""
        if not self.future.done():
            self.future.set_exception(error)

    def resolve(self, kind: int, number: int, value: Any, size: int) -> bool:
        """Takes an answer; True if it was the last."""
        if kind == Kind.ERROR:
            self.settle(unpack_error(f"{self.target}.{self.method}", value))
        elif not self.future.done():
            self.future.set_result(value)
        return True


class PendingStream(Pending):
    """Somebody here waits for the items of a stream. They may come in another order than they were sent in, since large
    ones travel apart."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.items: deque[tuple[Any, int]] = deque()
        """What has come and was not consumed, with its bytes."""
        self.end: RuntimeFault | bool | None = None
        """True when it ended well, its error if not."""
        self._arrived = 0
        self._early: dict[int, tuple[int, Any, int]] = {}

    def settle(self, error: RuntimeFault) -> None:
        self.end = self.end or error
        self._wake()

    def resolve(self, kind: int, number: int, value: Any, size: int) -> bool:
        if number >= self._arrived and len(self._early) <= STREAM_WINDOW:
            self._early[number] = kind, value, size
        while self.end is None and (answer := self._early.pop(self._arrived, None)) is not None:
            kind, value, size = answer
            if kind == Kind.ERROR:
                self.end = unpack_error(f"{self.target}.{self.method}", value)
            elif kind == Kind.ITEM:
                self.items.append((value, size))
                self._arrived += 1
            else:
                self.end = True
        self._wake()
        return self.end is not None

    def _wake(self) -> None:
        if not self.future.done():
            self.future.set_result(None)


P = TypeVar("P", bound=Pending)


class Waits:
    """The table. `state_of(target)`: what the directory says of an actor. `overdue(pending)` is called once its
    deadline has passed, after it was sent."""

    def __init__(self, state_of: Callable[[str], str], overdue: Callable[[Pending], None]) -> None:
        self.table: dict[int, Pending] = {}
        self._state_of = state_of
        self._overdue = overdue
        self._loop = asyncio.get_running_loop()
        self._ids = itertools.count(1)
        self._timer: asyncio.TimerHandle | None = None
        self._due = inf

    def next_id(self) -> int:
        """Of a message that nobody waits for."""
        return next(self._ids)

    def begin(self, kind: type[P], target: str, method: str, own_s: float) -> P:
        """`own_s`: the message's default deadline in seconds."""
        loop = self._loop
        now, scope, id = loop.time(), current_scope(), next(self._ids)
        if scope is None:
            pending = kind(id, target, method, current_task(loop), now, now + own_s, loop.create_future())
        else:
            due = deadline_of_call(scope, now, own_s)
            pending = kind(id, target, method, scope, now, due, loop.create_future())
        self.table[id] = pending
        return pending

    def asked(self, pending: Pending, node: str, bulk: bool = False) -> None:
        """The message is under way, or handed over."""
        pending.node, pending.bulk = node, bulk
        if pending.deadline < self._due:
            self._set_timer(pending.deadline)

    async def more(self, pending: PendingStream, patience: float) -> None:
        """Waits until there is something new, at most `patience` seconds."""
        pending.future = self._loop.create_future()
        pending.since = self._loop.time()
        pending.deadline = pending.since + patience
        if pending.deadline < self._due:
            self._set_timer(pending.deadline)
        try:
            await pending.future
        finally:
            if not pending.withdrawn:
                pending.deadline = inf

    def withdraw(self, pending: Pending) -> None:
        """Its caller has gone, and its callee was told to stop."""
        pending.withdrawn = True
        pending.since = self._loop.time()
        pending.deadline = pending.since + ACKNOWLEDGE_S
        if pending.deadline < self._due:
            self._set_timer(pending.deadline)

    def fail(self, reason: str, *, node: str | None = None) -> None:
        """Ends all waits for a node, or all there are."""
        for pending in list(self.table.values()):
            if node is None or pending.node == node:
                del self.table[pending.id]
                if not pending.withdrawn:
                    pending.settle(ActorDied(f"{pending}, but {reason}"))

    def too_late(self, pending: Pending) -> DeadlineExceeded:
        what = "no item" if isinstance(pending, PendingStream) else "no answer"
        waited = self._loop.time() - pending.since
        return DeadlineExceeded(
            f"{pending}: {what} within {waited:.3g} s ({self._why(pending)}); "
            "if it needs longer, ask inside `async with timeout(seconds)`"
        )

    def rows(self) -> list[dict[str, Any]]:
        """One row per wait; times in seconds from now."""
        now = self._loop.time()
        return [
            {
                "owner": pending.owner, "target": pending.target, "method": pending.method, "why": self._why(pending),
                "waited_s": round(now - pending.since, 3), "left_s": round(pending.deadline - now, 3),
            }
            for pending in self.table.values()
            if pending.deadline < inf  # Else it is a stream whose consumer is at work.
        ]  # fmt: skip

    def close(self) -> None:
        """Ends all waits, and the timer."""
        self.fail("this node is closing")
        if self._timer is not None:
            self._timer.cancel()

    def _set_timer(self, due: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._due = due
        self._timer = self._loop.call_at(due, self._sweep)

    def _sweep(self) -> None:
        now = self._loop.time() + _TICK_S
        self._due, self._timer = inf, None
        for pending in [pending for pending in self.table.values() if pending.deadline <= now and pending.node]:
            self._overdue(pending)
        due = min((pending.deadline for pending in self.table.values() if pending.node), default=inf)
        if due < self._due:
            self._set_timer(due)

    def _why(self, pending: Pending) -> str:
        if pending.withdrawn:
            return "cancelled, not yet acknowledged"
        if pending.node:
            return "it has the message"
        state = self._state_of(pending.target)
        return "it is up, but has no room" if state == "up" else f"it is {state}"
