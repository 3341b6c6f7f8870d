"""A cluster of four actors inside a program: up, down, and what it leaves behind. Each in a process of its own."""

from __future__ import annotations

import asyncio
import os
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import headrace
from headrace.benchmark import Bar

EMBEDDING_BARS = [Bar("embed_up_s", "<=", 1.5), Bar("embed_down_s", "<=", 0.5), Bar("embed_left_count", "<=", 0)]

ROUNDS = 5
GONE_S = 1.0
"""Time for the kernel to end what was killed."""


@dataclass(kw_only=True)
class Member(headrace.Actor):
    """Answers."""

    @headrace.message
    async def pid(self) -> int:
        return os.getpid()


def measure_embedding() -> dict[str, float]:
    """embed_up_s: from nothing to the answers of all four; embed_down_s; embed_left_count: processes, sockets and
    shared memory that are left. Medians of ROUNDS, the sum for what is left."""
    ups, downs, left = [], [], 0
    before = _marks()
    for _ in range(ROUNDS):
        up, down, pids = asyncio.run(_once())
        ups.append(up)
        downs.append(down)
        deadline = time.monotonic() + GONE_S
        while any(_alive(pid) for pid in pids) and time.monotonic() < deadline:
            time.sleep(0.005)
        left += sum(_alive(pid) for pid in pids)
    left += len(_marks() - before)
    return {
        "embed_up_s": statistics.median(ups), "embed_down_s": statistics.median(downs), "embed_left_count": left
    }  # fmt: skip


async def _once() -> tuple[float, float, list[int]]:
    begun = time.perf_counter()
    async with headrace.open_cluster({}) as cluster:
        refs = await asyncio.gather(*(cluster.spawn(Member(), name=f"m{n}", node=f"n{n}") for n in range(4)))
        pids = await asyncio.gather(*(ref.pid() for ref in refs))
        up = time.perf_counter() - begun
        ended = time.perf_counter()
    return up, time.perf_counter() - ended, list(pids)


def _alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def _marks() -> set[str]:
    """Folders of sockets, and segments of shared memory."""
    return {str(path) for path in (*Path(tempfile.gettempdir()).glob("headrace-*"), *Path("/dev/shm").iterdir())}
