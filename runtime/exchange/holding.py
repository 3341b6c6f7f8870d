"""What each rank of a side holds: which part of which tensor, under which name, and where in its own array.

    whole tensors      q [8, d]    k [4, d]                      as both sides know them
    fused              qkv = q | k                               Held: parts that lie end to end
    split over tp      rank 0: q[0:4] | k[0:2]                   Split: of the whole tensors (heads, columns, experts)
    sharded by FSDP    rank 0: (q[0:4] | k[0:2])[0:3]            Shard: of the array that is left

Two sides that speak of the same whole tensors can exchange them, however each of them names, fuses and cuts (plan.py).
Irregular shards (a flattened FSDP buffer) can't be said here. Knows nothing of models and of memory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from .boxes import Box
from .header import stored
from .mesh import Mesh, chunk


@dataclass(frozen=True)
class Whole:
    """A tensor as nobody needs to hold it: entire, under the name that both sides know."""

    name: str
    dtype: str
    """One of header.DTYPES."""
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return stored(self.dtype).itemsize * math.prod(self.shape)

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


@dataclass(frozen=True)
class Split:
    """Cuts dimension `dim` of whole tensors among the ranks along `axes`, `grain` elements (a head) staying together.

    With `repeat`, where there are more ranks than grains, neighbours hold the same grain.
    """

    dim: int
    axes: tuple[str, ...]
    grain: int = 1
    repeat: bool = False

    def bounds(self, length: int, mesh: Mesh) -> tuple[np.ndarray, np.ndarray]:
        """Where the share of each rank begins and ends."""
        ranks, index, grains = mesh.extent(self.axes), mesh.index(self.axes), length // self.grain
        if self.repeat and ranks > grains:
            index, ranks = index * grains // ranks, grains
        start, stop = chunk(grains, index, ranks)
        return start * self.grain, stop * self.grain


@dataclass(frozen=True)
class Shard:
    """Cuts dimension `dim` of the array that splits have left, among the ranks along `axes`."""

    dim: int
    axes: tuple[str, ...]


@dataclass(frozen=True)
class Part:
    """What of a whole tensor a held one is made of: all of it, or `box`, such as one expert of a stack."""

    whole: Whole
    splits: tuple[Split, ...] = ()
    box: Box | None = None


@dataclass(frozen=True)
class Held:
    """An array that ranks have: parts end to end along dimension `fuse`, each split, then the result sharded.

    Dimensions count as in the whole tensors; a held array of fewer lacks the first ones, which must be of length one.
    """

    name: str
    parts: tuple[Part, ...]
    shards: tuple[Shard, ...] = ()
    fuse: int = 0
    where: tuple[tuple[str, int], ...] = ()
    """(axis, place): only ranks that stand there have it, such as a stage of a pipeline."""
    num_dims: int | None = None
    """Of the held array; as many as the whole ones by default."""

    @property
    def dims(self) -> int:
        """Dimensions of the held array."""
        return len(self.parts[0].whole.shape) if self.num_dims is None else self.num_dims

    @property
    def form(self) -> tuple[object, ...]:
        """All but the names: what is of the same form lies alike."""
        parts = tuple((p.whole.dtype, p.whole.shape, p.splits, p.box) for p in self.parts)
        return parts, self.shards, self.fuse, self.where, self.num_dims


class Pieces(NamedTuple):
    """Where the parts of a Held lie on each rank, int64 [ranks, parts, dimensions]."""

    start: np.ndarray
    """In the whole tensor."""
    stop: np.ndarray
    at: np.ndarray
    """Of the same elements in the held array."""
    shape: np.ndarray
    """Of the held array, [ranks, dimensions]."""


class Holding:
    """One side: a mesh of ranks and the arrays that they hold.

    Raises ValueError if parts do not fit together, a split does not go into its dimension, or two arrays of a rank have
    one name.
    """

    def __init__(self, mesh: Mesh, held: Sequence[Held]) -> None:
        self.mesh = mesh
        self.held = tuple(held)
        if len({h.name for h in held}) < len(held):
            names = [h.name for h in held]
            raise ValueError(f"held twice under one name: {sorted({name for name in names if names.count(name) > 1})}")
        self.wholes: dict[str, Whole] = {}
        for item in held:
            for part in item.parts:
                known = self.wholes.setdefault(part.whole.name, part.whole)
                if known != part.whole:
                    raise ValueError(f"{known.name} is said to be {known} and {part.whole}; it must be one of them")
        self._pieces: dict[object, Pieces] = {}

    def pieces(self, held: Held) -> Pieces:
        """Where everything of `held` lies, on all ranks."""
        if held.form not in self._pieces:
            self._pieces[held.form] = _locate(held, self.mesh)
        return self._pieces[held.form]

    @cached_property
    def by_whole(self) -> Mapping[str, list[tuple[int, int]]]:
        """Name of a whole tensor -> (number of the Held, number of the part in it)."""
        found: dict[str, list[tuple[int, int]]] = {}
        for h, held in enumerate(self.held):
            for p, part in enumerate(held.parts):
                found.setdefault(part.whole.name, []).append((h, p))
        return found

    def local(self, rank: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        """What arrays this rank holds: name -> (dtype, shape). Those of which it has nothing are left out."""
        row, arrays = rank - self.mesh.first, {}
        for held in self.held:
            shape = self.pieces(held).shape[row]
            if shape.all():
                arrays[held.name] = held.parts[0].whole.dtype, tuple(shape[len(shape) - held.dims :].tolist())
        return arrays

    def nbytes(self) -> np.ndarray:
        """Bytes that each rank holds, int64 [ranks]."""
        total = np.zeros(self.mesh.size, np.int64)
        for held in self.held:
            total += self.pieces(held).shape.prod(1) * stored(held.parts[0].whole.dtype).itemsize
        return total


def _locate(held: Held, mesh: Mesh) -> Pieces:
    """Splits the whole tensors, fuses what is left, then shards that."""
    boxes = [_split(held, part, mesh) for part in held.parts]
    start, stop = (np.stack([box[side] for box in boxes], 1) for side in (0, 1))
    for axis, place in held.where:
        stop[mesh.index((axis,)) != place] = start[mesh.index((axis,)) != place]
    stop[(stop <= start).any(2)] = start[(stop <= start).any(2)]
    length = stop - start
    at = np.zeros_like(start)
    at[:, :, held.fuse] = length[:, :, held.fuse].cumsum(1) - length[:, :, held.fuse]
    shape = length.max(1)
    shape[:, held.fuse] = length[:, :, held.fuse].sum(1)
    for shard in held.shards:
        dim = shard.dim
        first, last = chunk(shape[:, dim], mesh.index(shard.axes), mesh.extent(shard.axes))
        begin = np.maximum(at[:, :, dim], first[:, None])
        end = np.maximum(np.minimum(at[:, :, dim] + (stop - start)[:, :, dim], last[:, None]), begin)
        start[:, :, dim] += begin - at[:, :, dim]
        stop[:, :, dim] = start[:, :, dim] + end - begin
        at[:, :, dim] = begin - first[:, None]
        shape[:, dim] = last - first
    return Pieces(start, stop, at, shape)


def _split(held: Held, part: Part, mesh: Mesh) -> tuple[np.ndarray, np.ndarray]:
    """The box of each rank in the whole tensor of `part`, [ranks, dimensions]."""
    whole = part.whole
    box = part.box or Box((0,) * len(whole.shape), whole.shape)
    first = held.parts[0]
    inside = all(0 <= a <= b <= n for a, b, n in zip(box.start, box.stop, whole.shape, strict=True))
    shapes = zip((part.box or box).shape, (first.box.shape if first.box else first.whole.shape), strict=True)
    if (
        not inside
        or whole.dtype != first.whole.dtype
        or any(a != b for d, (a, b) in enumerate(shapes) if d != held.fuse)
    ):
        raise ValueError(
            f"{held.name}: {whole.name} {whole}, {box}, can't lie beside {first.whole.name} {first.whole} along "
            f"dimension {held.fuse}; dtypes and all other lengths must be equal"
        )
    start, stop = (np.tile(np.array(side, np.int64), (mesh.size, 1)) for side in box)
    for split in part.splits:
        length = whole.shape[split.dim]
        if length % split.grain:
            raise ValueError(f"{whole.name} {whole}: dimension {split.dim} is no multiple of the grain {split.grain}")
        first_, last = split.bounds(length, mesh)
        start[:, split.dim] = np.maximum(start[:, split.dim], first_)
        stop[:, split.dim] = np.minimum(stop[:, split.dim], last)
    return start, stop
