"""Causal attention inside each of many sequences that lie end to end. Knows nothing of layers, weights or caches."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

BUCKET_RATIO = 1.3
"""Sequences share a padded bucket if the longest is at most this many times the shortest."""


class PackedAttention:
    """An `Attend` over sequences of `lengths` tokens: pads them into buckets of similar length, attends, unpads.

    Padding follows the tokens of a sequence, so causality alone hides it.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device | str = "cpu") -> None:
        sizes = np.asarray(lengths, np.int64)
        starts = np.cumsum(sizes) - sizes
        order = np.argsort(sizes, kind="stable")
        unpad = np.empty(sizes.sum(), np.int64)
        pads: list[np.ndarray] = []
        self._buckets: list[tuple[int, int]] = []
        num_padded = first = 0
        while first < len(order):
            last = int(np.searchsorted(sizes[order], sizes[order[first]] * BUCKET_RATIO, side="right"))
            members = order[first:last]
            width = int(sizes[members[-1]])
            column = np.minimum(np.arange(width), sizes[members, None] - 1)
            pads.append((starts[members, None] + column).reshape(-1))
            for row, member in enumerate(members):
                begin = num_padded + row * width
                unpad[starts[member] : starts[member] + sizes[member]] = np.arange(begin, begin + sizes[member])
            self._buckets.append((len(members), width))
            num_padded += len(members) * width
            first = last
        self._pad = torch.from_numpy(np.concatenate(pads)).to(device)
        self._unpad = torch.from_numpy(unpad).to(device)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [T, H, D], k and v [T, G, D] -> [T, H * D]."""
        rows = [num * width for num, width in self._buckets]
        padded = [x.index_select(0, self._pad).split(rows) for x in (q, k, v)]
        outputs = []
        for bucket, *parts in zip(self._buckets, *padded, strict=True):
            a, b, c = (part.unflatten(0, bucket).transpose(1, 2) for part in parts)
            out = F.scaled_dot_product_attention(a, b, c, is_causal=True, enable_gqa=True)
            outputs.append(out.transpose(1, 2).flatten(2).flatten(0, 1))
        return torch.cat(outputs).index_select(0, self._unpad)
