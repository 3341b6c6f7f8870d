"""How long a publish through shared memory takes beside the memcpys that it must do, and in how much memory.

    memcpys   the publisher's tensors to shared memory, then shared memory to each receiver's arrays, both at once
    publish   the same, with the search for NaN, checksums made and verified, and the version swapped at the end

Turn by turn in one run, with the same processes and the same memory; a ratio is one of medians.
"""

from __future__ import annotations

import asyncio
import statistics
import time

import numpy as np
from _weights_members import Member

from headrace.benchmark import Bar, Say
from headrace.runtime import System
from headrace.runtime.exchange import Manifest, Publisher
from headrace.runtime.ref import Ref

SHM_BARS = [
    Bar("shm_publish_over_memcpy_ratio", "<=", 1.3),
    Bar("shm_receiver_peak_models_ratio", "<=", 2.05),
]

TENSORS = 300
RECEIVERS = 2
WARM_UP = 2
"""Both sides have two buffers, in turn."""


def some_tensors(nbytes: int, *, seed: int = 0) -> dict[str, np.ndarray]:
    """About TENSORS bfloat16 tensors, as their bits: layers of large and small ones, finite, `nbytes` in all."""
    sizes = np.tile([1, 1, 2, 4, 64, 256, 256, 512, 1024, 4096], TENSORS // 10).astype(float)
    rows = np.maximum(sizes / sizes.sum() * nbytes / 2 / 64, 1).astype(int)
    rows[-1] += max(nbytes // 128 - rows.sum(), 0)
    random = np.random.default_rng(seed)
    bits = random.integers(0, 1 << 16, 1 << 22, np.uint16) & 0xBFFF  # Without the first bit of the exponent.
    return {f"layer.{i // 10}.{i % 10}": np.resize(bits, (n, 64)) for i, n in enumerate(rows.tolist())}


async def measure_shm(nbytes: int, rounds: int, say: Say) -> dict[str, float]:
    """All figures of this file."""
    tensors = some_tensors(nbytes)
    model = sum(array.nbytes for array in tensors.values())
    async with System() as system:
        members = [await system.spawn(Member(), name=f"member_{i}", node=f"member_{i}") for i in range(RECEIVERS)]
        publisher = Publisher("weights")
        try:
            publisher.publish(0, tensors, bfloat16=tensors)
            manifest = publisher.publish(1, tensors, bfloat16=tensors)  # Both buffers are there now.
            await asyncio.gather(*(member.prepare(manifest) for member in members))
            say(f"{model >> 20} MiB in {len(tensors)} tensors, {RECEIVERS} receivers are up")
            times: dict[str, list[float]] = {"publish": [], "memcpy": [], "lay_out": [], "fetch": []}
            for turn in range(-WARM_UP, rounds):
                spent = await _memcpys(publisher, manifest, tensors, members)
                laid, fetched = await _publish(publisher, 2 + WARM_UP + turn, tensors, members)
                if turn >= 0:
                    for name, value in zip(times, (laid + fetched, spent, laid, fetched), strict=True):
                        times[name].append(value)
                manifest = publisher.manifest or manifest
            peaks = [await member.peak_bytes() for member in members]
            shared = len(publisher.versions) * manifest.nbytes
        finally:
            publisher.close()
    publish, memcpy, lay_out, fetch = (statistics.median(column) for column in times.values())
    return {
        "shm_model_bytes": model,
        "shm_tensors_count": len(tensors),
        "shm_publish_s": publish,
        "shm_lay_out_s": lay_out,
        "shm_fetch_s": fetch,
        "shm_memcpy_s": memcpy,
        "shm_publish_over_memcpy_ratio": publish / memcpy,
        "shm_publish_bytes_per_s": (1 + RECEIVERS) * model / publish,
        "shm_receiver_peak_models_ratio": max(peaks) / model,
        "shm_publisher_shared_models_ratio": shared / model,
        "shm_peak_total_bytes": model + shared + sum(peaks),
    }


async def _memcpys(
    publisher: Publisher, manifest: Manifest, tensors: dict[str, np.ndarray], members: list[Ref]
) -> float:
    written = publisher.written(manifest.incarnation, manifest.generation)
    assert written is not None
    views = manifest.views(written[1])
    began = time.perf_counter()
    for name, array in tensors.items():
        np.copyto(views[name], array)
    await asyncio.gather(*(member.copy(manifest) for member in members))
    return time.perf_counter() - began


async def _publish(
    publisher: Publisher, version: int, tensors: dict[str, np.ndarray], members: list[Ref]
) -> tuple[float, float]:
    began = time.perf_counter()
    manifest = publisher.publish(version, tensors, bfloat16=tensors)
    laid = time.perf_counter()
    await asyncio.gather(*(member.receive(manifest) for member in members))
    return laid - began, time.perf_counter() - laid
