"""Which groups may be started and which are trained next, so that none is trained too late and nothing waits in vain.

Words: B groups make a batch; step v trains on version v; a group started at version s (its oldest token) may be trained
at v only while v - s <= eta. Of the B slots of a step, F = ceil(alpha * B) are for groups generated wholly by version
v, the other Q = B - F for the oldest continuations (and for fresh groups where those are too few).

The counting rule. Groups started at or before version v - eta + j must all be trained by step v + j, and until then
there are (slots left for continuations in this step) + j * Q slots for them. So after every choice, for each j in
0 .. eta - 1,

    number of untrained groups (running or pooled) started at or before v - eta + j  <=  slots left + j * Q

and for all untrained groups together  <=  slots left (fresh ones too) + eta * Q,  which is the pacing of admissions:
with alpha = 0, (eta + v + 1) * B - (accepted + running). A pick that would break the rule is not made: the trainer
waits for an older group that is still running. Why that is enough: what holds at the end of a step holds, by the same
inequalities with j - 1, at the start of the next; for j = 0 it says that nothing past the bound is left behind; and if
nothing runs, the oldest finished group may always be picked. (Liu and Layland's earliest deadline first, with Hall's
condition for the groups whose end is not known yet.)

Knows nothing of actors. Not modelled: how long anything takes.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Annotated

import numpy as np
from annotated_types import Ge, Le

from ...runtime.codec import wire
from ...runtime.entries import Selection, View
from ..trainer.settings import RlSettings
from .ledger import Ledger


def priority(started: int, rewards: Sequence[float], ordinal: int) -> tuple[float, ...]:
    """Key of a finished group: nearest deadline first, then most information (variance of rewards), then age."""
    return float(started), -float(np.var(rewards)), float(ordinal)


@wire
@dataclass(frozen=True, kw_only=True)
class StreamPolicy:
    """The rule of the module docstring with its numbers; also the policy of the pool (call it with a View)."""

    batch: Annotated[int, Ge(1)]
    """B: groups in a training batch."""
    max_staleness: Annotated[int, Ge(0)] = 2
    """eta: how much newer the trained version may be than a group's oldest token. 0 is synchronous."""
    alpha: Annotated[float, Ge(0), Le(1)] = 0.0
    """Completion ratio: least share of a batch generated wholly by the newest version. 1 is synchronous."""
    max_running: Annotated[int, Ge(1)] = 64
    """Groups in generation at a time."""
    pool_capacity: Annotated[int, Ge(0)] = 0
    """Groups in the system, from submission to the end of their step; 0 = as many as staleness allows."""

    def __post_init__(self) -> None:
        if 0 < self.pool_capacity < self.batch:
            raise ValueError(
                f"pool_capacity must hold a batch: at least {self.batch}, got {self.pool_capacity}; "
                "raise it, or make the batch smaller"
            )

    @property
    def num_fresh(self) -> int:
        """F: groups of a batch that must be generated wholly by the newest version."""
        return math.ceil(self.alpha * self.batch - 1e-9)

    @property
    def num_continued(self) -> int:
        """Q: slots of a batch that are for continuations first."""
        return self.batch - self.num_fresh

    @property
    def places(self) -> int:
        """Groups in the system at most: those that could all be trained in time if they were started now."""
        bound = self.batch + self.max_staleness * self.num_continued
        return min(bound, self.pool_capacity or bound)

    def capacity(self, ledger: Ledger, version: int, started: int | None = None) -> int:
        """How many groups may be submitted now to workers that hold version `started` (default: the newest, `version`).

        `started` must not be newer than what the workers really generate with.
        """
        started = version if started is None else started
        if started < version - self.max_staleness:
            return 0
        untrained = self._in_time(ledger.untrained(), version)
        slots = self.batch - len(ledger.leased)
        reserved = self._reserved(slots, untrained, ledger.leased.values(), version)
        places = self.places - len(ledger.leased)
        room = places - untrained.total()
        untrained[started] += 0
        for s, older in self._older(untrained, version):
            if s >= started:
                room = min(room, self._due(s, slots - reserved, version) - older, places - reserved - older)
        return max(0, min(room, self.max_running - len(ledger.running)))

    def __call__(self, view: View) -> Selection:
        """The groups of the next batch: fresh ones in their slots, the rest by deadline as far as the rule allows."""
        version, oldest = view.version, view.version - self.max_staleness
        drops = [(entry, f"staler than {self.max_staleness}") for entry in view.waiting if entry.started < oldest]
        ready = sorted((e for e in view.waiting if e.started >= oldest), key=lambda e: (e.started, e.key, e.id))
        untrained = self._in_time(Counter([*(e.started for e in ready), *view.pending.values()]), version)

        reserved = self._reserved(view.count, untrained, [e.started for e in view.leased], version)
        picks = [entry for entry in ready if entry.started >= version][:reserved]
        reason = f"{len(ready)} of {view.count} groups are finished"
        if len(picks) < reserved:
            reason = f"{len(picks)} of {reserved} groups generated wholly by version {version} are finished (alpha)"
        chosen = {entry.id for entry in picks}
        slots = view.count - reserved
        for entry in (entry for entry in ready if entry.id not in chosen):
            if slots == 0:
                break
            before = [(s, older) for s, older in self._older(untrained, version) if s < entry.started]
            if any(older >= self._due(s, slots, version) for s, older in before):
                reason = f"slots are kept for running groups that must not pass staleness {self.max_staleness}"
                break
            picks.append(entry)
            untrained[entry.started] -= 1
            slots -= 1
        return Selection(picks=picks, drops=drops, reason=reason)

    def overdue(self, ledger: Ledger, version: int) -> list[int]:
        """Unfinished groups past the bound, to be cancelled: none, unless the bound was lowered."""
        return [id for id, started in ledger.pending().items() if started < version - self.max_staleness]

    def _due(self, started: int, slots: int, version: int) -> int:
        """Groups started at `started` or before that can be trained in time, with `slots` left in this step."""
        return slots + (started + self.max_staleness - version) * self.num_continued

    def _older(self, untrained: Counter[int], version: int) -> Iterator[tuple[int, int]]:
        """(s, number of groups started at s or before) for every s that is older than the newest version."""
        starts = sorted(s for s in untrained if s < version)
        return zip(starts, accumulate(untrained[s] for s in starts), strict=True)

    def _reserved(self, slots: int, untrained: Counter[int], leased: Iterable[int], version: int) -> int:
        """Slots of this step that only fresh groups may take: alpha's share, less what is in the batch already.

        Fewer if older groups would miss their deadline, which happens only after a change of settings.
        """
        leased = list(leased)
        reserved = self.num_fresh - sum(started >= version for started in leased)
        for s, older in self._older(untrained, version):
            reserved = min(reserved, self._due(s, slots, version) - older, self.places - len(leased) - older)
        return max(0, min(reserved, slots))

    def _in_time(self, untrained: Counter[int], version: int) -> Counter[int]:
        """Without groups past the bound: no slot is kept for them."""
        return Counter({s: n for s, n in untrained.items() if s >= version - self.max_staleness})


def stream_policy(rl: RlSettings) -> StreamPolicy:
    """The policy that the `[rl]` table describes."""
    return StreamPolicy(
        batch=rl.groups_per_step, max_staleness=rl.max_staleness, alpha=rl.alpha, max_running=rl.max_running
    )
