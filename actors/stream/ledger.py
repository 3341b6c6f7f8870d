"""Where every group of a run is, from its submission to its end.

    submit --> running --accept--> pooled --take--> leased --train--> trained
                ^   |                 ^               |
          resume|   |pause            '---give_back---'        pooled --drop--> dropped
                partial
    running, partial --filter--> filtered      running, partial --fail--> failed

At every instant  submitted = running + partial + accepted + filtered + failed  and  accepted = pooled + leased +
trained + dropped; `check` says so. A group that is filtered or fails gives its slot back by leaving `untrained`. Knows
nothing of actors, and decides nothing: see policy.py.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any

NUM_ENDS = 4096
"""Finished groups that `drop_rates` looks back at."""

_PLACES = ("running", "partial", "pooled", "leased")
_ENDS = ("submitted", "accepted", "trained", "dropped", "filtered", "failed")


class Ledger:
    """Groups by place, each with the version of its oldest token (a lower bound of it until it is accepted)."""

    def __init__(self) -> None:
        self.running: dict[int, int] = {}
        """id -> started: a worker is generating or judging it."""
        self.partial: dict[int, int] = {}
        """Interrupted, and to be continued."""
        self.pooled: dict[int, int] = {}
        """Finished, in the pool."""
        self.leased: dict[int, int] = {}
        """In the batch of the present step."""
        self.totals: Counter[str] = Counter(dict.fromkeys(_ENDS, 0))
        """Groups that ever came to each end."""
        self.reasons: Counter[str] = Counter()
        """Failed and dropped groups by reason."""
        self._num_tokens: dict[int, int] = {}
        self._ends: deque[tuple[int, bool]] = deque(maxlen=NUM_ENDS)

    def submit(self, id: int, started: int) -> None:
        """A worker that may still use version `started` gets the group."""
        if any(id in getattr(self, place) for place in _PLACES):
            raise ValueError(f"group {id} was submitted before and has not ended")
        self.running[id] = started
        self.totals["submitted"] += 1

    def pause(self, id: int) -> None:
        """The group was interrupted."""
        self.partial[id] = self.running.pop(id)

    def resume(self, id: int) -> None:
        """A worker goes on with the group."""
        self.running[id] = self.partial.pop(id)

    def accept(self, id: int, started: int | None = None, num_tokens: int = 0) -> None:
        """The group is finished and in the pool; `started` is the true version of its oldest token.

        Only the size is noted if `take` came first: the answers to a put and to a lease may overtake each other.
        """
        self._num_tokens[id] = num_tokens
        if id in self.leased:
            return
        bound = self._leave(id)
        assert started is None or started >= bound, f"group {id} started at {started}, before its submission ({bound})"
        self.pooled[id] = bound if started is None else started
        self.totals["accepted"] += 1

    def filter(self, id: int) -> None:
        """The group is finished but teaches nothing (dynamic sampling)."""
        self._leave(id)
        self.totals["filtered"] += 1

    def fail(self, id: int, reason: str, num_tokens: int = 0) -> None:
        """The group will not be finished."""
        self._leave(id)
        self.totals["failed"] += 1
        self.reasons[reason] += 1
        self._ends.append((num_tokens, True))

    def take(self, ids: Iterable[int]) -> None:
        """The pool has lent these for the present step."""
        for id in ids:
            if id not in self.pooled:
                self.accept(id)
            self.leased[id] = self.pooled.pop(id)

    def give_back(self, ids: Iterable[int]) -> None:
        """The lease is over without a step; ids that are not leased are left alone."""
        for id in ids:
            if id in self.leased:
                self.pooled[id] = self.leased.pop(id)

    def train(self, ids: Iterable[int]) -> None:
        """The step on these is done."""
        for id in ids:
            del self.leased[id]
            self.totals["trained"] += 1
            self._ends.append((self._num_tokens.pop(id), False))

    def drop(self, id: int, reason: str) -> None:
        """The pool evicted the group."""
        del self.pooled[id]
        self.totals["dropped"] += 1
        self.reasons[reason] += 1
        self._ends.append((self._num_tokens.pop(id), True))

    def pending(self) -> dict[int, int]:
        """Groups still to come, id -> started: what the pool is to expect."""
        return {**self.running, **self.partial}

    def untrained(self) -> Counter[int]:
        """Number of groups that wait for a slot, running or finished but not leased, by the version they started at."""
        return Counter(started for place in (self.running, self.partial, self.pooled) for started in place.values())

    @property
    def counts(self) -> dict[str, int]:
        """Sizes of the places now, and totals of the ends."""
        return {**{place: len(getattr(self, place)) for place in _PLACES}, **self.totals}

    def check(self) -> None:
        """Asserts that no group is lost and none is in two places."""
        c = self.counts
        assert c["submitted"] == c["running"] + c["partial"] + c["accepted"] + c["filtered"] + c["failed"], c
        assert c["accepted"] == c["pooled"] + c["leased"] + c["trained"] + c["dropped"], c
        assert len({id for place in _PLACES for id in getattr(self, place)}) == sum(c[place] for place in _PLACES), c

    def drop_rates(self) -> list[float]:
        """Share of groups that were dropped or failed, by decile of length (short first), over the last NUM_ENDS ends.

        Ten numbers, 0.0 for deciles without groups. A bias against long answers shows as a rising row.
        """
        ends = [dropped for _, dropped in sorted(self._ends)]
        cuts = [len(ends) * k // 10 for k in range(11)]
        return [sum(ends[a:b]) / max(1, b - a) for a, b in pairwise(cuts)]

    def snapshot(self) -> dict[str, Any]:
        """The state as a value that can travel."""
        places = {place: dict(getattr(self, place)) for place in _PLACES}
        return {
            **places,
            "totals": dict(self.totals),
            "reasons": dict(self.reasons),
            "num_tokens": dict(self._num_tokens),
            "ends": [list(end) for end in self._ends],
        }

    @classmethod
    def restore(cls, state: Mapping[str, Any]) -> Ledger:
        """The ledger of a `snapshot`."""
        ledger = cls()
        for place in _PLACES:
            setattr(ledger, place, dict(state[place]))
        ledger.totals.update(state["totals"])
        ledger.reasons.update(state["reasons"])
        ledger._num_tokens.update(state["num_tokens"])
        ledger._ends.extend((num_tokens, dropped) for num_tokens, dropped in state["ends"])
        return ledger

    def _leave(self, id: int) -> int:
        """Takes a group out of running or partial; returns its `started`."""
        return self.running.pop(id) if id in self.running else self.partial.pop(id)
