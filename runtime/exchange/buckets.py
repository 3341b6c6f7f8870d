"""In what pieces and in which order a rank sends and receives what a plan says.

    copies of a pair of ranks, end to end    | box | box | box ......... box | box |
    cut into buckets                         |   bucket 0   |   bucket 1   |  2   |     each of at most bucket_bytes

All buckets of all pairs have one order, and every rank does its own in that order, one at a time. So the first of those
that remain is always next at both of its ends: waiting for one another can't go in a circle, and a rank needs room for
two buckets, the one that travels and the one that is being filled or emptied. The order begins with pairs that have
no rank in common, so that many travel at once. Knows nothing of what carries them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from .boxes import cut
from .family import Moves
from .fp8 import FLOATS
from .header import stored
from .plan import Plan

ALIGN = 16
"""Boxes begin at multiples of it in a bucket."""

BUCKET_BYTES = 64 << 20
"""Large enough for the rate of a network, small beside the weights of a rank."""

_SCALE_BYTES, _CODE_BYTES = 4, 1


class Bucket(NamedTuple):
    """What goes from one rank to another at once."""

    source: int
    dest: int
    number: int
    """Among those of this pair."""
    num_buckets: int
    """Of this pair."""
    first: int
    """Rows of `Schedule.moves` that it contains: from this one ..."""
    last: int
    """... up to this one, not included."""
    nbytes: int


class Schedule:
    """The buckets of one rank, in order; `moves` and `offset` say where each box lies in the arrays and in the bucket.

    Tensors named in `quantized` (whole tensors of floating point) travel as FP8, see fp8.py. Raises ValueError if
    bucket_bytes is no positive multiple of 64, or a tensor can't be quantized.
    """

    def __init__(
        self, plan: Plan, rank: int, *, bucket_bytes: int = BUCKET_BYTES, quantized: Collection[str] = ()
    ) -> None:
        if bucket_bytes < 64 or bucket_bytes % 64:
            raise ValueError(f"bucket_bytes must be a positive multiple of 64, got {bucket_bytes}")
        self.plan = plan
        self.rank = rank
        self.bucket_bytes = bucket_bytes
        self._item = np.array([stored(whole.dtype).itemsize for whole in plan.wholes])
        self._fp8 = np.array([_quantizable(whole.name, whole.dtype, quantized) for whole in plan.wholes], bool)
        moves = _join(plan.moves(source=rank), plan.moves(dest=rank))
        local = moves.source == moves.dest
        self.local = moves.take(np.flatnonzero(local))
        """What this rank copies within its own memory."""
        self.moves, nbytes = self._cut(moves.take(_order(plan, moves, ~local)))
        self.offset = np.zeros(len(nbytes), np.int64)
        """In its bucket, of each box."""
        self.buckets = list(self._fill(nbytes))

    def quantized(self, row: int) -> bool:
        """Whether row `row` of `moves` travels as FP8."""
        return bool(self._fp8[self.moves.whole[row]])

    def peak_bytes(self) -> int:
        """Memory that the transfer needs beside the weights themselves."""
        return sum(sorted((bucket.nbytes for bucket in self.buckets), reverse=True)[:2])

    def _cut(self, moves: Moves) -> tuple[Moves, np.ndarray]:
        """Boxes that do not fit into a bucket, as several that do; and the bytes of each, padded."""
        widest = np.where(self._fp8, _CODE_BYTES + _SCALE_BYTES, self._item)[moves.whole]
        row, start, stop = cut(moves.shape, self.bucket_bytes // widest)
        moves = moves.take(row)
        shape = stop - start
        moves = moves._replace(source_at=moves.source_at + start, dest_at=moves.dest_at + start, shape=shape)
        elements, rows = shape.prod(1), shape[:, :-1].prod(1)
        plain = elements * self._item[moves.whole]
        nbytes = np.where(self._fp8[moves.whole], _padded(elements * _CODE_BYTES) + rows * _SCALE_BYTES, plain)
        return moves, _padded(nbytes)

    def _fill(self, nbytes: np.ndarray) -> Iterator[Bucket]:
        """Cuts the boxes of each pair into buckets, sets their offsets."""
        source, dest, end = self.moves.source, self.moves.dest, np.cumsum(nbytes)
        changes = np.flatnonzero((np.diff(source) != 0) | (np.diff(dest) != 0)) + 1
        for begin, finish in zip([0, *changes.tolist()], [*changes.tolist(), len(nbytes)], strict=True):
            cuts = [begin]
            while cuts[-1] < finish:
                done = end[cuts[-1] - 1] if cuts[-1] else 0
                cuts.append(min(int(np.searchsorted(end, done + self.bucket_bytes, "right")), finish))
            for number, (first, last) in enumerate(pairwise(cuts)):
                done = end[first - 1] if first else 0
                self.offset[first:last] = end[first:last] - nbytes[first:last] - done
                pair = int(source[first]), int(dest[first])
                yield Bucket(*pair, number, len(cuts) - 1, first, last, int(end[last - 1] - done))


def _order(plan: Plan, moves: Moves, chosen: np.ndarray) -> np.ndarray:
    """Rows in the one order of all ranks: pairs at equal distance do not meet, then by pair; within it as they were."""
    rows = np.flatnonzero(chosen)
    source, dest = moves.source[rows] - plan.source.mesh.first, moves.dest[rows] - plan.dest.mesh.first
    distance = (dest - source) % plan.dest.mesh.size
    return rows[np.lexsort((dest, source, distance))]


def _join(sends: Moves, receives: Moves) -> Moves:
    """Both; what a rank sends itself is in both and is kept once."""
    receives = receives.take(receives.source != receives.dest)
    return Moves(*(np.concatenate(columns) for columns in zip(sends, receives, strict=True)))


def _padded(nbytes: np.ndarray) -> np.ndarray:
    return -(-nbytes // ALIGN) * ALIGN


def _quantizable(name: str, dtype: str, quantized: Collection[str]) -> bool:
    if name in quantized and dtype not in FLOATS:
        raise ValueError(f"{name} is {dtype}: only {', '.join(FLOATS)} can travel as FP8; take it off the list")
    return name in quantized
