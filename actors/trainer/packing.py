"""Splits sequences into parts of about equal work: over ranks, and into micro-batches. Knows nothing of models.

    plan:  sequences --balance by cost--> ranks --pack by tokens--> micro-batches, as many on every rank

Karmarkar and Karp's differencing method (1982), for k subsets: begin with one partial solution per item, and always
combine the two whose subset sums differ most, the largest sum of one with the smallest of the other. What it leaves is
refined: as long as that lowers the heaviest bin, an item moves to a lighter bin, or is exchanged for one there.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

CLOSE = 1e-6
"""A heaviest bin that is above the mean by at most this share of it is not refined."""


def plan(lengths: Sequence[int], costs: Sequence[float], ranks: int, max_tokens: int) -> list[list[list[int]]]:
    """Micro-batches of every rank: ranks of about equal cost, then packed by tokens as in `pack`.

    Returns indices into `lengths`. Every rank has as many micro-batches, so that ranks can meet after each; some are
    empty where a rank has fewer sequences than that.
    """
    shares = balance(costs, ranks)
    packed = [pack([lengths[i] for i in share], max_tokens) for share in shares]
    most = max(map(len, packed))
    rounds = [
        pack([lengths[i] for i in share], max_tokens, at_least=most) if len(own) < most else own
        for share, own in zip(shares, packed, strict=True)
    ]
    return [
        [[share[i] for i in part] for part in own] + [[]] * (most - len(own))
        for share, own in zip(shares, rounds, strict=True)
    ]


def pack(lengths: Sequence[int], max_tokens: int, *, at_least: int = 0) -> list[list[int]]:
    """Splits sequences into the fewest micro-batches found whose tokens are balanced and at most `max_tokens` each.

    Returns indices into `lengths`; every index once, ascending in its micro-batch; none is empty. There are `at_least`
    micro-batches if there are as many sequences. A sequence longer than `max_tokens` is alone in its micro-batch.
    """
    alone = [[i] for i, length in enumerate(lengths) if length > max_tokens]
    rest = [i for i, length in enumerate(lengths) if length <= max_tokens]
    loads = [lengths[i] for i in rest]
    num_bins = max(math.ceil(sum(loads) / max_tokens), min(at_least - len(alone), len(rest)))
    while True:
        bins = [[rest[i] for i in b] for b in balance(loads, num_bins) if b]
        if all(sum(lengths[i] for i in b) <= max_tokens for b in bins):
            return alone + bins
        num_bins += 1


def balance(loads: Sequence[float], num_bins: int, *, equal_counts: bool = False) -> list[list[int]]:
    """Partitions items into `num_bins` lists of indices with about equal sums of `loads`; lists may be empty.

    With `equal_counts` the lists differ in length by one at most. Deterministic; O(n k log k) for n items and k bins.
    """
    if not len(loads):
        return [[] for _ in range(num_bins)]
    weights = np.asarray(loads, np.float64)
    leaves, items = _blocks(weights, num_bins) if equal_counts else _singles(weights, num_bins)
    bins = _bins(_combine(leaves), items, num_bins)
    _refine(weights, bins, exchange_only=equal_counts)
    return [sorted(b) for b in bins]


class _Merge(NamedTuple):
    """Two partial solutions made one, each by its number: that of a leaf, or of the merge that made it."""

    left: int
    right: int
    order: np.ndarray
    """int64 [k]: bin j is bin order[j] of `left` with bin k - 1 - order[j] of `right`"""


def _singles(weights: np.ndarray, num_bins: int) -> tuple[np.ndarray, list[list[int]]]:
    """Every item alone in bin 0. Sums [n, k], descending in a row, and the items of the first bins of each."""
    sums = np.zeros((len(weights), num_bins))
    sums[:, 0] = weights
    return sums, [[item] for item in range(len(weights))]


def _blocks(weights: np.ndarray, num_bins: int) -> tuple[np.ndarray, list[list[int]]]:
    """The heaviest k items, one in every bin, then the next k: merging keeps the bins equal in number."""
    order = np.argsort(-weights, kind="stable").tolist()
    items = [order[first : first + num_bins] for first in range(0, len(order), num_bins)]
    sums = np.zeros((len(items), num_bins))
    for row, block in zip(sums, items, strict=True):
        row[: len(block)] = weights[block]
    return sums, items


def _combine(leaves: np.ndarray) -> list[_Merge]:
    """Merges the two partial solutions of the largest spread until one is left; merge i makes number n + i."""
    lows = list(-leaves)  # Ascending, so that sorting needs no sign.
    spreads = (leaves[:, -1] - leaves[:, 0]).tolist()
    heap = list(zip(spreads, range(len(lows)), strict=True))
    heapq.heapify(heap)
    merges = []
    for serial in range(len(lows), 2 * len(lows) - 1):
        left, right = heapq.heappop(heap)[1], heapq.heappop(heap)[1]
        sums = lows[left] + lows[right][::-1]
        order = sums.argsort(kind="stable")
        sums = sums[order]
        lows.append(sums)
        merges.append(_Merge(left, right, order))
        heapq.heappush(heap, (float(sums[0]) - float(sums[-1]), serial))
    return merges


def _bins(merges: list[_Merge], items: list[list[int]], num_bins: int) -> list[list[int]]:
    """Follows every item down the tree of merges to its bin."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    stack = [(len(items) + len(merges) - 1, np.arange(num_bins))]
    while stack:
        number, labels = stack.pop()
        if number < len(items):
            for item, label in zip(items[number], labels, strict=False):
                bins[label].append(item)
            continue
        merge = merges[number - len(items)]
        left_labels = np.empty_like(labels)
        left_labels[merge.order] = labels
        stack += [(merge.left, left_labels), (merge.right, left_labels[::-1])]
    return bins


