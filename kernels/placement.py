"""Which expert lives in which slot of which rank: replicas for the busy ones, ranks as even as can be, few moves.

    load_E --replicate--> replicas --pack--> ranks --improve--> Placement --match to the old one--> moves

Replicas: one after the other for the expert with the most load per replica. Packing: the heaviest first, to the
lightest rank with a free slot. That much is EPLB's published method; it ends there and forgets the old placement. Then
changes are made as long as they help: a swap of two slots (two moves), or another expert in the slot of a replica
(one). With `keep`, these changes start from the old placement and end as soon as it is about as good as a new one.

Host code of numpy, for one layer at a time. Its loads count replicas as equal; `leveling` does better per batch.
Knows nothing of devices or of how weights are moved.
Shapes: E experts, P slots, G ranks, S = P / G slots of a rank, R replicas of an expert at most.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np

from .leveling import NO_SLOT, SWEEPS, Ints, level_split, rank_load
from .slot_search import Floats, improve, room, steady

KEEP_SLACK = 0.009
"""`place_experts(keep=...)` may leave the highest load this share above that of a placement made anew."""


KEEP_ROOM = 0.7
"""And it has at least this share of the room for drift that a new one has, as far as that is less than AMPLE_ROOM."""

AMPLE_ROOM = 0.5
"""Loads that move by half are no drift any more, but others: then experts are placed by them."""


PAIRS = 1 << 20
"""Any load is compared as if the busiest expert had so many pairs."""


class Move(NamedTuple):
    """One expert's weights to be copied."""

    slot: int
    expert: int
    source: int
    """A slot that held it before."""


@dataclass(frozen=True, eq=False)
class Placement:
    """Slot p of P holds expert experts_P[p]; it is on rank p // slots_per_rank."""

    experts_P: Ints
    num_experts: int
    num_ranks: int

    def __post_init__(self) -> None:
        counts = np.bincount(self.experts_P, minlength=self.num_experts)
        if len(counts) > self.num_experts or not counts.all():
            raise ValueError(f"every expert of 0..{self.num_experts - 1} needs a slot; slots hold {self.experts_P}")
        if len(self.experts_P) % self.num_ranks:
            raise ValueError(f"{len(self.experts_P)} slots do not divide into {self.num_ranks} ranks")

    @classmethod
    def contiguous(cls, num_experts: int, num_ranks: int) -> Placement:
        """Experts in order, without replicas: what is done where nothing balances."""
        return cls(np.arange(num_experts), num_experts, num_ranks)

    @property
    def slots_per_rank(self) -> int:
        return len(self.experts_P) // self.num_ranks

    @cached_property
    def slots_ER(self) -> Ints:
        """The slots of each expert's replicas, ascending, then NO_SLOT."""
        counts = np.bincount(self.experts_P, minlength=self.num_experts)
        order = np.argsort(self.experts_P, kind="stable")
        index = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
        slots = np.full((self.num_experts, counts.max()), NO_SLOT)
        slots[self.experts_P[order], index] = order
        return slots

    def even_load(self, load_E: Floats | Ints) -> Floats:
        """Load of each rank if the replicas of an expert share alike: [G]."""
        weight_P = (load_E / np.bincount(self.experts_P, minlength=self.num_experts))[self.experts_P]
        return np.asarray(weight_P.reshape(self.num_ranks, -1).sum(1), np.float64)

    def level_load(self, counts_E: Ints, *, sweeps: int = SWEEPS) -> Ints:
        """Load of each rank if the pairs of a batch are divided by `level_split`: [G]."""
        shape = {"num_ranks": self.num_ranks, "slots_per_rank": self.slots_per_rank}
        return rank_load(level_split(counts_E, self.slots_ER, **shape, sweeps=sweeps), self.slots_ER, **shape)

    def moves_from(self, old: Placement) -> list[Move]:
        """What must be copied to come here from `old`: every slot whose expert is new to its rank, and every slot that
        holds another expert of its rank than before."""
        source = old.slots_ER[:, 0]
        changed = np.flatnonzero(self.experts_P != old.experts_P)
        return [Move(int(p), int(self.experts_P[p]), int(source[self.experts_P[p]])) for p in changed]


