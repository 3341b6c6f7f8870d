"""Who in this node waits for an answer of whom, for which message, since when and until when.

    begin -> [asked: a message went to a node] -> resolve (answers come) | fail (its node died) -> end

Knows nothing of sockets or cells.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .deadline import deadline_of_call
from .errors import ActorDied, DeadlineExceeded, RuntimeFault
from .protocol import Kind, unpack_error


@dataclass(slots=True, eq=False)
class Pending:
    """Somebody here waits for an answer."""

    id: int
    target: str
    method: str
    owner: str
    """Name of the task that waits."""
    since: float
    deadline: float
    node: str = ""
    """Key of the node that was asked; "" as long as nothing was sent."""
    future: asyncio.Future[Any] | None = None
    """For a call: its answer."""
    items: deque[Any] = field(default_factory=deque)
    """For a stream: what has come and was not consumed."""
    arrived: asyncio.Event | None = None
    end: RuntimeFault | bool | None = None
    """For a stream: True when it ended well, its error if not."""

    def __str__(self) -> str:
        return f"{self.owner or 'this program'} waits for {self.target}.{self.method}"

    def settle(self, error: RuntimeFault) -> None:
        """Ends the wait with an error."""
        if self.arrived is not None:
            self.end = self.end or error
            self.arrived.set()
        elif self.future is not None and not self.future.done():
            self.future.set_exception(error)


class Waits:
    """The table. `state_of(target)`: what the directory says of an actor."""

    def __init__(self, state_of: Callable[[str], str]) -> None:
        self._state_of = state_of
        self._loop = asyncio.get_running_loop()
        self._ids = itertools.count(1)
        self._table: dict[int, Pending] = {}

    def next_id(self) -> int:
        """Of a message that nobody waits for."""
        return next(self._ids)

    def begin_call(self, target: str, method: str, own_s: float) -> Pending:
        """`own_s`: the message's default deadline in seconds."""
        pending = self._begin(target, method, own_s)
        pending.future = self._loop.create_future()
        return pending

    def begin_stream(self, target: str, method: str, own_s: float) -> Pending:
        pending = self._begin(target, method, own_s)
        pending.arrived = asyncio.Event()
        return pending

    def end(self, pending: Pending) -> None:
        """Nobody waits any more."""
        del self._table[pending.id]
        future = pending.future
        if future is not None and future.done() and not future.cancelled():
            future.exception()  # An error that comes as the caller gives up is nobody's.

    def get(self, id: int) -> Pending | None:
        return self._table.get(id)

    def resolve(self, pending: Pending, kind: Kind, value: Any) -> None:
        """Takes an answer: REPLY, ERROR, ITEM or END."""
        if kind is Kind.ERROR:
            pending.settle(unpack_error(f"{pending.target}.{pending.method}", value))
        elif pending.arrived is not None:
            if kind is Kind.ITEM:
                pending.items.append(value)
            else:
                pending.end = pending.end or True
            pending.arrived.set()
        elif pending.future is not None and not pending.future.done():
            pending.future.set_result(value)

    def fail(self, reason: str, *, node: str | None = None) -> None:
        """Ends all waits for a node, or all there are."""
        for pending in list(self._table.values()):
            if node is None or pending.node == node:
                pending.settle(ActorDied(f"{pending}, but {reason}"))

    def too_late(self, pending: Pending, what: str) -> DeadlineExceeded:
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
            for pending in self._table.values()
        ]  # fmt: skip

    def _begin(self, target: str, method: str, own_s: float) -> Pending:
        now = self._loop.time()
        task = asyncio.current_task()
        owner = task.get_name() if task is not None else ""
        pending = Pending(next(self._ids), target, method, owner, now, deadline_of_call(now, own_s))
        self._table[pending.id] = pending
        return pending

    def _why(self, pending: Pending) -> str:
        if pending.node:
            return "it has the message"
        state = self._state_of(pending.target)
        return "it is up, but has no room" if state == "up" else f"it is {state}"
