"""Actors that tests and the benchmark of bin/attach look into."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import Annotated, Any

from annotated_types import Ge, Gt, Le

from headrace.runtime import Actor, Lane, message, wire


@wire
@dataclass(frozen=True, kw_only=True)
class Pace:
    """A table with a live setting."""

    share: Annotated[float, Ge(0), Le(1)] = 0.5
    most: Annotated[int, Gt(0)] = 10
    least: Annotated[int, Gt(0)] = 1

    def __post_init__(self) -> None:
        if self.least > self.most:
            raise ValueError(f"least must be at most most ({self.most}), got {self.least}")


class Team:
    """An exposed object."""

    def __init__(self) -> None:
        self.size = 2

    async def resize(self, size: int) -> int:
        await asyncio.sleep(0)
        if size < 1:
            raise ValueError(f"size must be at least 1, got {size}")
        self.size = size
        return size

    def __repr__(self) -> str:
        return f"Team of {self.size}"


@dataclass(kw_only=True)
class Subject(Actor):
    """Counts in a way that shows whatever runs between two of its lines."""

    pace: Pace = Pace()
    limit: Annotated[int, Ge(0)] = 7

    live = ("pace.share", "pace.most", "limit")

    async def start(self) -> None:
        self.count = 0
        self.team = Team()
        self.expose(f"team_of_{self.name}", self.team)
        self.taken: list[float] = [self.pace.share]
        self.state = {"x": [1, 2, 3]}

    async def changed(self) -> None:
        self.taken.append(self.pace.share)

    def fits(self) -> None:
        if self.limit > 100 * self.pace.most:
            raise ValueError("limit is too large for this pace")

    @message
    async def add(self) -> int:
        """Reads, waits, writes."""
        count = self.count
        await asyncio.sleep(0)
        self.count = count + 1
        return self.count

    @message
    async def nap(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    @message
    async def sums(self, *numbers: int) -> int:
        return sum(numbers)

    @message
    async def fails(self) -> None:
        raise KeyError("no such thing")

    @message(concurrent=True, lane=Lane.CONTROL)
    async def answer(self) -> str:
        return "here"

    @message
    async def told(self) -> Pace:
        return self.pace

    @message(lane=Lane.CONTROL)
    async def explain(self, id: int) -> list[dict[str, Any]]:
        return [{"time": 0.0, "event": "seen", "id": id}] if id == 1 else []


@dataclass(kw_only=True)
class Computer(Subject):
    """Computes on its thread."""

    @message(thread=True)
    def compute(self, seconds: float) -> None:
        time.sleep(seconds)


@dataclass(kw_only=True)
class Stuck(Actor):
    """Holds up its loop."""

    async def start(self) -> None:
        self.where = "before"

    @message
    async def synchronous_work(self, seconds: float) -> str:
        self.where = "inside"
        time.sleep(seconds)  # noqa: ASYNC251
        self.where = "after"
        return self.where