def place_experts(load_E: Floats | Ints, num_slots: int, num_ranks: int, *, keep: Placement | None = None) -> Placement:
    """The placement for an expected load of each expert, >= 0, in any unit; deterministic.

    With `keep`, the placement until now: one with few moves from it, whose highest load is at most KEEP_SLACK above
    that of a new one. Raises ValueError if a load is negative or not finite, or the slots are too few or don't divide
    into ranks.
    """
    load = np.asarray(load_E, np.float64)
    num_experts = len(load)
    if not np.isfinite(load).all() or (load < 0).any():
        raise ValueError(f"loads must be finite and >= 0, got {load.min()} to {load.max()}; check what was counted")
    if num_ranks < 1 or num_slots < num_experts or num_slots % num_ranks:
        raise ValueError(
            f"{num_slots} slots must be a multiple of the {num_ranks} ranks and at least the {num_experts} experts"
        )
    if keep is not None and (keep.num_experts, keep.num_ranks, len(keep.experts_P)) != (
        num_experts,
        num_ranks,
        num_slots,
    ):
        raise ValueError("the placement to keep is of other experts, ranks or slots; place anew without it")
    new = _placed_anew(load, num_slots, num_ranks)
    if keep is None:
        return new
    limit = new.even_load(load).max() * (1 + KEEP_SLACK)
    ample = min(room(new.experts_P, load, num_ranks), AMPLE_ROOM)
    enough = ample - (1 - KEEP_ROOM) * abs(ample)  # Room is negative where the ranks can't be even.
    found = [_matched(new, keep)]
    for begin in (keep, _with_replicas_of(new, keep, load)):
        experts = steady(improve(begin.experts_P, load, num_ranks, limit), load, num_ranks, limit, enough)
        near = _in_order_of(keep, replace(keep, experts_P=experts))
        if near.even_load(load).max() <= limit and room(experts, load, num_ranks) >= enough:
            found.append(near)
    return min(found, key=lambda placement: len(placement.moves_from(keep)))


def _placed_anew(load: Floats, num_slots: int, num_ranks: int) -> Placement:
    """Replicas of an expert on ranks of their own, where pairs can be divided; as EPLB packs them if even then that is
    better."""
    mean = load.sum() / num_ranks
    plain = _pack(load, _replicate(load, num_slots, num_slots), num_ranks, apart=False)
    apart = _pack(load, _replicate(load, num_slots, num_ranks), num_ranks, apart=True)
    assert plain is not None
    found = [_improved(packed, load, mean) for packed in (apart, plain) if packed is not None]
    counts = np.rint(load / (load.max() or 1.0) * PAIRS).astype(np.int64)
    divided = [int(placement.level_load(counts).max()) for placement in found]
    best = found[0] if divided[0] <= divided[-1] * (1 + 1e-4) else found[1]
    roof = max(plain.even_load(load).max(), best.even_load(load).max())
    return replace(best, experts_P=steady(best.experts_P, load, num_ranks, roof))


def _replicate(load: Floats, num_slots: int, most: int) -> Ints:
    """Replicas of each expert, one at least and `most` if there are others to take the rest; of equal loads the expert
    with fewer gets the next, then the lower id."""
    counts = np.ones(len(load), np.int64)
    for _ in range(num_slots - len(load)):
        share = np.where(counts < most, load / counts, -1.0)
        counts[np.lexsort((counts, -share))[0]] += 1
    return counts


