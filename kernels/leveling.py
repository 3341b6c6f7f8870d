"""Divides the pairs of replicated experts among their replicas so that no rank has more to do than it must.

    even split --> sweep: each replicated expert in turn pours its pairs again, onto the ranks that have least --> ...

A pour is exact: of all ways to divide one expert's pairs it gives the lowest loads, and never raises the highest. Each
also lowers the sum of squared loads, which is convex, so that sweeps converge to the optimum of all experts together.
All numbers are integers: every machine, and the kernel, comes to the same bits. Knows nothing of torch.
Shapes: E experts, R replicas of an expert at most, G ranks.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

NO_SLOT = -1
"""In place of a slot, where an expert has fewer than R replicas."""

SWEEPS = 8
"""At most; few loads need more than four. The highest load is then within 0.5 % of the optimum: `bin/bench balance`."""


def even_split(counts_E: Ints, slots_ER: Ints) -> Ints:
    """As many pairs for each replica of an expert, what is left over for the first ones: int64 [E, R]."""
    held_ER = slots_ER != NO_SLOT
    share_E, left_E = np.divmod(counts_E, held_ER.sum(1))
    index_R = np.arange(slots_ER.shape[1])
    return np.where(held_ER, share_E[:, None] + (index_R < left_E[:, None]), 0)


def level_split(counts_E: Ints, slots_ER: Ints, *, num_ranks: int, slots_per_rank: int, sweeps: int = SWEEPS) -> Ints:
    """Pairs of each replica, int64 [E, R]; row e sums to counts_E[e], which is >= 0.

    slots_ER [E, R] are the slots of each expert's replicas, NO_SLOT after the last one; slot s is on rank
    s // slots_per_rank. Of replicas of one expert on one rank, the first gets all that the rank takes. Never worse than
    `even_split`.
    """
    quota_ER = even_split(counts_E, slots_ER)
    ranks_ER = np.where(slots_ER == NO_SLOT, NO_SLOT, slots_ER // slots_per_rank)
    homes = {
        int(expert): _first_on_each_rank(ranks_ER[expert])
        for expert in np.flatnonzero(slots_ER[:, 1:].max(1, initial=NO_SLOT) != NO_SLOT)
    }
    load_G = rank_load(quota_ER, slots_ER, num_ranks=num_ranks, slots_per_rank=slots_per_rank)
    for expert, first in homes.items():
        merged = [quota_ER[expert, ranks_ER[expert] == rank].sum() for rank in ranks_ER[expert, first]]
        quota_ER[expert] = 0
        quota_ER[expert, first] = merged
    for _ in range(sweeps):
        changed = False
        for expert, first in homes.items():
            ranks, old = ranks_ER[expert, first], quota_ER[expert, first]
            new = pour(int(counts_E[expert]), load_G[ranks] - old)
            load_G[ranks] += new - old
            quota_ER[expert, first] = new
            changed |= not np.array_equal(new, old)
        if not changed:
            break
    return quota_ER


def pour(amount: int, base_M: Ints) -> Ints:
    """Raises the lowest of `base_M` by `amount` in all, to one level: how much each is raised, int64 [M].

    What can't be divided goes to the lowest, of equal ones to the first.
    """
    order = np.argsort(base_M, kind="stable")
    low = base_M[order]
    filled = amount + np.cumsum(low)
    wet = int(np.count_nonzero(filled >= low * np.arange(1, len(low) + 1)))  # A prefix, as `low` ascends.
    level, left = divmod(int(filled[wet - 1]), wet)
    raised = np.zeros_like(base_M)
    raised[order[:wet]] = level - low[:wet] + (np.arange(wet) < left)
    return raised


def rank_load(quota_ER: Ints, slots_ER: Ints, *, num_ranks: int, slots_per_rank: int) -> Ints:
    """Pairs of each rank: int64 [G]."""
    held_ER = slots_ER != NO_SLOT
    load_G = np.zeros(num_ranks, np.int64)
    np.add.at(load_G, slots_ER[held_ER] // slots_per_rank, quota_ER[held_ER])
    return load_G


def _first_on_each_rank(ranks_R: Ints) -> list[int]:
    """Indices of the replicas that are the first of their expert on their rank."""
    ranks = ranks_R.tolist()
    return [i for i, rank in enumerate(ranks) if rank != NO_SLOT and rank not in ranks[:i]]
