"""The bounded queue in front of an actor, and the credit that keeps remote senders from overrunning it.

    sender: CreditWindow.take -> wire -> Mailbox.put -> actor takes it -> credit travels back -> CreditWindow.give

Lanes are served strictly by priority, each in order of arrival. Nothing is dropped here: a put that finds the mailbox full
raises MailboxFull. Knows nothing of sockets or actors.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from enum import IntEnum
from typing import Generic, TypeVar

from .errors import MailboxFull

T = TypeVar("T")


class Lane(IntEnum):
    """Priority of a message; lower is served first."""

    SYSTEM = 0
    """The runtime's own messages; exempt from bounds and credits."""
    CONTROL = 1
    """Settings, inspection, weight swaps; exempt from credits, so they pass a flood of samples."""
    NORMAL = 2
    BULK = 3


class Mailbox(Generic[T]):
    """A queue of at most `capacity` items over four lanes, for one consumer."""

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise ValueError(f"a mailbox holds at least 1 message, got capacity {capacity}")
        self.capacity = capacity
        self.peak = 0
        self._lanes: tuple[deque[T], ...] = tuple(deque() for _ in Lane)
        self._arrived = asyncio.Event()
        self._taken = asyncio.Event()

    def __len__(self) -> int:
        return sum(map(len, self._lanes))

    def put(self, item: T, lane: Lane) -> None:
        """Appends; raises MailboxFull at the bound (never for the system lane)."""
        if lane is not Lane.SYSTEM and len(self) >= self.capacity:
            raise MailboxFull(f"mailbox full: {len(self)} of {self.capacity} messages wait")
        self._lanes[lane].append(item)
        self.peak = max(self.peak, len(self))
        self._arrived.set()

    async def room(self, lane: Lane) -> None:
        """Waits until `put` would succeed."""
        while lane is not Lane.SYSTEM and len(self) >= self.capacity:
            self._taken.clear()
            await self._taken.wait()

    async def get(self) -> T:
        """The next item by lane, waiting for one."""
        while True:
            for lane in self._lanes:
                if lane:
                    self._taken.set()
                    return lane.popleft()
            self._arrived.clear()
            await self._arrived.wait()

    def remove(self, matches: Callable[[T], bool]) -> list[T]:
        """Takes out what matches: messages whose sender withdrew them, or all that a dead actor left."""
        removed = [item for lane in self._lanes for item in lane if matches(item)]
        if removed:
            for lane in self._lanes:
                kept = [item for item in lane if not matches(item)]
                lane.clear()
                lane.extend(kept)
            self._taken.set()
        return removed


class CreditWindow:
    """Messages that one node may have under way to one remote actor before the actor takes them from its mailbox."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.available = size
        self._waiters: deque[asyncio.Future[None]] = deque()

    def take_nowait(self) -> bool:
        """Takes one credit if there is one and nobody waits for it."""
        if self.available == 0 or self._waiters:
            return False
        self.available -= 1
        return True

    async def take(self) -> None:
        """Takes one credit, in order of asking."""
        if self.take_nowait():
            return
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        try:
            await waiter
        except asyncio.CancelledError:
            if waiter in self._waiters:
                self._waiters.remove(waiter)
            elif not waiter.cancelled():
                self.give(1)
            raise

    def give(self, count: int) -> None:
        """Returns credits, as the remote actor reports messages taken."""
        self.available += count
        while self.available and self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                self.available -= 1
                waiter.set_result(None)
        assert self.available <= self.size, (self.available, self.size)

    def fail(self, error: Exception) -> None:
        """Ends every wait with `error`: the remote node is gone."""
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_exception(error)