def _pack(load: Floats, counts: Ints, num_ranks: int, *, apart: bool) -> Placement | None:
    """Replicas, the heaviest first, each to the lightest rank with a free slot; `apart`: that has none of its expert,
    or None if there is no such rank."""
    experts = np.repeat(np.arange(len(load)), counts)
    weights = (load / counts)[experts]
    capacity = len(experts) // num_ranks
    ranks: list[list[int]] = [[] for _ in range(num_ranks)]
    total = [0.0] * num_ranks
    for index in np.argsort(-weights, kind="stable"):
        expert = int(experts[index])
        free = [g for g in range(num_ranks) if len(ranks[g]) < capacity and not (apart and expert in ranks[g])]
        if not free:
            return None
        lightest = min(free, key=total.__getitem__)
        ranks[lightest].append(expert)
        total[lightest] += float(weights[index])
    return Placement(np.array(ranks).reshape(-1), len(load), num_ranks)


def _improved(placement: Placement, load: Floats, limit: float) -> Placement:
    return replace(placement, experts_P=improve(placement.experts_P, load, placement.num_ranks, limit))


def _with_replicas_of(new: Placement, old: Placement, load: Floats) -> Placement:
    """As many replicas of each expert as `new` has, in the slots of `old` as far as they are there."""
    counts = np.bincount(new.experts_P, minlength=new.num_experts)
    experts, weight = old.experts_P.copy(), load / counts
    rank_P = np.arange(len(experts)) // old.slots_per_rank
    total = np.bincount(rank_P, weights=weight[experts], minlength=old.num_ranks)
    free: list[int] = []
    for expert in np.flatnonzero(np.bincount(experts, minlength=old.num_experts) > counts):
        held = np.flatnonzero(experts == expert)
        # The last ones that go are those on the lightest ranks.
        free += held[np.argsort(-total[rank_P[held]], kind="stable")][: len(held) - counts[expert]].tolist()
    np.subtract.at(total, rank_P[free], weight[experts[free]])
    experts[free] = NO_SLOT
    missing = np.repeat(np.arange(len(counts)), counts - np.bincount(experts[experts >= 0], minlength=len(counts)))
    for expert in missing[np.argsort(-weight[missing], kind="stable")].tolist():
        taken = set(rank_P[experts == expert].tolist())
        slot = min(free, key=lambda p: (rank_P[p] in taken, total[rank_P[p]], p))
        free.remove(slot)
        experts[slot] = expert
        total[rank_P[slot]] += weight[expert]
    return replace(old, experts_P=experts)


def _matched(new: Placement, old: Placement) -> Placement:
    """`new` with its ranks, and the slots in them, in an order that leaves many experts where `old` has them."""
    wanted = new.experts_P.reshape(new.num_ranks, -1)
    held = old.experts_P.reshape(old.num_ranks, -1)
    ours, theirs = ([Counter(rank) for rank in ranks.tolist()] for ranks in (wanted, held))
    common = np.array([[(a & b).total() for b in theirs] for a in ours])
    result = np.empty_like(held)
    for _ in range(new.num_ranks):
        a, b = np.unravel_index(common.argmax(), common.shape)
        common[a, :] = common[:, b] = -1
        result[b] = wanted[a]
    return _in_order_of(old, replace(new, experts_P=result.reshape(-1)))


def _in_order_of(old: Placement, new: Placement) -> Placement:
    """`new` with the slots of each rank in an order that leaves experts where `old` has them."""
    ranks = zip(new.experts_P.reshape(new.num_ranks, -1), old.experts_P.reshape(new.num_ranks, -1), strict=True)
    experts = [_in_place(wanted.tolist(), held.tolist()) for wanted, held in ranks]
    return replace(new, experts_P=np.array(experts).reshape(-1))


def _in_place(wanted: list[int], held: list[int]) -> list[int]:
    """`wanted` in an order that agrees with `held` wherever both have an expert."""
    left = list(wanted)
    kept = []
    for expert in held:
        kept.append(expert if expert in left else NO_SLOT)
        if expert in left:
            left.remove(expert)
    return [left.pop(0) if expert == NO_SLOT else expert for expert in kept]
