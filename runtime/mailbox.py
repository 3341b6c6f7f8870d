"""The bounded queue in front of an actor, and the credit that keeps remote senders from overrunning it.

    sender: CreditWindow.take -> wire -> Mailbox.put -> the actor takes it -> CreditDebt.add
            CreditWindow.give <- wire <- CreditDebt.pay <- (a quarter of the window is owed) <-'

Lanes are served strictly by priority, each in order of arrival, and each is bounded by itself, in messages and bytes,
so that a flood of samples leaves room for control. Nothing is dropped here: a put that finds its lane full raises
MailboxFull. Knows nothing of sockets or actors.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Generic, TypeVar

from .errors import MailboxFull

T = TypeVar("T")

MOST_OWED = 64
"""Messages whose credit a receiver keeps back, at most."""

MAILBOX_BYTES = 256 << 20
"""Bound of a mailbox lane where its actor sets none."""


class Lane(IntEnum):
    """Priority of a message; lower is served first."""

    SYSTEM = 0
    """The runtime's own messages; exempt from bounds and credits."""
    CONTROL = 1
    """Settings, inspection, weight swaps: they pass a flood of samples."""
    NORMAL = 2
    BULK = 3


@dataclass(slots=True, eq=False)
class _Queue(Generic[T]):
    """One lane: items with their sizes, and those who wait for room with the sizes of theirs."""

    items: deque[tuple[T, int]] = field(default_factory=deque)
    bytes: int = 0
    waiting: deque[tuple[asyncio.Future[None], int]] = field(default_factory=deque)
    promised: int = 0
    """Items that will come: their senders were told that there is room."""
    promised_bytes: int = 0