def _refine(weights: np.ndarray, bins: list[list[int]], *, exchange_only: bool) -> None:
    """Lightens the heaviest bin as long as one move or exchange with a lighter bin can, lightest first."""
    sums = np.array([weights[b].sum() for b in bins])
    ideal = sums.mean() * (1 + CLOSE)
    if (weights == np.rint(weights)).all():
        ideal = max(ideal, math.ceil(sums.mean()))  # Whole numbers: nothing is below it.
    for _ in range(4 * len(bins) + 64):
        heavy = int(sums.argmax())
        if sums[heavy] <= ideal:
            return
        for light in np.argsort(sums, kind="stable").tolist():
            found = _exchange(weights, bins[heavy], bins[light], sums[heavy] - sums[light], exchange_only)
            if found is not None:
                break
        else:
            return
        given, taken, shift = found
        bins[heavy].remove(given)
        bins[light].append(given)
        if taken is not None:
            bins[light].remove(taken)
            bins[heavy].append(taken)
        sums[heavy] -= shift
        sums[light] += shift


def _exchange(
    weights: np.ndarray, heavy: list[int], light: list[int], gap: float, exchange_only: bool
) -> tuple[int, int | None, float] | None:
    """What `heavy` gives, what it gets for it, and by how much it gets lighter: what brings two bins that differ by
    `gap` closest. None if nothing lowers the heavier."""
    ours, theirs = weights[heavy], weights[light]
    if not exchange_only:
        theirs = np.append(theirs, 0.0)
    if not len(theirs):
        return None
    order = np.argsort(theirs, kind="stable")
    shelf = theirs[order]
    # The best partner of an item is one of the two around `item - gap / 2`.
    at = np.searchsorted(shelf, ours - gap / 2)
    best: tuple[int, int | None, float] | None = None
    left = gap * (1 - CLOSE)
    for side in (at - 1, at):
        valid = (side >= 0) & (side < len(shelf))
        shifts = ours - shelf[np.clip(side, 0, len(shelf) - 1)]
        after = np.where(valid & (shifts > 0), np.abs(gap - 2 * shifts), np.inf)
        index = int(after.argmin())
        if after[index] < left:
            left = float(after[index])
            partner = int(order[side[index]])
            best = heavy[index], light[partner] if partner < len(light) else None, float(shifts[index])
    return best
