"""The first step of a handler, outside of the task that is to run it.

    coroutine.send(None) -> its value                     most handlers end at once, and need no task switch
                         '> Begun -> `await begun` in the task: goes on where it waits, or raises what it raised

asyncio's tasks begin a coroutine by themselves, a turn of the loop later. Python 3.12 has eager tasks for this; here
the task exists already, since an actor has one for all its turns. Knows nothing of messages.
"""

from __future__ import annotations

import asyncio
from asyncio.tasks import _current_tasks  # type: ignore[attr-defined]
from asyncio.tasks import _enter_task as enter_task
from asyncio.tasks import _leave_task as leave_task
from collections.abc import Callable, Coroutine, Generator
from typing import Any, cast

__all__ = ["Begun", "current_task", "enter_task", "leave_task"]

current_task = cast("Callable[[asyncio.AbstractEventLoop], asyncio.Task[Any] | None]", _current_tasks.get)
"""asyncio.current_task, which is written in Python before 3.12, without its checks."""


class Begun:
    """A coroutine after its first step. To be awaited once."""

    __slots__ = ("_error", "_waits_for", "_work")

    def __init__(
        self, work: Coroutine[Any, Any, Any] | None, waits_for: Any, error: BaseException | None = None
    ) -> None:
        """`waits_for`: what it has yielded: a future, or None. Without `work`, it has ended by `error`."""
        self._work = work
        self._waits_for = waits_for
        self._error = error

    def cancel(self, error: asyncio.CancelledError) -> None:
        """The task was cancelled before it went on with it: as if it had waited already. What has ended, has ended."""
        if self._work is not None and (self._waits_for is None or not self._waits_for.cancel()):
            self._error = error

    def __await__(self) -> Generator[Any, Any, Any]:
        work, waits_for, error = self._work, self._waits_for, self._error
        self._waits_for = self._error = None
        if work is None:
            assert error is not None
            raise error
        try:
            while True:
                try:
                    if error is not None:
                        raise error
                    sent = yield waits_for
                except BaseException as thrown:  # noqa: BLE001 (whatever it is, it is meant for the coroutine)
                    error = None
                    waits_for = work.throw(thrown)
                else:
                    waits_for = work.send(sent)
        except StopIteration as end:
            return end.value
