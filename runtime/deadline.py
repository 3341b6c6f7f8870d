"""Deadlines that travel: `async with timeout(5):` bounds the block, every call in it, and what those calls call.

Plain `asyncio.timeout` works too (the callee is cancelled with the caller), but its time does not travel, since asyncio does
not show it to the code inside.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from contextvars import ContextVar

current_deadline: ContextVar[float | None] = ContextVar("headrace_deadline", default=None)
"""Loop time by which the current message must be answered, or None."""


@asynccontextmanager
async def timeout(seconds: float) -> AsyncIterator[asyncio.Timeout]:
    """Like `asyncio.timeout(seconds)`, and the time left travels with every call made inside. Raises TimeoutError."""
    when = asyncio.get_running_loop().time() + seconds
    outer = current_deadline.get()
    token = current_deadline.set(when if outer is None else min(when, outer))
    try:
        async with asyncio.timeout_at(when) as scope:
            yield scope
    finally:
        current_deadline.reset(token)
