"""The actors of chaos.py: some send, some run, and all of them keep books."""

from __future__ import annotations

import asyncio
import itertools
import mmap
import os
import random
import struct
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from _chaos_ledger import Ledger, State, life_of

from headrace.runtime import Actor, Lane, message, timeout
from headrace.runtime.errors import MailboxFull, RemoteError, RuntimeFault

ARRAY_BYTES = 300_000
"""Large enough to go by shared memory."""

DEADLINES_S = (0.1, 0.3, 1.0, 2.0)
CASTS_PER_TURN = 32
FULL_S = 0.002
DOWN_S = 0.005

_starts = itertools.count(1)


class DurableCounter(Counter[str]):
    """A node's counters, written through to a file: the last word of a node that is killed."""

    NAMES = ("sent", "handled", "dead_letters", "withdrawn", "interrupted", "gone", "lost", "expired", "fenced")

    def __init__(self, path: Path, counts: Counter[str]) -> None:
        with path.open("w+b") as file:
            file.truncate(8 * len(self.NAMES))
            self._map = mmap.mmap(file.fileno(), 8 * len(self.NAMES))
        super().__init__()
        for name, count in counts.items():
            self[name] = count

    def __setitem__(self, name: str, count: int) -> None:
        super().__setitem__(name, count)
        if name in self.NAMES:
            struct.pack_into("<q", self._map, 8 * self.NAMES.index(name), count)

    @classmethod
    def read(cls, path: Path) -> Counter[str]:
        return Counter(dict(zip(cls.NAMES, struct.unpack(f"<{len(cls.NAMES)}q", path.read_bytes()), strict=True)))


@dataclass(kw_only=True)
class Bookkeeper(Actor):
    """Opens the books of the run."""

    folder: str
    size: int
    """Messages in the books."""

    async def start(self) -> None:
        self.ledger = Ledger(Path(self.folder), self.size)
        self.life = life_of(os.getpid(), next(_starts))
        self.make_durable()

    def make_durable(self) -> None:
        """The first actor of a node sees to it that its counters survive."""
        assert self._node is not None
        if not isinstance(self._node.counters, DurableCounter):
            path = Path(self.folder, "counters", self._node.key)
            self._node.counters = DurableCounter(path, self._node.counters)

    @message(concurrent=True, lane=Lane.CONTROL)
    async def alive(self) -> int:
        """Its present life."""
        return self.life


@dataclass(kw_only=True)
class Runner(Bookkeeper):
    """Runs what it is sent."""

    @message
    async def take(self, id: int) -> int:
        self.ledger.ran(id, self.life)
        return id

    @message
    async def take_array(self, id: int, array: np.ndarray) -> int:
        self.ledger.ran(id, self.life)
        return id if array[0] == array[-1] == id % 251 else -1

    @message
    async def refuse(self, id: int) -> None:
        self.ledger.ran(id, self.life)
        raise ValueError(f"no {id}")

    @message(concurrent=True)
    async def nap(self, id: int, seconds: float) -> int:
        self.ledger.ran(id, self.life)
        await asyncio.sleep(seconds)
        return id

    @message
    async def note(self, id: int) -> None:
        self.ledger.ran(id, self.life)

    @message
    async def settled(self) -> int:
        """Its life. Everything that the caller sent before has run."""
        return self.life

    @message(lane=Lane.CONTROL)
    async def crash(self) -> None:
        raise RuntimeError("as it was told")


@dataclass(kw_only=True)
class Sender(Bookkeeper):
    """Sends what it is told: even numbers are calls, odd ones casts."""

    targets: list[str]
    callers: int = 64

    @message(concurrent=True, deadline_s=3600.0)
    async def run(self, first: int, last: int) -> None:
        """Messages first..last-1, those that nobody has sent yet."""
        even, odd = (iter(range(first + (first + odd) % 2, last, 2)) for odd in (0, 1))
        await asyncio.gather(*(self._call_all(even) for _ in range(self.callers)), self._cast_all(odd))

    @message(concurrent=True, deadline_s=3600.0)
    async def settle(self) -> dict[int, int]:
        """Waits until every target has run all that was sent from here; their lives by number."""
        return {number: await self._settled(name) for number, name in enumerate(self.targets)}

    async def _settled(self, name: str) -> int:
        while True:
            try:
                return int(await self.find(name).settled())
            except RuntimeFault:
                await asyncio.sleep(DOWN_S)

    async def _call_all(self, ids: Iterator[int]) -> None:
        for id in ids:
            if self.ledger.is_new(id):
                await self._call(id)

    async def _call(self, id: int) -> None:
        chance = random.Random(id)
        target, seconds = chance.randrange(len(self.targets)), chance.choice(DEADLINES_S)
        ref = self.find(self.targets[target])
        began = time.monotonic()
        self.ledger.begin(id, began, began + seconds, self.life, target, cast=False)
        try:
            async with timeout(seconds):
                answer = await self._ask(ref, id, chance.random(), seconds)
            state = State.REPLY if answer == id else State.WRONG
        except RemoteError as error:
            state = State.REMOTE_ERROR if f"no {id}" in str(error) else State.WRONG
        except (RuntimeFault, TimeoutError):
            state = State.FAULT
        except Exception:  # noqa: BLE001 (it is what we look for)
            state = State.UNTYPED
        self.ledger.end(id, state, time.monotonic())

    def _ask(self, ref: Any, id: int, share: float, seconds: float) -> Any:
        """Mostly a small question; now and then an array, an error, or one that takes too long."""
        if share < 0.003:
            return ref.take_array(id, np.full(ARRAY_BYTES, id % 251, np.uint8))
        if share < 0.006:
            return ref.refuse(id)
        if share < 0.009:
            return ref.nap(id, seconds * 3 * share / 0.009)
        return ref.take(id)

    async def _cast_all(self, ids: Iterator[int]) -> None:
        for number, id in enumerate(ids):
            if not self.ledger.is_new(id):
                continue
            target = random.Random(id).randrange(len(self.targets))
            cast = self.find(self.targets[target]).note.cast
            while await self._cast(id, target, cast) is None:  # noqa: ASYNC110 (a cast tells, it does not wait)
                await asyncio.sleep(FULL_S)
            if number % CASTS_PER_TURN == 0:
                await asyncio.sleep(0)

    async def _cast(self, id: int, target: int, cast: Any) -> State | None:
        """None: the mailbox is full, nothing was sent."""
        began = time.monotonic()
        self.ledger.begin(id, began, 0.0, self.life, target, cast=True)
        try:
            cast(id)
            state = State.ACCEPTED
        except MailboxFull:
            return None
        except RuntimeFault:
            state = State.REFUSED
        except Exception:  # noqa: BLE001 (it is what we look for)
            state = State.UNTYPED
        self.ledger.end(id, state, time.monotonic())
        if state is State.REFUSED:
            await asyncio.sleep(DOWN_S)
        return state
