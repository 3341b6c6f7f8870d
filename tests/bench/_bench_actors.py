"""The actors that actors.py measures. A module of its own, so that node processes import little."""

from __future__ import annotations

import asyncio
import gc
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from headrace.runtime import Actor, Lane, message
from headrace.runtime.agent import NodeAgent


@dataclass(kw_only=True)
class Callee(Actor):
    """Answers at once."""

    async def start(self) -> None:
        self.received = 0

    @message
    async def echo(self, payload: bytes) -> bytes:
        return payload

    @message
    async def note(self, payload: bytes) -> None:
        self.received += 1

    @message
    async def noted(self) -> int:
        """How many notes came before this, since it was last asked."""
        received, self.received = self.received, 0
        return received

    @message
    async def ends(self, array: np.ndarray) -> int:
        """The sum of the first and the last byte."""
        flat = array.reshape(-1)
        return int(flat[0]) + int(flat[-1])

    @message(concurrent=True, lane=Lane.CONTROL)
    async def ping(self) -> None:
        return

    @message(concurrent=True)
    async def hold(self) -> None:
        await asyncio.sleep(3600)

    @message(concurrent=True, lane=Lane.CONTROL)
    async def pid(self) -> int:
        return os.getpid()

    @message
    async def block(self, seconds: float, hog: bool) -> float:
        """Stops the loop; with `hog`, the interpreter lock too. Returns when that began, in Unix seconds."""
        began = time.time()
        if hog:
            while time.time() < began + seconds:
                sum(range(1000))
        else:
            time.sleep(seconds)  # noqa: ASYNC251
        return began


@dataclass(kw_only=True)
class Idle(Actor):
    """Does nothing: one of many."""


@dataclass(kw_only=True)
class Nursery(Actor):
    """Puts actors into its own node, as the node does when the root tells it to."""

    @message(deadline_s=120.0)
    async def host(self, count: int) -> tuple[float, float]:
        """Actors per second, until each has started; and bytes of private memory of each."""
        node = self._node
        assert node is not None
        agent = node.cells[f"$node@{node.key.partition('#')[0]}"].actor
        assert isinstance(agent, NodeAgent)
        gc.collect()
        before = private_bytes(os.getpid())
        began = time.perf_counter()
        cells = [agent.host(node, Idle(), f"hosted/{number}", 1) for number in range(count)]
        for cell in cells:
            await cell.up
        seconds = time.perf_counter() - began
        return count / seconds, (private_bytes(os.getpid()) - before) / count


def private_bytes(pid: int) -> int:
    """Memory that a process shares with nobody."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) << 10


@dataclass(kw_only=True)
class Sink(Actor):
    """The one that a thousand callers ask."""

    async def start(self) -> None:
        self.handled = 0

    @message
    async def take(self, payload: bytes) -> int:
        self.handled += 1
        return len(payload)

    @message(concurrent=True, lane=Lane.CONTROL)
    async def report(self) -> tuple[int, int]:
        """Messages handled, and the most that ever waited at once."""
        assert self._node is not None
        return self.handled, self._node.cells[self.name].turns.peak


@dataclass(kw_only=True)
class Callers(Actor):
    """Many callers in one process."""

    target: str

    @message(concurrent=True, deadline_s=300.0)
    async def run(self, callers: int, calls: int, at_once: int, size: int) -> int:
        """Each caller makes `calls` calls, `at_once` of them at a time; returns how many were answered right."""
        ref, payload = self.find(self.target), bytes(size)

        async def one(count: int) -> int:
            return sum([await ref.take(payload) == size for _ in range(count)])

        lanes = [one(calls // at_once) for _ in range(callers * at_once)]
        return sum(await asyncio.gather(*lanes))


@dataclass(kw_only=True)
class Born(Actor):
    """Sends arrays that were made where the other side can read them."""

    @message(concurrent=True, deadline_s=120.0)
    async def hand_over(self, target: str, size: int, count: int) -> list[float] | None:
        """Seconds of each of `count` calls with such an array of `size` bytes; None if the runtime has no `empty`."""
        empty = getattr(self, "empty", None)
        if empty is None:
            return None
        ref, times = self.find(target), []
        for i in range(count):
            array = empty((size,), np.uint8)
            array[0] = array[-1] = i % 100
            began = time.perf_counter()
            answer = await ref.ends(array)
            times.append(time.perf_counter() - began)
            assert answer == 2 * (i % 100), answer
            del array
        return times

    @message(concurrent=True, deadline_s=120.0)
    async def flow(self, target: str, size: int, seconds: float) -> int:
        """Sends such arrays one after the other for so long; returns how many went."""
        ref, sent, end = self.find(target), 0, time.perf_counter() + seconds
        while time.perf_counter() < end:
            array = self.empty((size,), np.uint8)  # type: ignore[attr-defined]
            array[0] = array[-1] = 1
            await ref.ends(array)
            sent += 1
        return sent

    @message(concurrent=True, deadline_s=120.0)
    async def pings(self, target: str, seconds: float) -> list[float]:
        """Seconds of each of as many control calls as fit into `seconds`."""
        ref, times, end = self.find(target), [], time.perf_counter() + seconds
        while time.perf_counter() < end:
            began = time.perf_counter()
            await ref.ping()
            times.append(time.perf_counter() - began)
        return times
