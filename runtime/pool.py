"""The sample pool as an actor: whoever finds it full, or with too little in it, waits here and can be asked why.

    producers --put--> SamplePool --lease--> consumer --ack--> SamplePool

What it keeps, and for how long, is in pool_state.py; which entries a lease gets is the policy's business. Knows nothing
of what the entries are.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from annotated_types import Ge, Gt

from .actor import Actor, message
from .entries import Entry as Entry
from .entries import Lease as Lease
from .entries import Policy as Policy
from .entries import in_key_order
from .journal import Journal
from .mailbox import Lane
from .pool_state import Pool

T = TypeVar("T")

MAX_WAIT_S = 3600.0
"""A put or lease whose caller sets no deadline is given up after this long."""


@dataclass(slots=True, eq=False)
class _Wait:
    """Somebody waits for the pool to change."""

    who: str
    since: float
    reason: Callable[[], str]


@dataclass(kw_only=True)
class SamplePool(Actor):
    """A durable, leased priority queue. Subclasses choose the order by overriding `policy`."""

    capacity: Annotated[int, Ge(1)] = 256
    """Entries held at most, waiting or leased; a put beyond that waits."""
    journal: str = ""
    """File that survives the death of the pool; "" keeps entries in memory only."""
    lease_s: Annotated[float, Gt(0)] = 600.0
    """A lease that is neither acked, released nor renewed for so long goes back to the pool."""

    def policy(self) -> Policy:
        """What chooses the entries of a lease."""
        return in_key_order

    def follow(self, policy: Policy) -> None:
        """From now on this chooses, also for the leases that wait."""
        self._pool.policy = policy
        self._notify()

    def journal_path(self) -> str:
        """Where the journal is kept; "" for nowhere."""
        return self.journal

    async def start(self) -> None:
        """Replays the journal. Raises JournalError if it is in use or damaged."""
        self._changed = asyncio.Event()
        self._waiting: list[_Wait] = []
        path = self.journal_path()
        journal = Journal(path) if path else None
        try:
            self._pool = Pool(capacity=self.capacity, policy=self.policy(), journal=journal, lease_s=self.lease_s)
        except BaseException:
            if journal is not None:
                journal.close()
            raise
        self.log("pool_opened", **self._pool.stats())

    async def stop(self, reason: BaseException | None) -> None:
        self._pool.close()

    @message(concurrent=True, deadline_s=MAX_WAIT_S)
    async def put(self, entry: Entry) -> bool:
        """Takes an entry and keeps it, whatever dies afterwards; waits while the pool is full.

        False if the id was seen before. Raises JournalError if it can't be kept (then the pool does not have it).
        """

        def attempt() -> bool | None:
            return self._pool.put(entry) if entry.id in self._pool or self._pool.has_room(entry.id) else None

        taken = await self._until(attempt, f"put of entry {entry.id}", lambda: f"one of {self.capacity} places")
        if taken:
            self._notify()
        return taken

    @message(concurrent=True, deadline_s=MAX_WAIT_S)
    async def lease(self, count: int, version: int, holder: str = "", at_least: int | None = None) -> Lease:
        """Lends up to `count` entries to `holder`; waits until the policy grants `at_least` (default: all).

        A caller that gets an error instead can't know whether a lease was made: it calls `release_holder` first.
        """
        return await self._until(
            lambda: self._pool.lease(count, version, holder, at_least),
            f"lease of {count} entries for version {version}{holder and ' by ' + holder}",
            lambda: self._pool.select(count, version).reason,
        )

    @message
    async def ack(self, lease_id: int) -> int:
        """Settles the entries of a lease for good; returns their number (0: done before). Raises LeaseLost."""
        return self._notify(self._pool.ack(lease_id))

    @message
    async def release(self, lease_id: int) -> int:
        """Puts the entries of a lease back unused; returns their number, 0 if the lease is over."""
        return self._notify(self._pool.release(lease_id))

    @message
    async def release_holder(self, holder: str) -> int:
        """Puts back all that a holder has, because it died; returns the number of entries."""
        return self._notify(self._pool.release_holder(holder))

    @message
    async def renew(self, lease_id: int) -> None:
        """Lets a lease run anew. Raises LeaseLost if it is over."""
        self._pool.renew(lease_id)

    @message
    async def expect(self, pending: dict[int, int]) -> None:
        """Says which entries are still to come, id -> started: all of them, each time anew. Reserves their places."""
        self._pool.expect(pending)
        self._notify()

    @message
    async def retire(self, ids: list[int], reason: str = "retired") -> int:
        """Settles ids that will never be put; returns how many were new."""
        return self._notify(self._pool.retire(ids, reason))

    @message
    async def discard(self, id: int, reason: str) -> bool:
        """Drops a waiting entry; False if it does not wait."""
        return self._notify(self._pool.discard(id, reason))

    @message
    async def checkpoint(self) -> dict[str, Any]:
        """Compacts the journal and brings it to the disk; returns `stats`."""
        self._pool.checkpoint()
        return self._pool.stats()

    @message
    async def state(self) -> dict[str, Any]:
        """The whole state as a value that can travel."""
        return self._pool.snapshot()

    @message
    async def take_over(self, state: dict[str, Any]) -> None:
        """Takes over what `state` returned; what the pool had is gone."""
        self._pool.restore(state)
        self._notify()

    @message(lane=Lane.CONTROL)
    async def stats(self) -> dict[str, Any]:
        """Sizes now, and counts since the first start."""
        return self._pool.stats()

    @message(lane=Lane.CONTROL)
    async def explain(self, id: int) -> list[dict[str, Any]]:
        """What happened to an entry, oldest first."""
        return self._pool.explain(id)

    @message(lane=Lane.CONTROL)
    async def waits(self) -> list[dict[str, Any]]:
        """Who waits for the pool, for what, and since when (seconds)."""
        now = asyncio.get_running_loop().time()
        return [{"who": wait.who, "for": wait.reason(), "since_s": now - wait.since} for wait in self._waiting]

    async def _until(self, attempt: Callable[[], T | None], who: str, reason: Callable[[], str]) -> T:
        """Tries after every change of the pool, and when a lease runs out, until there is a result."""
        loop = asyncio.get_running_loop()
        wait = _Wait(who, loop.time(), reason)
        self._waiting.append(wait)
        try:
            while (result := attempt()) is None:
                due = self._pool.next_expiry_s
                try:
                    async with asyncio.timeout(due):
                        await self._changed.wait()
                except TimeoutError:
                    if self._pool.expire():
                        self._notify()
            return result
        finally:
            self._waiting.remove(wait)

    def _notify(self, result: T = None) -> T:  # type: ignore[assignment]
        """Wakes all that wait; returns its argument."""
        self._changed.set()
        self._changed = asyncio.Event()
        return result
