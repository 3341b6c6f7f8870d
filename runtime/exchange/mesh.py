"""Ranks arranged along named axes, and how a length is shared among them.

    Mesh({"fsdp": 2, "tp": 2})      tp ->  0 1        rank = first + row-major index over the axes
                                  fsdp |   2 3
                                       v

Knows nothing of tensors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np


class Mesh:
    """`axes`: name -> size, the last one varies fastest. Two meshes with common rank numbers share those processes.

    Raises ValueError for a size that is not positive.
    """

    def __init__(self, axes: Mapping[str, int], *, first: int = 0) -> None:
        wrong = {name: size for name, size in axes.items() if size < 1}
        if wrong or first < 0:
            raise ValueError(f"sizes of axes must be >= 1 and the first rank >= 0, got {wrong or first}")
        self.axes = dict(axes)
        self.first = first

    @property
    def size(self) -> int:
        """Ranks."""
        return math.prod(self.axes.values())

    @property
    def ranks(self) -> np.ndarray:
        """int64 [size]: their numbers."""
        return np.arange(self.first, self.first + self.size)

    def extent(self, axes: Sequence[str]) -> int:
        """Ranks along `axes` taken together. Raises ValueError for an axis that is not there."""
        self._require(axes)
        return math.prod(self.axes[axis] for axis in axes)

    def index(self, axes: Sequence[str]) -> np.ndarray:
        """int64 [size]: where each rank stands along `axes` taken together, the last of them fastest."""
        self._require(axes)
        names, index = list(self.axes), np.zeros(self.size, np.int64)
        places = np.unravel_index(np.arange(self.size), tuple(self.axes.values()) or (1,))
        for axis in axes:
            index = index * self.axes[axis] + places[names.index(axis)]
        return index

    def _require(self, axes: Sequence[str]) -> None:
        unknown = [axis for axis in axes if axis not in self.axes]
        if unknown or len(set(axes)) < len(axes):
            raise ValueError(f"axes {list(axes)} must be different ones of {list(self.axes)}")

    def __repr__(self) -> str:
        return f"Mesh({self.axes}, first={self.first})"


def chunk(length: np.ndarray | int, share: np.ndarray, shares: int) -> tuple[np.ndarray, np.ndarray]:
    """Where share number `share` of `length` begins and ends: all of ceil(length / shares), then a rest, then nothing.

    The rule of torch.chunk, by which FSDP2 and DTensor cut.
    """
    step = -(-np.asarray(length) // shares)
    return np.minimum(share * step, length), np.minimum((share + 1) * step, length)
