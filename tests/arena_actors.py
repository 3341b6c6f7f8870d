"""Actors that send and keep large arrays, in a module of their own so that node processes need not import pytest."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from headrace.runtime import Actor, Lane, message


@dataclass(kw_only=True)
class Keeper(Actor):
    """Keeps what it is given until it is told to forget it."""

    async def start(self) -> None:
        self.kept: list[Any] = []

    @message
    async def keep(self, value: object) -> None:
        self.kept.append(value)

    @message
    async def sums(self) -> list[int]:
        return [int(np.asarray(value).sum(dtype=np.int64)) for value in self.kept]

    @message
    async def forget(self) -> None:
        self.kept.clear()

    @message(concurrent=True, lane=Lane.CONTROL)
    async def lent(self) -> dict[str, int]:
        assert self._node is not None
        return self._node.lending.arena.in_use()


@dataclass(kw_only=True)
class Giver(Keeper):
    """Makes arrays, and sends them on."""

    @message
    async def give(self, to: list[str], n: int, value: int, born: bool) -> None:
        """`n` bytes, all of them `value`, to each of those."""
        array = self.empty(n, np.uint8) if born else np.empty(n, np.uint8)
        array[:] = value
        for name in to:
            await self.find(name).keep(array)

    @message
    async def make(self, n: int, value: int) -> np.ndarray:
        return np.full(n, value, np.uint8)

    @message
    async def series(self, sizes: list[int]) -> Any:
        """A stream in which large items and small ones take turns."""
        for index, size in enumerate(sizes):
            yield np.full(size, index, np.uint8)
