"""Changes of a placement, one or two slots at a time: to even out its ranks, and to make it hold when loads drift.

Knows nothing of how a placement begins. Shapes: E experts, P slots, G ranks, U sets of ranks.
"""

from __future__ import annotations

from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from .leveling import Ints

Floats = NDArray[np.float64]

MOST_LOADS = 1 << 20
"""Loads of ranks that a step of `improve` computes; beyond, it makes replicas of experts of the busiest rank only."""

MOST_SETS = 1024
"""Sets of ranks that `steady` looks at, small ones first."""


def improve(experts_P: Ints, load_E: Floats, num_ranks: int, limit: float) -> Ints:
    """Swaps two slots (two moves) or puts another expert into the slot of a replica (one), what helps most per move
    first, until no rank has more than `limit`, replicas counted alike, or nothing helps. The highest load never rises.
    """
    changes = _Changes(experts_P, load_E, num_ranks, limit)
    for _ in range(2 * len(experts_P)):
        if not changes.change():
            break
    return changes.experts_P


def steady(experts_P: Ints, load_E: Floats, num_ranks: int, roof: float, enough: float = np.inf) -> Ints:
    """Swaps slots, while no rank gets more than `roof`, until the `room` is `enough` or as large as it gets."""
    search = _Drift(experts_P, load_E, num_ranks, roof)
    for _ in range(len(experts_P)):
        if search.room() >= enough or not search.change():
            break
    return search.experts_P


def room(experts_P: Ints, load_E: Floats, num_ranks: int) -> float:
    """How much drift of the loads `level_split` can absorb, as a share of each load.

    What experts with all replicas inside a set of ranks have to do, only these ranks can do: over its size it bounds
    the highest load from below, and the largest such bound is the optimum (max-flow min-cut). If loads drift
    independently in proportion to themselves, the room of a set over the root of the sum of its squared loads is the
    drift that it can take. This is the smallest of these, over sets of ranks.
    """
    return _Drift(experts_P, load_E, num_ranks, np.inf).room()


