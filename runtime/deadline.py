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

GRACE_S = 0.005
"""A call gives up so much earlier than the block around it: its error says who waited for whom."""

_limit: ContextVar[float | None] = ContextVar("headrace_limit", default=None)
_chosen: ContextVar[bool] = ContextVar("headrace_chosen", default=False)


def set_limit(limit: float | None) -> None:
    """From here on this task works on a message that must be answered by `limit` (loop time), or on none."""
    _limit.set(limit)
    _chosen.set(False)


def unlimited() -> Context:
    """The present context for work that outlives the message it was started by, and so has none of its deadline."""
    context = contextvars.copy_context()
    context.run(set_limit, None)
    return context


def deadline_of_call(now: float, own_s: float) -> float:
    """When a call made at `now` is given up. A `timeout` block decides; without one, whatever comes first of the call's
    own default `own_s` and the limit of the message that is being worked on."""
    limit = _limit.get()
    if limit is None:
        return now + own_s
    return limit if _chosen.get() else min(now + own_s, limit)


@asynccontextmanager
async def timeout(seconds: float) -> AsyncIterator[None]:
    """Like `asyncio.timeout(seconds)`, and the time left travels with every call made inside, instead of the calls' own
    defaults. Raises TimeoutError; a call inside raises DeadlineExceeded, which is one."""
    loop = asyncio.get_running_loop()
    when = loop.time() + seconds
    outer = _limit.get()
    limit = _limit.set(when if outer is None else min(when, outer))
    chosen = _chosen.set(True)
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
        _limit.reset(limit)
        _chosen.reset(chosen)