class Mailbox(Generic[T]):
    """A queue over four lanes for one consumer. A lane takes `capacity` items of together `capacity_bytes`, and any
    single item when it is empty."""

    def __init__(self, capacity: int, capacity_bytes: int = MAILBOX_BYTES) -> None:
        if capacity < 1 or capacity_bytes < 1:
            raise ValueError(f"a mailbox holds at least 1 message, got capacity {capacity}, {capacity_bytes} bytes")
        self.capacity = capacity
        self.capacity_bytes = capacity_bytes
        self.peak = 0
        """The most items it ever held."""
        self.bytes = 0
        self.peak_bytes = 0
        self.last = Lane.BULK
        """Lanes after this one are held back; their messages wait."""
        self._size = 0
        self._lanes: dict[int, _Queue[T]] = {}
        """Those that were used, by priority: most actors are sent messages of one kind only."""
        self._consumer: asyncio.Future[None] | None = None

    def __len__(self) -> int:
        return self._size

    def put(self, item: T, lane: Lane, size: int = 0, *, credited: bool = False) -> None:
        """Appends an item of `size` bytes. Raises MailboxFull at the bound of the lane, except in the system lane and
        for a `credited` item, whose place is its sender's credit."""
        queue = self._lanes.get(lane) or self._open(lane)
        if not credited and not self._fits(lane, size, queue):
            full = f"{len(queue.items)} of {self.capacity} messages wait"
            if len(queue.items) < self.capacity:
                full = f"{queue.bytes} of {self.capacity_bytes} bytes wait, and this message has {size}"
            raise MailboxFull(f"mailbox full: {full}")
        queue.items.append((item, size))
        self._size += 1
        if self._size > self.peak:
            self.peak = self._size
        if size:
            queue.bytes += size
            self.bytes += size
            if self.bytes > self.peak_bytes:
                self.peak_bytes = self.bytes
        if self._consumer is not None:
            self.wake()

    def has_room(self, lane: Lane, size: int = 0) -> bool:
        """Whether `put` would succeed, and nobody waits for it."""
        queue = self._lanes.get(lane) or self._open(lane)
        return not queue.waiting and not queue.promised and self._fits(lane, size, queue)

    @property
    def awaited(self) -> bool:
        """Whether its consumer waits, and nothing has come yet."""
        return self._consumer is not None and not self._consumer.done()

    @asynccontextmanager
    async def room(self, lane: Lane, size: int = 0) -> AsyncIterator[None]:
        """Waits, in order of asking, until `put` would succeed, which it does at the beginning of the block."""
        queue = self._lanes.get(lane) or self._open(lane)
        try:
            if not self.has_room(lane, size):
                await self._wait_for_room(queue, size)
            yield
        finally:
            self._wake_senders(lane, queue)  # Whether it has put anything or not.

    def take(self) -> T | None:
        """The next item by lane, or None."""
        if not self._size:
            return None
        for lane, queue in self._lanes.items():
            if lane > self.last:
                return None
            if queue.items:
                item, size = queue.items.popleft()
                self._size -= 1
                if size:
                    queue.bytes -= size
                    self.bytes -= size
                if queue.waiting:
                    self._wake_senders(lane, queue)
                return item
        if self.last is Lane.BULK:
            raise AssertionError("a mailbox that counts wrong")
        return None

    async def get(self) -> T:
        """The next item by lane, waiting for one."""
        while (item := self.take()) is None:
            await self.wait()
        return item

    async def wait(self) -> None:
        """Waits until something is put, or `wake` is called."""
        self._consumer = asyncio.get_running_loop().create_future()
        try:
            await self._consumer
        finally:
            self._consumer = None

    def open_until(self, last: Lane) -> None:
        """Holds back the lanes after `last`, or gives them out again."""
        self.last = last
        self.wake()

    def wake(self) -> None:
        """Ends the wait of the consumer."""
        if self._consumer is not None and not self._consumer.done():
            self._consumer.set_result(None)

    def remove(self, matches: Callable[[T], bool]) -> list[T]:
        """Takes out what matches: messages whose sender withdrew them, or all that a dead actor left."""
        removed: list[T] = []
        for lane, queue in self._lanes.items():
            out = [item for item in queue.items if matches(item[0])]
            if not out:
                continue
            gone = {id(item) for item in out}
            queue.items = deque(item for item in queue.items if id(item) not in gone)
            size = sum(size for _, size in out)
            queue.bytes -= size
            self.bytes -= size
            self._size -= len(out)
            removed += [item for item, _ in out]
            self._wake_senders(lane, queue)
        return removed

    def _open(self, lane: int) -> _Queue[T]:
        queue = _Queue[T]()
        self._lanes = dict(sorted([*self._lanes.items(), (lane, queue)]))
        return queue

    def _fits(self, lane: int, size: int, queue: _Queue[T]) -> bool:
        count = len(queue.items) + queue.promised
        room = count < self.capacity and queue.bytes + queue.promised_bytes + size <= self.capacity_bytes
        return room or not count or lane == Lane.SYSTEM

    async def _wait_for_room(self, queue: _Queue[T], size: int) -> None:
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        place = waiter, size
        queue.waiting.append(place)
        try:
            await waiter
        finally:
            if place in queue.waiting:
                queue.waiting.remove(place)
            elif not waiter.cancelled():
                queue.promised -= 1
                queue.promised_bytes -= size

    def _wake_senders(self, lane: int, queue: _Queue[T]) -> None:
        while queue.waiting and self._fits(lane, queue.waiting[0][1], queue):
            waiter, size = queue.waiting.popleft()
            if not waiter.done():
                waiter.set_result(None)
                queue.promised += 1
                queue.promised_bytes += size


