"""An asyncio loop without waiting: its time jumps to the next timer when nothing is ready, and a seed orders what is.

    run(main, seed=7)      main() to its end; the same seed gives the same run, to the last callback
    seed=None              callbacks run in asyncio's own order

What is ready runs in an order that the seed draws: two steps that no await, future or timer puts in order come in both
orders under some seed. When nothing is ready and no timer is left, or time is up, nothing will ever happen again:
`Stuck` says which tasks wait, and where. For code without threads, sockets and processes; knows nothing of headrace.
"""

from __future__ import annotations

import asyncio
import io
import random
import selectors
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class Stuck(Exception):
    """Nothing can happen any more, or not in the time that was given."""


class _Shuffled(deque[Any]):
    """Gives its items out in an order that `random` draws."""

    def __init__(self, draws: random.Random) -> None:
        super().__init__()
        self._draws = draws

    def popleft(self) -> Any:
        turn = self._draws.randrange(len(self))
        self.rotate(-turn)
        item = super().popleft()
        self.rotate(turn)
        return item


class _JumpingSelector(selectors.DefaultSelector):
    """Waits for no file longer than it takes to look; moves the loop's clock instead."""

    loop: VirtualLoop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise Stuck(f"nothing can happen any more at {self.loop.now:g} s\n{_who_waits(self.loop)}")
        if timeout > 0:
            self.loop.now += timeout
            if self.loop.now > self.loop.limit_s:
                raise Stuck(f"not done within {self.loop.limit_s:g} virtual seconds\n{_who_waits(self.loop)}")
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """`now` is its time in seconds. A test that never lets time pass ends after `max_turns` turns."""

    def __init__(self, seed: int | None = None, *, limit_s: float = 1e6, max_turns: int = 1_000_000) -> None:
        selector = _JumpingSelector()
        super().__init__(selector)
        selector.loop = self
        self.now = 0.0
        self.limit_s = limit_s
        self.turns_left = max_turns
        if seed is not None:
            self._ready = _Shuffled(random.Random(seed))

    def time(self) -> float:
        return self.now

    def _run_once(self) -> None:
        self.turns_left -= 1
        if self.turns_left < 0:
            raise Stuck(f"the loop turns for ever at {self.now:g} s\n{_who_waits(self)}")
        super()._run_once()  # type: ignore[misc]


def run(
    main: Callable[[], Coroutine[Any, Any, T]],
    seed: int | None = None,
    *,
    limit_s: float = 1e6,
    max_turns: int = 10**6,
) -> T:
    """Runs `main()` on a loop of its own. Raises what it raises, Stuck, and AssertionError for what it left behind:
    tasks, or exceptions that nobody took."""
    loop = VirtualLoop(seed, limit_s=limit_s, max_turns=max_turns)
    complaints: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda _, context: complaints.append(context))
    try:
        asyncio.set_event_loop(loop)
        result = loop.run_until_complete(main())
        left = asyncio.all_tasks(loop)
        assert not left, f"tasks are left:\n{_who_waits(loop)}"
        assert not complaints, complaints
        return result
    finally:
        _cancel_all(loop)
        asyncio.set_event_loop(None)
        loop.close()


def _cancel_all(loop: VirtualLoop) -> None:
    tasks = asyncio.all_tasks(loop)
    for task in tasks:
        task.cancel()
    loop.limit_s, loop.turns_left = float("inf"), 100_000
    if tasks:
        loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))


def _who_waits(loop: asyncio.AbstractEventLoop) -> str:
    text = io.StringIO()
    for task in sorted(asyncio.all_tasks(loop), key=lambda task: task.get_name()):
        task.print_stack(limit=3, file=text)
    return text.getvalue() or "no task is left"
