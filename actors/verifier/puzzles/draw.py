"""Random choices of one puzzle: the same puzzle whenever and wherever its number is asked for.

The numbers are counter-based (actors/philox.py); their lane is made of the task's name, the level and the block, so
that no two puzzles share one. Knows nothing of what is drawn.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from typing import TypeVar

from ...philox import Stream, uniforms

T = TypeVar("T")

_BLOCK = 256
_MAX_BLOCKS = 1 << 12


class Draw:
    """Choices for puzzle number `ordinal` of `seed`, for a task and a level (1..15)."""

    def __init__(self, seed: int, ordinal: int, task: str, level: int) -> None:
        self._seed, self._ordinal = seed, ordinal
        self._lane = (zlib.crc32(task.encode()) & 0xFFFF) << 16 | level << 12
        self._numbers: list[float] = []
        self._blocks = 0

    def unit(self) -> float:
        """A number strictly inside (0, 1)."""
        if not self._numbers:
            assert self._blocks < _MAX_BLOCKS, "a puzzle that needs a million random numbers"
            lane = self._lane | self._blocks
            self._numbers = uniforms(self._seed, Stream.PUZZLE, self._ordinal, lane, _BLOCK).tolist()
            self._blocks += 1
        return self._numbers.pop()

    def below(self, bound: int) -> int:
        """One of 0..bound-1."""
        return int(self.unit() * bound)

    def between(self, low: int, high: int) -> int:
        """One of low..high, both included."""
        return low + self.below(high - low + 1)

    def chance(self, probability: float) -> bool:
        return self.unit() < probability

    def pick(self, items: Sequence[T]) -> T:
        return items[self.below(len(items))]

    def shuffled(self, items: Iterable[T]) -> list[T]:
        """All of `items` in random order (Fisher and Yates)."""
        order = list(items)
        for i in range(len(order) - 1, 0, -1):
            j = self.below(i + 1)
            order[i], order[j] = order[j], order[i]
        return order

    def sample(self, items: Iterable[T], count: int) -> list[T]:
        """`count` different ones of `items`, in random order."""
        return self.shuffled(items)[:count]
