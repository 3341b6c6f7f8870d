"""Threads for calls that may never return: whoever waits for one gives it up in time, and knows that it still runs.

    start(function, *args) -> future, on the loop of the caller          idle: nothing that was started still runs

A thread can't be interrupted. So a call that is given up goes on, its lane is not idle, and what it may still touch
must be left alone: the owner makes another lane, or ends the process. Knows nothing of what is called.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, Protocol

_Work = tuple["Future[Any]", Callable[..., Any], tuple[Any, ...]]


class Lane(Protocol):
    """Runs calls one after the other."""

    @property
    def idle(self) -> bool:
        """Whether every call that was started has returned."""

    def start(self, function: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:
        """The outcome of `function(*args)`, once it has one. To cancel the future is to give the call up."""

    def close(self) -> None:
        """Nothing is started any more."""


class ThreadLane:
    """A daemon thread: a call that never returns does not hold up the end of the process."""

    def __init__(self, name: str) -> None:
        self._queue: SimpleQueue[_Work | None] = SimpleQueue()
        self._started = 0
        self._returned = 0
        threading.Thread(target=self._run, name=name, daemon=True).start()

    @property
    def idle(self) -> bool:
        return self._started == self._returned

    def start(self, function: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:
        work: Future[Any] = Future()
        self._started += 1
        self._queue.put((work, function, args))
        return asyncio.wrap_future(work)

    def close(self) -> None:
        self._queue.put(None)

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            work, function, args = item
            if work.set_running_or_notify_cancel():
                try:
                    result = function(*args)
                except BaseException as error:  # noqa: BLE001 (the edge of a thread: whoever waits gets it)
                    self._returned += 1
                    work.set_exception(error)
                else:
                    self._returned += 1
                    work.set_result(result)
                    del result
            else:
                self._returned += 1
            del item, work, function, args


async def ended(call: asyncio.Future[Any], within_s: float) -> bool:
    """Whether `call` has an outcome, after at most so many seconds."""
    return bool((await asyncio.wait({call}, timeout=max(0.0, within_s)))[0])
