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

    __slots__ = ("_error", "_waits_for", "cr_await")

    def __init__(
        self, work: Coroutine[Any, Any, Any] | None, waits_for: Any, error: BaseException | None = None
    ) -> None:
        """`waits_for`: what it has yielded: a future, or None. Without `work`, it has ended by `error`."""
        self.cr_await = work
        """Named as in a coroutine, for those who look where a task is."""
        self._waits_for: tuple[Any, ...] = (waits_for,)
        self._error = error

    def cancel(self, error: asyncio.CancelledError) -> None:
        """The task was cancelled before it went on with it: as if it had waited already. What has ended, has ended."""
        (future,) = self._waits_for
        if self.cr_await is not None and (future is None or not future.cancel()):
            self._error = error

    def __await__(self) -> Generator[Any, Any, Any]:
        return cast("Generator[Any, Any, Any]", self)

    def __iter__(self) -> Begun:
        return self

    def __next__(self) -> Any:
        if self._error is not None:
            error, self._error, self._waits_for = self._error, None, ()
            return self.throw(error)
        if self._waits_for:
            (future,), self._waits_for = self._waits_for, ()
            return future
        assert self.cr_await is not None
        return self.cr_await.send(None)

    def throw(self, *error: Any) -> Any:
        if self.cr_await is None:
            raise error[0]
        return self.cr_await.throw(*error)

    def close(self) -> None:
        if self.cr_await is not None:
            self.cr_await.close()
