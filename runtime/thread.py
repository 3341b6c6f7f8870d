"""The one thread on which an actor computes, so that the loop of its node keeps answering.

Work runs in the order it was given. A thread can't be interrupted, so a cancelled wait ends only when its work does:
until then nothing else may touch the actor. It is a daemon: work that never ends does not hold up the end of the
process. Knows nothing of actors.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")
_Work = tuple["Future[Any]", Callable[..., Any], tuple[Any, ...]]


class WorkThread:
    """Runs functions one after the other."""

    def __init__(self, name: str) -> None:
        self._queue: SimpleQueue[_Work | None] = SimpleQueue()
        threading.Thread(target=_run, args=(self._queue,), name=name, daemon=True).start()

    async def run(self, function: Callable[..., T], *args: Any) -> T:
        """The result of `function(*args)`. Cancelled before the work has begun, it never begins."""
        work: Future[T] = Future()
        self._queue.put((work, function, args))
        done = asyncio.wrap_future(work)
        try:
            return await asyncio.shield(done)
        except asyncio.CancelledError:
            if not work.cancel():
                await _settled(done)
            raise

    def close(self) -> None:
        """Ends the thread after what has been given to it."""
        self._queue.put(None)


def _run(queue: SimpleQueue[_Work | None]) -> None:
    while (item := queue.get()) is not None:
        work, function, args = item
        if work.set_running_or_notify_cancel():
            try:
                result = function(*args)
            except StopIteration as stop:
                # A future refuses it, and whoever awaits that future would wait for ever.
                refused = RuntimeError("StopIteration left a function on the actor's thread")
                refused.__cause__ = stop
                work.set_exception(refused)
            except BaseException as error:  # noqa: BLE001 (the edge of a thread: whoever waits gets it)
                work.set_exception(error)
            else:
                work.set_result(result)
                del result
        del item, work, function, args  # An idle thread keeps no arrays alive.


async def _settled(done: asyncio.Future[Any]) -> None:
    while not done.done():
        try:
            await asyncio.wait([done])
        except asyncio.CancelledError:
            continue
    if not done.cancelled():
        done.exception()
