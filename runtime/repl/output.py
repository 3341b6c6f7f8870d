"""What the code of a REPL prints inside an actor's process, caught for its user; all other output goes where it went.

The catch follows the context: code that the caught code awaits or runs on the same thread is caught, too. Bounded: what
is not fetched in time is cut. Knows nothing of who reads it.
"""

from __future__ import annotations

import asyncio
import contextvars
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

MAX_CHARS = 256 * 1024
"""Printed and not fetched; beyond, it is thrown away, and that is said."""

_catching: contextvars.ContextVar[Output | None] = contextvars.ContextVar("headrace_output", default=None)


class Output:
    """Text from any thread to one reader on the loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._parts: list[str] = []
        self._size = 0
        self._lost = 0
        self._arrived = asyncio.Event()

    def write(self, text: str) -> int:
        with self._lock:
            room = MAX_CHARS - self._size
            kept = text[: max(0, room)]
            self._lost += len(text) - len(kept)
            self._size += len(kept)
            first = not self._parts
            if kept:
                self._parts.append(kept)
        if first:
            self._loop.call_soon_threadsafe(self._arrived.set)
        return len(text)

    def flush(self) -> None:
        """For those who print with flush=True."""

    def take(self) -> str:
        """All that has come."""
        with self._lock:
            text, lost = "".join(self._parts), self._lost
            self._parts, self._size, self._lost = [], 0, 0
        self._arrived.clear()
        return text + (f"\n[{lost} more characters were printed]\n" if lost else "")

    async def wait(self) -> None:
        """Until something has come."""
        await self._arrived.wait()

    @contextmanager
    def caught(self) -> Iterator[None]:
        """What is printed in this context goes here."""
        _install()
        token = _catching.set(self)
        try:
            yield
        finally:
            _catching.reset(token)


class _Router:
    """Stands in for sys.stdout or sys.stderr."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        output = _catching.get()
        return self._stream.write(text) if output is None else output.write(text)

    def flush(self) -> None:
        if _catching.get() is None:
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _install() -> None:
    """Once for a process: whoever has kept the old stream goes on with it."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, _Router):
            setattr(sys, name, _Router(stream))
