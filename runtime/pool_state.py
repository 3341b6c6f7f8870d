"""What a sample pool keeps: entries with a priority, lent out and taken back, each used up exactly once.

    expect ....> put --> waiting --lease--> leased --ack--> settled (its id is never accepted again)
    (reserves a place)      ^                  |
                            '--- release, expiry, death of the holder

An entry is never lost and never with two holders at once. Its id is used once for ever: putting it again is refused,
also after it was settled. Which entries a lease gets is decided by a policy, a function of what waits, what is leased
and what is still to come. With a journal every change is on file before it takes effect, so a pool that is killed comes
back with the same entries and the same leases.

Synchronous and for one thread; `pool.py` makes an actor of it. Knows nothing of what the payloads are: `version` and
`started` are numbers that it keeps for the policy.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from .entries import Entry, Lease, Policy, Selection, View, in_key_order
from .errors import LeaseLost, PoolFull
from .journal import Journal

NUM_REMEMBERED = 1024
"""Settled entries whose history `explain` still tells, and acked leases whose second ack is still understood."""

COMPACT_BYTES = 64 << 20
"""A journal this long is compacted even between checkpoints, if that makes it half as long or less."""


@dataclass(slots=True)
class _Loan:
    """A lease as the pool keeps it."""

    version: int
    holder: str
    ids: list[int]
    expires_at: float


class Pool:
    """The queue itself. See the module docstring for the life of an entry."""

    def __init__(
        self,
        *,
        capacity: int,
        policy: Policy = in_key_order,
        journal: Journal | None = None,
        lease_s: float = 600.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Replays `journal`, whose leases then run anew for `lease_s` seconds. Raises JournalError if it is damaged."""
        self.capacity = capacity
        """Entries held at most, waiting or leased; expected ones have their place reserved."""
        self.policy = policy
        """Chooses the entries of a lease."""
        self._journal = journal
        self._lease_s = lease_s
        self._clock = clock
        self._changes: dict[str, Callable[..., None]] = {
            "state": self._on_state,
            "keep": self._on_keep,
            "put": self._on_put,
            "lease": self._on_lease,
            "ack": self._on_ack,
            "release": self._on_release,
            "settle": self._on_settle,
        }
        self._pending: dict[int, int] = {}
        self._compact_at = COMPACT_BYTES
        self._on_state(0.0, _NOTHING)
        if journal is not None:
            for change, at, *details in journal.replay():
                self._changes[change](at, *details)

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def num_waiting(self) -> int:
        return len(self._entries) - len(self._lent)

    def __contains__(self, id: int) -> bool:
        """Whether the pool has seen the entry: it waits, is leased, or is settled."""
        return id in self._entries or id in self._settled

    def has_room(self, id: int) -> bool:
        """Whether this entry may be put now. An expected one always may: its place is reserved, for if it had to wait
        here, it could wait for a lease that waits for it."""
        return id in self._pending or len(self._entries) + len(self._pending) < self.capacity

    def expect(self, pending: Mapping[int, int]) -> None:
        """Says which entries are still to come, as id -> started: all of them, each time anew."""
        self._pending = {id: started for id, started in pending.items() if id not in self}

    def put(self, entry: Entry) -> bool:
        """Takes an entry; False if its id was seen before. Raises PoolFull, or JournalError if it can't be kept."""
        if entry.id < 0 or not isinstance(entry.key, tuple):
            raise ValueError(f"an entry has an id >= 0 and a tuple as key, got id {entry.id!r}, key {entry.key!r}")
        if entry.id in self:
            self._counts["refused"] += 1
            return False
        if not self.has_room(entry.id):
            raise PoolFull(f"the pool holds {len(self)} and expects {len(self._pending)} of {self.capacity} entries")
        self._commit("put", entry)
        return True

    def select(self, count: int, version: int) -> Selection:
        """What the policy would lease now."""
        lent = [self._entries[id] for loan in self._loans.values() if loan.version == version for id in loan.ids]
        waiting = [entry for id, entry in self._entries.items() if id not in self._lent]
        view = View(waiting=waiting, leased=lent, pending=self._pending, version=version, count=count)
        return self.policy(view)

    def lease(self, count: int, version: int, holder: str = "", at_least: int | None = None) -> Lease | None:
        """Lends up to `count` entries, chosen by the policy; None if it grants fewer than `at_least` (default: all)."""
        at_least = count if at_least is None else at_least
        if not 1 <= at_least <= count:
            raise ValueError(f"a lease is of 1 <= at_least <= count entries, got at_least {at_least}, count {count}")
        self.expire()
        selection = self.select(count, version)
        for entry, reason in selection.drops:
            self._commit("settle", [entry.id], reason)
        ids = [entry.id for entry in selection.picks]
        assert len(ids) <= count and len(set(ids)) == len(ids) and not any(id in self._lent for id in ids)
        if len(ids) < at_least:
            return None
        lease_id = self._next_lease
        self._commit("lease", lease_id, version, holder, ids)
        return Lease(id=lease_id, version=version, entries=list(selection.picks), expires_in_s=self._lease_s)

    def ack(self, lease_id: int) -> int:
        """Settles the entries of a lease for good; returns their number, or 0 if that was done before.

        Raises LeaseLost if the lease expired or was released: then others may have its entries.
        """
        if lease_id in self._acked:
            return 0
        num = len(self._loan(lease_id).ids)
        self._commit("ack", lease_id)
        return num

    def release(self, lease_id: int, reason: str = "released") -> int:
        """Puts the entries of a lease back; returns their number, 0 for a lease that is over."""
        if lease_id not in self._loans:
            return 0
        num = len(self._loans[lease_id].ids)
        self._commit("release", lease_id, reason)
        return num

    def release_holder(self, holder: str, reason: str = "holder died") -> int:
        """Puts back all that `holder` has; returns the number of entries."""
        return sum(self.release(id, reason) for id in [id for id, loan in self._loans.items() if loan.holder == holder])

    def renew(self, lease_id: int) -> None:
        """Lets a lease run anew. Raises LeaseLost if it is over."""
        self._loan(lease_id).expires_at = self._clock() + self._lease_s

    def expire(self) -> int:
        """Puts back what is in overdue leases; returns the number of entries."""
        now = self._clock()
        overdue = [id for id, loan in self._loans.items() if loan.expires_at <= now]
        return sum(self.release(id, "lease expired") for id in overdue)

    @property
    def next_expiry_s(self) -> float | None:
        """Seconds until the next lease is overdue; None without leases."""
        if not self._loans:
            return None
        return max(0.0, min(loan.expires_at for loan in self._loans.values()) - self._clock())

    def retire(self, ids: Iterable[int], reason: str = "retired") -> int:
        """Settles ids that will never be put; returns how many were new. Ids that the pool holds stay in it.

        Every id must be put or retired in the end: the pool remembers each id above the lowest that is open.
        """
        new = sorted({id for id in ids if id not in self})
        if new:
            self._commit("settle", new, reason)
        return len(new)

    def discard(self, id: int, reason: str) -> bool:
        """Settles a waiting entry unused; False if it does not wait."""
        if id not in self._entries or id in self._lent:
            return False
        self._commit("settle", [id], reason)
        return True

    def checkpoint(self) -> None:
        """Compacts the journal and brings it to the disk. Raises JournalError; then the old journal is kept."""
        if self._journal is not None:
            self._journal.rewrite(_records(self.snapshot()))
            self._compact_at = max(COMPACT_BYTES, 2 * self._journal.num_bytes)

    def snapshot(self) -> dict[str, Any]:
        """The whole state as a value that can travel."""
        return {
            "entries": list(self._entries.values()),
            "leases": {id: (loan.version, loan.holder, loan.ids) for id, loan in self._loans.items()},
            "next_lease": self._next_lease,
            "acked": list(self._acked),
            "settled": (self._settled.below, sorted(self._settled.above)),
            "counts": dict(self._counts),
            "drops": dict(self._drops),
            "history": {id: list(lines) for id, lines in self._history.items()},
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Takes over the state of a `snapshot`, in the journal too; its leases run anew. Raises JournalError."""
        if self._journal is not None:
            self._journal.rewrite(_records(state))
        self._on_state(time.time(), state)

    def explain(self, id: int) -> list[dict[str, Any]]:
        """What happened to an entry, oldest first; empty if that is unknown or forgotten."""
        return [dict(line) for line in self._history.get(id, ())]

    def stats(self) -> dict[str, Any]:
        """Sizes now and counts since the first start of the pool; fit for JSON."""
        waiting = [entry for id, entry in self._entries.items() if id not in self._lent]
        return {
            "capacity": self.capacity,
            "waiting": len(waiting),
            "leased": len(self._lent),
            "pending": len(self._pending),
            "waiting_tokens": sum(entry.num_tokens for entry in waiting),
            "waiting_by_version": {str(s): n for s, n in sorted(Counter(entry.started for entry in waiting).items())},
            "leases": [
                {"id": id, "version": loan.version, "holder": loan.holder, "entries": len(loan.ids)}
                for id, loan in self._loans.items()
            ],
            "counts": dict(self._counts),
            "drops": dict(self._drops),
            "journal_bytes": self._journal.num_bytes if self._journal is not None else 0,
        }

    def close(self) -> None:
        """Closes the journal."""
        if self._journal is not None:
            self._journal.close()

    def _loan(self, lease_id: int) -> _Loan:
        loan = self._loans.get(lease_id)
        if loan is None:
            raise LeaseLost(
                f"lease {lease_id} is over: it expired or was released, and its entries may be with another"
            )
        return loan

    # A change goes first into the journal and then, by the function that replay uses too, into the state.

    def _commit(self, change: str, *details: Any) -> None:
        at = time.time()
        if self._journal is not None:
            self._journal.append((change, at, *details))
        self._changes[change](at, *details)
        if self._journal is not None and self._journal.num_bytes > self._compact_at:
            self.checkpoint()

    def _on_state(self, at: float, state: Mapping[str, Any]) -> None:
        now = self._clock()
        self._entries: dict[int, Entry] = {entry.id: entry for entry in state["entries"]}
        self._loans: dict[int, _Loan] = {
            id: _Loan(version, holder, list(ids), now + self._lease_s)
            for id, (version, holder, ids) in state["leases"].items()
        }
        self._lent: set[int] = {id for loan in self._loans.values() for id in loan.ids}
        self._next_lease: int = state["next_lease"]
        self._acked: deque[int] = deque(state["acked"], maxlen=NUM_REMEMBERED)
        self._settled = _Ids(*state["settled"])
        self._counts: Counter[str] = Counter(state["counts"])
        self._drops: Counter[str] = Counter(state["drops"])
        self._history: dict[int, list[dict[str, Any]]] = {id: list(lines) for id, lines in state["history"].items()}

    def _on_keep(self, at: float, entry: Entry) -> None:
        self._entries[entry.id] = entry

    def _on_put(self, at: float, entry: Entry) -> None:
        self._entries[entry.id] = entry
        self._pending.pop(entry.id, None)
        self._counts["put"] += 1
        self._tell(entry.id, at, "put", started=entry.started, key=list(entry.key), num_tokens=entry.num_tokens)

    def _on_lease(self, at: float, lease_id: int, version: int, holder: str, ids: list[int]) -> None:
        self._loans[lease_id] = _Loan(version, holder, ids, self._clock() + self._lease_s)
        self._lent.update(ids)
        self._next_lease = lease_id + 1
        self._counts["leased"] += len(ids)
        for id in ids:
            self._tell(id, at, "leased", lease=lease_id, version=version, holder=holder)

    def _on_release(self, at: float, lease_id: int, reason: str) -> None:
        ids = self._loans.pop(lease_id).ids
        self._lent.difference_update(ids)
        self._counts["released"] += len(ids)
        for id in ids:
            self._tell(id, at, "released", lease=lease_id, reason=reason)

    def _on_ack(self, at: float, lease_id: int) -> None:
        ids = self._loans.pop(lease_id).ids
        self._lent.difference_update(ids)
        self._acked.append(lease_id)
        self._counts["acked"] += len(ids)
        for id in ids:
            del self._entries[id]
            self._tell(id, at, "acked", lease=lease_id)
        self._settle(ids)

    def _on_settle(self, at: float, ids: list[int], reason: str) -> None:
        for id in ids:
            if self._entries.pop(id, None) is not None:
                self._drops[reason] += 1
                self._tell(id, at, "dropped", reason=reason)
            else:
                self._pending.pop(id, None)
                self._counts["retired"] += 1
                self._tell(id, at, "retired", reason=reason)
        self._settle(ids)

    def _settle(self, ids: Iterable[int]) -> None:
        self._settled.add(ids)
        if len(self._history) > len(self._entries) + NUM_REMEMBERED:
            surplus = len(self._history) - len(self._entries) - NUM_REMEMBERED
            for id in [id for id in self._history if id not in self._entries][:surplus]:
                del self._history[id]

    def _tell(self, id: int, at: float, event: str, **details: Any) -> None:
        self._history.setdefault(id, []).append({"at": at, "event": event, **details})


class _Ids:
    """A set of numbers that in the long run has no gaps: all below one number, and a few above."""

    def __init__(self, below: int = 0, above: Iterable[int] = ()) -> None:
        self.below = below
        self.above = set(above)

    def __contains__(self, id: int) -> bool:
        return id < self.below or id in self.above

    def add(self, ids: Iterable[int]) -> None:
        self.above.update(id for id in ids if id >= self.below)
        while self.below in self.above:
            self.above.remove(self.below)
            self.below += 1


_NOTHING: dict[str, Any] = {
    "entries": [],
    "leases": {},
    "next_lease": 0,
    "acked": [],
    "settled": (0, []),
    "counts": {},
    "drops": {},
    "history": {},
}
"""The state of a pool that has seen nothing."""


def _records(state: Mapping[str, Any]) -> Iterator[tuple[Any, ...]]:
    """Changes that lead to `state`: one record for each entry, so that no record is large."""
    at = time.time()
    yield "state", at, {**state, "entries": []}
    for entry in state["entries"]:
        yield "keep", at, entry
