"""Actors for tests of supervision and kept state, importable by node processes."""

import asyncio
import os
from dataclasses import dataclass
from typing import Any

from headrace.runtime import Actor, Lane, message
from headrace.runtime.errors import RuntimeFault


@dataclass(kw_only=True)
class Tally(Actor):
    """Adds up, and keeps the sum when it is told to."""

    async def start(self) -> None:
        self.sum = 0
        self.ballast = b""
        self.restored: list[Any] = []

    async def stop(self, reason: BaseException | None) -> None:
        self.log("total", sum=self.sum)

    def snapshot(self) -> Any:
        return {"sum": self.sum, "ballast": self.ballast}

    def restore(self, state: Any) -> None:
        self.restored.append(state["sum"])
        self.sum = state["sum"]

    @message
    async def add(self, number: int) -> int:
        self.sum += number
        return self.sum

    @message
    async def add_slowly(self, number: int) -> None:
        await asyncio.sleep(0.02)
        self.sum += number

    @message
    async def add_and_save(self, number: int) -> int:
        self.sum += number
        await self.save()
        return self.sum

    @message
    async def grow(self, size: int) -> str:
        self.ballast = b"x" * size
        try:
            await self.save()
        except RuntimeFault as error:
            return f"{type(error).__name__}: {error}"
        return ""

    @message
    async def boom(self) -> None:
        raise ValueError("boom")

    @message
    async def half_done(self) -> None:
        self.sum += 1000
        await asyncio.sleep(0.3)
        self.sum -= 1000

    @message(concurrent=True, lane=Lane.CONTROL)
    async def look(self) -> tuple[int, int, int, list[Any]]:
        """Sum, process, epoch, and what was restored."""
        return self.sum, os.getpid(), self.epoch, self.restored


@dataclass(kw_only=True)
class Saver(Tally):
    """Keeps its sum every few milliseconds."""

    snapshot_every_s = 0.02


@dataclass(kw_only=True)
class Rare(Tally):
    """Keeps its sum once an hour, and when it is stopped."""

    snapshot_every_s = 3600.0


@dataclass(kw_only=True)
class Forwarder(Tally):
    """Passes what it gets on to another actor."""

    to: str = ""

    @message
    async def forward(self, number: int) -> None:
        await asyncio.sleep(0.01)
        self.find(self.to).add.cast(number)


@dataclass(kw_only=True)
class Watcher(Actor):
    """Remembers how another actor ended."""

    of: str

    async def start(self) -> None:
        self.exits: list[Any] = []
        self.background(self._watch(), name="watch")

    async def _watch(self) -> None:
        async for status in self.watch(self.of):
            if status.exit is not None:
                self.exits.append(status.exit)

    @message
    async def seen(self) -> list[Any]:
        return self.exits
