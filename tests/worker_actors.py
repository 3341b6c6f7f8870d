"""Ranks for tests of worker groups. Holds no tests."""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from headrace.actors.algorithms.updates import PolicyUpdate
from headrace.actors.trainer import Trainer
from headrace.runtime import message
from headrace.runtime.dispatch import (
    ALL_TO_ALL,
    DP,
    ONE_TO_ALL,
    PP_ONLY,
    RANK_ZERO,
    SPMD,
    THREE_D,
    Arguments,
    Protocol,
    dispatch,
)
from headrace.runtime.errors import BadSample
from headrace.runtime.layout import Layout
from headrace.runtime.worker import Worker


def by_weight(layout: Layout, asked: Arguments) -> list[Arguments | None]:
    """Each number to the rank that it names."""
    (numbers,) = asked.args
    return [Arguments(([n for n in numbers if n % layout.size == r],), {}) for r in range(layout.size)]


BY_VALUE = Protocol("BY_VALUE", by_weight, lambda answers, asked, empty: sorted(n for part in answers for n in part))


@dataclass(kw_only=True)
class Rank(Worker):
    """Answers say which rank they are of."""

    max_kept_bytes: ClassVar[int] = 1 << 20

    async def start(self) -> None:
        self.log_of_calls: list[str] = []
        self.waiting = 0

    @dispatch(DP)
    @message
    async def double(self, batch: dict[str, Any], factor: int = 2) -> dict[str, Any]:
        x = np.asarray(batch["x"])
        return {"x": factor * x, "names": [f"{name}@{self.rank}" for name in batch["names"]]}

    @dispatch(THREE_D)
    @message(thread=True)
    def sums(self, rows: np.ndarray) -> np.ndarray:
        out = self.empty(len(rows), np.float64)
        out[:] = rows.sum(1) + 1000 * self.rank
        return out

    @dispatch(THREE_D)
    @message
    async def add(self, rows: np.ndarray, more: np.ndarray) -> np.ndarray:
        return np.asarray(rows + more)

    @dispatch(ONE_TO_ALL)
    @message
    async def whoami(self, word: str = "") -> str:
        return f"{word}{self.rank}/{self.layout.size}"

    @dispatch(ONE_TO_ALL)
    @message
    async def pid(self) -> int:
        return os.getpid()

    @dispatch(ONE_TO_ALL)
    @message
    async def epochs(self) -> int:
        return self.epoch

    @dispatch(SPMD)
    @message
    async def lead(self, words: list[str]) -> list[str]:
        return [*words, str(self.rank)]

    @dispatch(ALL_TO_ALL)
    @message
    async def each(self, x: int) -> int:
        return x * 10 + self.rank

    @dispatch(PP_ONLY)
    @message
    async def stage(self) -> int:
        return self.layout.place(self.rank).p

    @dispatch(RANK_ZERO)
    @message
    async def first(self) -> int:
        return self.rank

    @dispatch(BY_VALUE)
    @message
    async def mine(self, numbers: list[int]) -> list[int]:
        return [n for n in numbers if n % self.layout.size == self.rank]

    @dispatch(DP)
    @message
    async def picky(self, numbers: list[int]) -> list[int]:
        for index, number in enumerate(numbers):
            if number < 0:
                raise BadSample.at(index, f"{number} is negative")
        if 13 in numbers:
            raise ArithmeticError("thirteen")
        return numbers

    @dispatch(DP)
    @message
    async def fussy(self, rows: np.ndarray) -> np.ndarray:
        if self.rank:
            while not await self.find(self.name.partition("/")[0]).kept_bytes():  # noqa: ASYNC110
                await asyncio.sleep(0.001)
            raise ArithmeticError("rank 0 has kept its part")
        return rows + 1

    @dispatch(DP)
    @message
    async def hang(self, numbers: list[int]) -> list[int]:
        self.waiting += 1
        try:
            await asyncio.Event().wait()
        finally:
            self.waiting -= 1
        return numbers

    @dispatch(DP)
    @message
    async def short(self, numbers: list[int]) -> list[int]:
        return numbers[1:]

    @message(concurrent=True)
    async def num_waiting(self) -> int:
        return self.waiting


@dataclass(kw_only=True)
class LonelyError(Trainer):
    """A trainer of which the second rank once, in step 2, has no memory left, while the others wait for it."""

    flag: str
    """Path of a file that says it has happened."""

    async def start(self) -> None:
        await super().start()
        step = self._learner.rl_step

        def fragile(update: PolicyUpdate) -> dict[str, float]:
            if self.rank == 1 and self._learner.step == 1 and not Path(self.flag).exists():
                Path(self.flag).touch()
                raise MemoryError("no memory for rank 1")
            return step(update)

        self._learner.rl_step = fragile  # type: ignore[method-assign]
