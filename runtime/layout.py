"""How the ranks of a worker group are arranged: pipeline stage, data-parallel replica, tensor-parallel shard.

    rank = (p * dp + d) * tp + t           Layout(dp=2, tp=2):   d0: 0 1    d1: 2 3

A value; knows nothing of actors or tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, NamedTuple

from annotated_types import Ge

from .codec import wire


class Place(NamedTuple):
    """Where a rank stands."""

    p: int
    """Pipeline stage"""
    d: int
    """Data-parallel replica"""
    t: int
    """Tensor-parallel shard"""


@wire
@dataclass(frozen=True)
class Layout:
    """Sizes of the three axes. Raises ValueError if one is not positive."""

    dp: Annotated[int, Ge(1)] = 1
    """Replicas, each of which has a share of the batch."""
    tp: Annotated[int, Ge(1)] = 1
    """Ranks that share the matrices of a layer."""
    pp: Annotated[int, Ge(1)] = 1
    """Stages, each of which has a share of the layers."""

    def __post_init__(self) -> None:
        if min(self.dp, self.tp, self.pp) < 1:
            raise ValueError(f"dp, tp and pp must be at least 1, got {self.dp}, {self.tp} and {self.pp}")

    @property
    def size(self) -> int:
        """Ranks."""
        return self.dp * self.tp * self.pp

    def place(self, rank: int) -> Place:
        """Raises ValueError for a rank that is not of this layout."""
        if not 0 <= rank < self.size:
            raise ValueError(f"rank must be from 0 to {self.size - 1}, got {rank}")
        stage, shard = divmod(rank, self.tp)
        return Place(*divmod(stage, self.dp), shard)

    def rank(self, p: int, d: int, t: int) -> int:
        """The rank at a place; a negative coordinate counts from the end, as p=-1 for the last stage."""
        return (p % self.pp * self.dp + d % self.dp) * self.tp + t % self.tp


ONE = Layout()
"""One rank."""