def _held(experts_P: Ints, num_experts: int, num_ranks: int) -> Floats:
    """Replicas of each expert on each rank: [E, G]."""
    held_EG = np.zeros((num_experts, num_ranks))
    np.add.at(held_EG, (experts_P, np.arange(len(experts_P)) // (len(experts_P) // num_ranks)), 1.0)
    return held_EG


def _sets(num_ranks: int) -> Floats:
    """Sets of ranks but the empty one and that of all, small ones first: 0 or 1 [U, G]."""
    chosen: list[tuple[int, ...]] = []
    for size in range(1, num_ranks):
        more = list(combinations(range(num_ranks), size))
        if len(chosen) + len(more) > MOST_SETS:
            break
        chosen += more
    sets = np.zeros((len(chosen), num_ranks))
    for row, members in zip(sets, chosen, strict=True):
        row[list(members)] = 1.0
    return sets


class _Drift:
    """A placement whose smallest room for drift grows."""

    def __init__(self, experts_P: Ints, load_E: Floats, num_ranks: int, roof: float) -> None:
        self.experts_P = experts_P.copy()
        self._load, self._roof, self._num_ranks = load_E, roof, num_ranks
        self._rank_P = np.arange(len(experts_P)) // (len(experts_P) // num_ranks)
        self._outside_GU = 1.0 - _sets(num_ranks).T
        self._fair_U = (num_ranks - self._outside_GU.sum(0)) * load_E.sum() / num_ranks

    def room(self) -> float:
        """See above."""
        inside_EU = self._inside(_held(self.experts_P, len(self._load), self._num_ranks))
        return float(self._room(self._load @ inside_EU, self._load**2 @ inside_EU))

    def change(self) -> bool:
        """Makes the swap that gives most room; False if there is none."""
        load, experts = self._load, self.experts_P
        held_EG = _held(experts, len(load), self._num_ranks)
        inside_EU = self._inside(held_EG)
        bound_U, spread_U = load @ inside_EU, load**2 @ inside_EU
        i, j = self._swaps(held_EG)
        if not len(self._fair_U) or not len(i):
            return False
        a, b, from_a, from_b = experts[i], experts[j], self._rank_P[i], self._rank_P[j]
        for expert, old, new in ((a, from_a, from_b), (b, from_b, from_a)):
            row = np.arange(len(expert))
            held = held_EG[expert]
            held[row, old] -= 1
            held[row, new] += 1
            gained = self._inside(held) - inside_EU[expert]
            bound_U = bound_U + gained * load[expert][:, None]
            spread_U = spread_U + gained * (load[expert] ** 2)[:, None]
        rooms = self._room(bound_U, spread_U)
        best = int(rooms.argmax())
        if rooms[best] <= self.room() + 1e-9:
            return False
        experts[i[best]], experts[j[best]] = experts[j[best]], experts[i[best]]
        return True

    def _inside(self, held: Floats) -> Floats:
        return np.asarray(held @ self._outside_GU == 0, np.float64)

    def _room(self, bound_U: Floats, spread_U: Floats) -> Floats:
        room = (self._fair_U - bound_U) / np.sqrt(np.maximum(spread_U, 1e-300))
        return np.asarray(np.where(spread_U > 0, room, np.inf).min(-1, initial=np.inf))

    def _swaps(self, held_EG: Floats) -> tuple[Ints, Ints]:
        """Pairs of slots, one of them a replica, that may change places under the roof."""
        experts, rank = self.experts_P, self._rank_P
        counts = held_EG.sum(1)
        weight = (self._load / counts)[experts]
        rank_G = weight.reshape(self._num_ranks, -1).sum(1)
        i, j = np.nonzero((counts[experts] > 1)[:, None] & (rank[:, None] != rank[None, :]))
        a, b = experts[i], experts[j]
        allowed = (held_EG[a, rank[j]] == 0) & (held_EG[b, rank[i]] == 0)
        shift = weight[i] - weight[j]
        allowed &= (rank_G[rank[j]] + shift <= self._roof) & (rank_G[rank[i]] - shift <= self._roof)
        return i[allowed], j[allowed]


class _Changes:
    """A placement while it changes. A change must lower the squares of what ranks have above the limit, most for each
    move, and not raise the highest load."""

    def __init__(self, experts_P: Ints, load_E: Floats, num_ranks: int, limit: float) -> None:
        self.experts_P = experts_P.copy()
        self._load, self._limit = load_E, limit
        self._rank_P = np.arange(len(experts_P)) // (len(experts_P) // num_ranks)
        self._num_ranks = num_ranks

    def change(self) -> bool:
        """Makes the best change; False if none helps, or none is needed."""
        self._held_EG = _held(self.experts_P, len(self._load), self._num_ranks)
        self._counts_E = self._held_EG.sum(1)
        self._weight_E = self._load / self._counts_E
        self._rank_G = self._weight_E @ self._held_EG
        self._top = int(self._rank_G.argmax())
        if self._rank_G[self._top] <= self._limit:
            return False
        gain, changes = max(self._best_swap(), self._best_replica(), key=lambda found: found[0])
        if gain <= 0:
            return False
        for slot, expert in changes:
            self.experts_P[slot] = expert
        return True

    def _excess(self, load: Floats) -> Floats:
        return np.asarray(np.maximum(load - self._limit, 0.0) ** 2)

    def _best_swap(self) -> tuple[float, list[tuple[int, int]]]:
        """Of a slot of the busiest rank with a slot of another one."""
        ours, theirs = np.flatnonzero(self._rank_P == self._top), np.flatnonzero(self._rank_P != self._top)
        if not len(theirs):
            return 0.0, []
        a, b = self.experts_P[ours][:, None], self.experts_P[theirs][None, :]
        rank = self._rank_P[theirs][None, :]
        shift = self._weight_E[a] - self._weight_E[b]
        here, there = self._rank_G[self._top], self._rank_G[rank]
        gain = self._excess(here) + self._excess(there) - self._excess(here - shift) - self._excess(there + shift)
        apart = (self._held_EG[a, rank] == 0) & (self._held_EG[b, self._top] == 0)
        gain = np.where(apart & (shift > 0) & (there + shift < here), gain / 2, 0.0)
        i, j = np.unravel_index(gain.argmax(), gain.shape)
        return float(gain[i, j]), [(int(ours[i]), int(b[0, j])), (int(theirs[j]), int(a[i, 0]))]

    def _best_replica(self) -> tuple[float, list[tuple[int, int]]]:
        """Of an expert, in the slot of some other expert's replica."""
        spare = np.flatnonzero(self._counts_E[self.experts_P] > 1)
        wanted = np.arange(len(self._load))
        if len(spare) * len(wanted) * self._num_ranks > MOST_LOADS:
            wanted = np.unique(self.experts_P[self._rank_P == self._top])
        if not len(spare):
            return 0.0, []
        a, rank = self.experts_P[spare], self._rank_P[spare]
        less = self._load[a] / (self._counts_E[a] - 1)
        more = self._load[wanted] / (self._counts_E[wanted] + 1)
        from_a = self._held_EG[a] * (less - self._weight_E[a])[:, None]
        from_a[np.arange(len(spare)), rank] -= less
        from_b = self._held_EG[wanted] * (more - self._weight_E[wanted])[:, None]
        after = self._rank_G + from_a[:, None, :] + from_b[None, :, :]
        after[np.arange(len(spare))[:, None], np.arange(len(wanted))[None, :], rank[:, None]] += more[None, :]
        gain = self._excess(self._rank_G).sum() - self._excess(after).sum(-1)
        new = (self._held_EG[wanted][:, rank].T == 0) & (after.max(-1) <= self._rank_G[self._top])
        gain = np.where(new, gain, 0.0)
        i, j = np.unravel_index(gain.argmax(), gain.shape)
        return float(gain[i, j]), [(int(spare[i]), int(wanted[j]))]
