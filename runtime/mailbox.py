"""The bounded queue in front of an actor, and the credit that keeps remote senders from overrunning it.

    sender: CreditWindow.take -> wire -> Mailbox.put -> actor takes it -> credit travels back -> CreditWindow.give

Lanes are served strictly by priority, each in order of arrival, and each is bounded by itself, so that a flood of
samples leaves room for control. Nothing is dropped here: a put that finds its lane full raises MailboxFull. Knows
nothing of sockets or actors.
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
    """A queue over four lanes of at most `capacity` items each, for one consumer."""

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise ValueError(f"a mailbox holds at least 1 message, got capacity {capacity}")
        self.capacity = capacity
        self.peak = 0
        self._size = 0
        self._lanes: tuple[deque[T], ...] = tuple(deque() for _ in Lane)
        self._arrived = asyncio.Event()
        self._taken = asyncio.Event()

    def __len__(self) -> int:
        return self._size

    def put(self, item: T, lane: Lane, *, credited: bool = False) -> None:
        """Appends. Raises MailboxFull at the bound of the lane, except in the system lane and for a `credited` item,
        whose place is its sender's credit."""
        waiting = self._lanes[lane]
        if len(waiting) >= self.capacity and lane is not Lane.SYSTEM and not credited:
            raise MailboxFull(f"mailbox full: {len(waiting)} of {self.capacity} messages wait")
        waiting.append(item)
        self._size += 1
        if self._size > self.peak:
            self.peak = self._size
        self._arrived.set()

    async def room(self, lane: Lane) -> None:
        """Waits until `put` would succeed."""
        while len(self._lanes[lane]) >= self.capacity and lane is not Lane.SYSTEM:
            self._taken.clear()
            await self._taken.wait()

    async def get(self) -> T:
        """The next item by lane, waiting for one."""
        while not self._size:
            self._arrived.clear()
            await self._arrived.wait()
        self._size -= 1
        self._taken.set()
        return next(lane for lane in self._lanes if lane).popleft()

    def remove(self, matches: Callable[[T], bool]) -> list[T]:
        """Takes out what matches: messages whose sender withdrew them, or all that a dead actor left."""
        removed = []
        for lane in self._lanes:
            out = [item for item in lane if matches(item)]
            if out:
                kept = [item for item in lane if not matches(item)]
                lane.clear()
                lane.extend(kept)
                removed += out
        self._size -= len(removed)
        if removed:
            self._taken.set()
        return removed


class CreditWindow:
    """Messages that one node may have under way to one remote actor before the actor takes them from its mailbox."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.available = size
        self._closed = False
        self._waiters: deque[asyncio.Future[None]] = deque()

    def take_nowait(self) -> bool:
        """Takes one credit if there is one and nobody waits for it."""
        if self.available == 0 or self._waiters or self._closed:
            return False
        self.available -= 1
        return True

    async def take(self) -> bool:
        """Takes one credit, in order of asking. False if the window was closed: there is nobody to send to any more."""
        if self.take_nowait():
            return True
        if self._closed:
            return False
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        try:
            await waiter
        except asyncio.CancelledError:
            if waiter in self._waiters:
                self._waiters.remove(waiter)
            elif not waiter.cancelled() and not self._closed:
                self.give(1)
            raise
        return not self._closed

    def give(self, count: int) -> bool:
        """Returns credits, as the remote actor reports messages taken. False, and none, if more than were taken."""
        if count > self.size - self.available:
            return False
        self.available += count
        while self.available and self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                self.available -= 1
                waiter.set_result(None)
        return True

    def close(self) -> None:
        """Ends every wait: the remote node is gone."""
        self._closed = True
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)
