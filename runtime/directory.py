"""Who lives where: every node's copy of the system's actor table.

    starting -> up -> down -> starting -> up ...       a restart: calls made meanwhile wait for the next `up`
                 '--> stopped                          for good: calls raise ActorDied

The root writes it; changes are broadcast. Knows nothing of how actors are reached.
"""

from __future__ import annotations

import asyncio
import difflib
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Literal
from weakref import WeakSet

from .codec import wire
from .errors import ActorDied, UnknownActor, UnknownMessage
from .exits import Exit
from .mailbox import Lane
from .protocol import CALL_WINDOW, CALL_WINDOW_BYTES

WATCH_BEHIND = 64
"""Changes of one actor that a watcher may still have to see."""


@wire
@dataclass(frozen=True, kw_only=True, slots=True)
class Status:
    """What is known of one actor."""

    name: str
    node: str
    """Key (`name#incarnation`) of the node that hosts it."""
    state: Literal["starting", "up", "down", "stopped"]
    incarnation: int
    """1 for the first start, one higher at every restart."""
    exit: Exit | None = None
    """Why it is down or stopped."""
    class_name: str = ""
    messages: dict[str, list[float]] = field(default_factory=dict)
    """Lane and default deadline in seconds of each @message."""
    window: int = CALL_WINDOW
    """Messages of one node that may be under way to each of its lanes."""
    window_bytes: int = CALL_WINDOW_BYTES
    """The same in bytes."""

    @property
    def reason(self) -> str:
        """Why it is down or stopped, in words."""
        return "" if self.exit is None else self.exit.detail

    def message(self, method: str) -> tuple[Lane, float]:
        """How a message to it travels. Raises UnknownMessage, with those it has."""
        spec = self.messages.get(method)
        if spec is None:
            known = ", ".join(sorted(self.messages)) or "none"
            raise UnknownMessage(f"{self.name} ({self.class_name}) has no @message {method!r}; it has: {known}")
        return Lane(int(spec[0])), spec[1]


class Directory:
    """The table, with waiting and watching."""

    def __init__(self) -> None:
        self._table: dict[str, Status] = {}
        self.look: Callable[[str], Status | None] = self._table.get
        """What is known of an actor now, or None."""
        self._waiting: dict[str, dict[asyncio.Future[None], None]] = {}
        """Those who wait for a change of an actor, in order."""
        self._watchers: dict[str, WeakSet[_Watcher]] = {}

    def all(self) -> list[Status]:
        return list(self._table.values())

    def update(self, status: Status) -> None:
        """Takes a change unless it is older than what is known: a dead incarnation never comes back."""
        known = self._table.get(status.name)
        if known is not None and status.incarnation < known.incarnation:
            return
        self._table[status.name] = status
        for watcher in self._watchers.get(status.name, ()):
            watcher.see(status)
        for future in self._waiting.pop(status.name, ()):
            if not future.done():
                future.set_result(None)

    def get(self, name: str) -> Status:
        """Raises UnknownActor, with the nearest names."""
        status = self._table.get(name)
        if status is None:
            near = difflib.get_close_matches(name, self._table)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(sorted(self._table)) or 'none'}"
            raise UnknownActor(f"no actor named {name!r}{hint}")
        return status

    def last_incarnation(self, name: str) -> int:
        """The number of its newest incarnation; 0 if there was none."""
        status = self._table.get(name)
        return 0 if status is None else status.incarnation

    def ready(self, name: str) -> Status | None:
        """The status if messages can be sent now, None if it is worth waiting. Raises UnknownActor, ActorDied."""
        status = self.get(name)
        if status.state == "stopped":
            raise ActorDied(f"{name} has stopped for good: {status.reason or 'orderly stop'}")
        return status if status.state == "up" else None

    async def when_up(self, name: str) -> Status:
        """Waits until the actor is up. Raises UnknownActor, ActorDied."""
        while (status := self.ready(name)) is None:
            changed = asyncio.get_running_loop().create_future()
            waiting = self._waiting.setdefault(name, {})
            waiting[changed] = None
            try:
                await changed
            finally:
                del waiting[changed]
        return status

    def watch(self, name: str) -> AsyncIterator[Status]:
        """The present status, then each change. A watcher that is WATCH_BEHIND changes behind misses the oldest."""
        watcher = _Watcher()
        if name in self._table:
            watcher.see(self._table[name])
        self._watchers.setdefault(name, WeakSet()).add(watcher)
        return watcher


class _Watcher(AsyncIterator[Status]):
    """What one watcher has still to see. Whoever iterates keeps it alive; the directory does not."""

    def __init__(self) -> None:
        self._last: Status | None = None
        self._unseen: deque[Status] = deque(maxlen=WATCH_BEHIND)
        self._arrived = asyncio.Event()

    def see(self, status: Status) -> None:
        if status != self._last:
            self._last = status
            self._unseen.append(status)
            self._arrived.set()

    async def __anext__(self) -> Status:
        while not self._unseen:
            self._arrived.clear()
            await self._arrived.wait()
        return self._unseen.popleft()
