"""Which tokens of a batch each rank attends with, where they are divided: two pieces, one from each end.

    tokens of a long prompt   | 0 | 1 | 2 | 3 | 3 | 2 | 1 | 0 |      the later a token, the more it looks back to

Knows nothing of ranks' other axes, or of torch's distribution.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..runner import Batch
from .mesh import Place


@dataclass(frozen=True, slots=True)
class Share:
    """One rank's tokens of a batch of T."""

    rows: Tensor
    """int64 [n], ascending"""
    batch: Batch
    """Those tokens as a batch: what is one sequence there may be two here"""
    width: int
    """Tokens of the largest share"""
    order: Tensor
    """int64 [T]: where each token is in the shares of all, each filled up to `width`"""
    expert_rows: Tensor
    """int64 [m], ascending: the tokens whose experts this rank and others with its s compute"""


def share_of(batch: Batch, place: Place, least: int, device: torch.device | str = "cpu") -> Share | None:
    """None if there are less than `least` tokens for each rank, or only one rank to share them."""
    num, total = place.num_rows, len(batch.tokens)
    if num == 1 or total < max(least, 2) * num:
        return None
    shares = _pieces(total, num)
    width = max(map(len, shares))
    order = np.empty(total, np.int64)
    for index, rows in enumerate(shares):
        order[rows] = index * width + np.arange(len(rows))
    first = place.s * place.mesh.ep
    together = np.sort(np.concatenate(shares[first : first + place.mesh.ep]))
    rows = shares[place.row]
    own, where, experts = (torch.from_numpy(numbers).to(device) for numbers in (rows, order, together))
    return Share(own, _part(batch, rows), width, where, experts)


def _pieces(total: int, num: int) -> list[np.ndarray]:
    pieces = np.array_split(np.arange(total), 2 * num)
    return [np.concatenate((pieces[i], pieces[2 * num - 1 - i])) for i in range(num)]


def _part(batch: Batch, rows: np.ndarray) -> Batch:
    """Runs of neighbours of one sequence become sequences, with its pages."""
    owner = np.repeat(np.arange(len(batch.counts)), batch.counts)[rows]
    begins = np.flatnonzero(np.concatenate(([True], (np.diff(rows) != 1) | (np.diff(owner) != 0))))
    counts = np.diff(np.append(begins, len(rows)))
    return Batch(
        tokens=batch.tokens[rows],
        positions=batch.positions[rows],
        counts=counts,
        tables=batch.tables[owner[begins]],
        num_decode=int(np.searchsorted(rows, batch.num_decode)),
        wanted=np.zeros(0, np.int64),
    )
