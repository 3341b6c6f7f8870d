"""What a call of a worker group costs: eight processes, 32 MiB of batch, beside the copies that it can't do without.

    floor   the same bytes copied once, by one thread, between memory that is warm; and a call with a batch of 8 numbers

Turn by turn in one run; a ratio is one of medians.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable

import numpy as np
from _bench_ranks import Echo

from headrace.benchmark import Bar, Say
from headrace.runtime import System
from headrace.runtime.layout import Layout
from headrace.runtime.worker_group import WorkerGroup

GROUP_BARS = [Bar(f"group_call_{name}_ratio", "<=", 1.3) for name in ("in", "in_out", "born", "kept")]

RANKS = 8
BATCH = (8192, 1024)
"""float32: 32 MiB"""
WARM_UP = 5


async def measure_groups(rounds: int, say: Say) -> dict[str, float]:
    """Figures of group calls."""
    async with System() as system:
        group = await WorkerGroup.spawn(system, Echo(), name="echo", layout=Layout(dp=RANKS))
        say(f"{RANKS} ranks are up")
        x = np.ones(BATCH, np.float32)
        born = system.node.empty(BATCH, np.float32)
        born[:] = x
        small = np.ones((RANKS, 1), np.float32)
        target = np.empty_like(x)
        times: dict[str, list[float]] = defaultdict(list)

        async def timed(name: str, call: Callable[[], Awaitable[object]]) -> None:
            began = time.perf_counter()
            await call()
            times[name].append(time.perf_counter() - began)

        async def copy() -> None:
            for part, whole in zip(np.split(target, RANKS), np.split(x, RANKS), strict=True):
                np.copyto(part, whole)

        for turn in range(rounds + WARM_UP):
            await timed("copy", copy)
            await timed("latency", lambda: group.take({"x": small}))
            await timed("in", lambda: group.take({"x": x}))
            await timed("born", lambda: group.take({"x": born}))
            await timed("both", lambda: group.give({"x": x}))
            kept: list[object] = []

            async def keep(kept: list[object] = kept) -> None:
                kept.append(await group.give.keep({"x": born}))

            await timed("keep", keep)
            await group.release(kept[0])  # type: ignore[arg-type]
            if turn == WARM_UP - 1:
                times.clear()
            await asyncio.sleep(0)
        out = await group.give({"x": x})
        assert (out["x"][:: BATCH[0] // RANKS, 0] == np.arange(RANKS)).all()
    p50 = {name: statistics.median(values) for name, values in times.items()}
    return {
        "group_call_latency_us": 1e6 * p50["latency"],
        "group_memcpy_ms": 1e3 * p50["copy"],
        "group_call_in_ms": 1e3 * p50["in"],
        "group_call_in_out_ms": 1e3 * p50["both"],
        "group_call_born_ms": 1e3 * p50["born"],
        "group_call_kept_ms": 1e3 * p50["keep"],
        "group_call_in_ratio": p50["in"] / (p50["copy"] + p50["latency"]),
        "group_call_in_out_ratio": p50["both"] / (2 * p50["copy"] + p50["latency"]),
        "group_call_born_ratio": p50["born"] / p50["latency"],
        "group_call_kept_ratio": p50["keep"] / p50["latency"],
    }
