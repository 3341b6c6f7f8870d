"""Deadlines that travel: `async with timeout(5):` bounds the block, every call in it, and what those calls call.

Plain `asyncio.timeout` works too (the callee is cancelled with the caller), but its time does not travel, since
asyncio does not show it to the code inside.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from contextvars import Context, ContextVar
from dataclasses import dataclass
from typing import Protocol

GRACE_S = 0.005
"""A call gives up so much earlier than the block around it: its error says who waited for whom."""


class Scope(Protocol):
    """What a task works on: a message, or a `timeout` block."""

    limit: float
    """Loop time by which it must be done; inf for none."""
    chosen: bool
    """The limit was set by a block around the call, and so replaces the call's own default."""

    @property
    def owner(self) -> str:
        """Who works, for those who ask who waits: `actor.method`, or "" outside an actor."""


@dataclass(slots=True)
class _Block:
    limit: float
    owner: str
    chosen: bool = True


_scope: ContextVar[Scope | None] = ContextVar("headrace_scope", default=None)

current_scope = _scope.get
"""The scope of the code that runs now, or None."""

enter = _scope.set
"""From here on this task works on something else."""


def unlimited() -> Context:
    """The present context for work that outlives the message it was started by, and so has none of its deadline."""
    context = contextvars.copy_context()
    context.run(_scope.set, None)
    return context


def deadline_of_call(scope: Scope | None, now: float, own_s: float) -> float:
    """When a call made at `now` is given up. A `timeout` block decides; without one, whatever comes first of the call's
    own default `own_s` and the limit of the message that is being worked on."""
    if scope is None:
        return now + own_s
    return scope.limit if scope.chosen else min(now + own_s, scope.limit)


@asynccontextmanager
async def timeout(seconds: float) -> AsyncIterator[None]:
    """Like `asyncio.timeout(seconds)`, and the time left travels with every call made inside, instead of the calls' own
    defaults. Raises TimeoutError; a call inside raises DeadlineExceeded, which is one."""
    loop = asyncio.get_running_loop()
    when = loop.time() + seconds
    outer = _scope.get()
    block = _Block(when, "") if outer is None else _Block(min(when, outer.limit), outer.owner)
    entered = _scope.set(block)
    scope = asyncio.timeout(None)
    try:
        async with scope:
            # Not the scope's own timer: on a busy loop both are due in one turn, and the call's error would be lost.
            timer = loop.call_at(when + GRACE_S, scope.reschedule, when)
            try:
                yield
            finally:
                timer.cancel()
    finally:
        _scope.reset(entered)
