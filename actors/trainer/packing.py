"""Splits sequences into micro-batches of about equal work. Pure Python and numpy; knows nothing of models.

Karmarkar and Karp's differencing method (1982), for k subsets: begin with one partial solution per item, and always
combine the two whose subset sums differ most, the largest sum of one with the smallest of the other.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


def pack(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Splits sequences into the fewest micro-batches found whose tokens are balanced and at most `max_tokens` each.

    Returns indices into `lengths`; every index once, ascending in its micro-batch. A sequence longer than `max_tokens`
    is alone in its micro-batch.
    """
    alone = [[i] for i, length in enumerate(lengths) if length > max_tokens]
    rest = [i for i, length in enumerate(lengths) if length <= max_tokens]
    loads = [lengths[i] for i in rest]
    num_bins = math.ceil(sum(loads) / max_tokens)
    while True:
        bins = [[rest[i] for i in b] for b in balance(loads, num_bins) if b]
        if all(sum(lengths[i] for i in b) <= max_tokens for b in bins):
            return alone + bins
        num_bins += 1


def balance(loads: Sequence[float], num_bins: int) -> list[list[int]]:
    """Partitions items into `num_bins` lists of indices with about equal sums of `loads`; lists may be empty.

    Deterministic. O(n k log k) for n items and k bins.
    """
    if not loads:
        return [[] for _ in range(num_bins)]
    first = np.zeros(num_bins)
    heap: list[tuple[float, int, _Partial]] = []
    for item, load in enumerate(loads):
        sums = first.copy()
        sums[0] = load
        heap.append((-float(load), item, _Partial(sums, item)))
    heapq.heapify(heap)
    for serial in range(len(loads), 2 * len(loads) - 1):
        left, right = heapq.heappop(heap)[2], heapq.heappop(heap)[2]
        sums = left.sums + right.sums[::-1]
        order = np.argsort(-sums, kind="stable")
        merged = _Partial(sums[order], -1, left, right, order)
        heapq.heappush(heap, (float(merged.sums[-1] - merged.sums[0]), serial, merged))
    return _bins(heap[0][2], num_bins)


class _Partial(NamedTuple):
    """A solution for some of the items: an item alone in bin 0, or two partial solutions merged."""

    sums: np.ndarray
    """float64 [k], descending"""
    item: int
    left: _Partial | None = None
    right: _Partial | None = None
    order: np.ndarray | None = None
    """int64 [k]: bin j is bin order[j] of `left` with bin k - 1 - order[j] of `right`"""


def _bins(solution: _Partial, num_bins: int) -> list[list[int]]:
    """Follows every item down the tree of merges to its bin."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    stack = [(solution, np.arange(num_bins))]
    while stack:
        partial, labels = stack.pop()
        if partial.left is None or partial.right is None or partial.order is None:
            bins[labels[0]].append(partial.item)
            continue
        left_labels = np.empty_like(labels)
        left_labels[partial.order] = labels
        stack += [(partial.left, left_labels), (partial.right, left_labels[::-1])]
    return [sorted(b) for b in bins]