class CreditWindow:
    """What one node may have under way to one lane of a remote actor before the actor takes it from its mailbox.

    A message goes while fewer than `capacity` messages of together less than `capacity_bytes` are under way. So at most
    one message goes beyond the bytes, and one of any size can go at all, though the receiver keeps some credits back.
    """

    def __init__(self, capacity: int, capacity_bytes: int = MAILBOX_BYTES) -> None:
        self.capacity = capacity
        self.capacity_bytes = capacity_bytes
        self.available = capacity
        self.available_bytes = capacity_bytes
        self.sent = 0
        """Messages that have gone out."""
        self.taken = 0
        """Messages whose credit came back."""
        self._closed = False
        self._waiters: deque[tuple[asyncio.Future[None], int]] = deque()

    @property
    def under_way(self) -> int:
        """Messages of which it is not known that they have left the mailbox there."""
        return self.sent - self.taken

    @property
    def waited_for(self) -> bool:
        """Whether somebody waits for credit."""
        return bool(self._waiters)

    def take_nowait(self, size: int = 0) -> bool:
        """Takes credit for a message of `size` bytes if there is some and nobody waits for it."""
        if self.available <= 0 or self.available_bytes <= 0 or self._waiters or self._closed:
            return False
        self.available -= 1
        self.available_bytes -= size
        return True

    async def take(self, size: int = 0) -> bool:
        """Takes credit, in order of asking. False if the window was closed: there is nobody to send to any more."""
        if self.take_nowait(size):
            return True
        if self._closed:
            return False
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        place = waiter, size
        self._waiters.append(place)
        try:
            await waiter
        except asyncio.CancelledError:
            if place in self._waiters:
                self._waiters.remove(place)
            elif not waiter.cancelled() and not self._closed:
                self.give_back(size)
            raise
        return not self._closed

    def charge(self, size: int = 0) -> None:
        """A message has gone out; `size`: its bytes, if its credit was taken before they were known."""
        self.sent += 1
        self.available_bytes -= size

    def give(self, messages: int, size: int = 0) -> bool:
        """Returns credits, as the remote actor reports messages taken. False, and none, if more than were taken."""
        if messages > self.capacity - self.available or size > self.capacity_bytes - self.available_bytes:
            return False
        self.taken += messages
        self._restore(messages, size)
        return True

    def give_back(self, size: int = 0) -> None:
        """Returns the credit of a message that was not sent after all."""
        self._restore(1, size)

    def take_back(self, size: int = 0) -> None:
        """A message that counts as gone out could not be sent."""
        self.sent -= 1
        self._restore(1, size)

    def resize(self, capacity: int, capacity_bytes: int) -> None:
        """Changes the bounds: another actor has taken the name."""
        more, more_bytes = capacity - self.capacity, capacity_bytes - self.capacity_bytes
        self.capacity, self.capacity_bytes = capacity, capacity_bytes
        self._restore(more, more_bytes)

    def close(self) -> None:
        """Ends every wait: the remote node is gone."""
        self._closed = True
        while self._waiters:
            waiter, _ = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)

    def _restore(self, messages: int, size: int) -> None:
        self.available += messages
        self.available_bytes += size
        while self._waiters and self.available > 0 and self.available_bytes > 0:
            waiter, size = self._waiters.popleft()
            if not waiter.done():
                self.available -= 1
                self.available_bytes -= size
                waiter.set_result(None)


class CreditDebt:
    """What a receiver owes one sender. It is paid when a quarter of the sender's window has come together, and so never
    holds back what the sender needs to go on; and soon enough that the sender knows well what has arrived."""

    def __init__(self, capacity: int, capacity_bytes: int) -> None:
        self.messages = 0
        self.bytes = 0
        self._due = max(1, min(capacity // 4, MOST_OWED))
        self._due_bytes = max(1, capacity_bytes // 4)

    def add(self, size: int) -> bool:
        """A message has left the mailbox. True if it is time to pay."""
        self.messages += 1
        self.bytes += size
        return self.messages >= self._due or self.bytes >= self._due_bytes

    def pay(self) -> tuple[int, int]:
        """Messages and bytes to return; then nothing is owed."""
        paid = self.messages, self.bytes
        self.messages = self.bytes = 0
        return paid
