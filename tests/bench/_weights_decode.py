"""What decoding feels of a publish: two rollout workers generate while 1 GiB of weights comes to both, again and again.

The model has 300 tensors and as many bytes as are asked for, in float32, for that is what the engine computes in on a
CPU. A delay is the time between the ends of two steps of an engine, less the median of those outside of publishes: it
holds whatever the thread of the engine did in between. The swap is the engine's: from the old weights to the new.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from dataclasses import replace
from itertools import count, pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from _weights_rollout import TimedRollout

from headrace.actors.job import load_job
from headrace.actors.model.config import ModelConfig
from headrace.actors.model.shards import trainer_holding
from headrace.actors.rollout.requests import Request
from headrace.benchmark import Bar, Say
from headrace.runtime import System
from headrace.runtime.exchange import Publisher
from headrace.runtime.ref import Ref
from headrace.runtime.rundir import RunSpec

DECODE_BARS = [
    Bar("decode_worst_delay_over_median_ratio", "<=", 2.0),
    Bar("decode_failed_count", "<=", 0),
    Bar("swap_us", "<=", 5000.0),
]

CLUSTER = Path(__file__).parents[2] / "cluster.toml"
WORKERS = 2
SEQUENCES, LENGTH = 8, 200
"""That a worker generates at once, and their tokens: the next group begins when one has ended."""
QUIET_S = 1.0
"""Between two publishes."""


def model_of(nbytes: int) -> ModelConfig:
    """27 layers, hence 300 tensors; its experts are so wide that all is about `nbytes` in float32."""
    config = ModelConfig(
        vocab_size=4096, hidden_size=512, num_layers=27, num_heads=8, num_kv_heads=2, head_dim=64, num_experts=8,
        moe_intermediate_size=8, max_positions=512,
    )  # fmt: skip
    rest = nbytes - int(trainer_holding(config).nbytes()[0])
    width = rest // (config.num_layers * config.num_experts * 3 * config.hidden_size * 4) + 8
    return replace(config, moe_intermediate_size=max(8, width // 8 * 8))


async def measure_decode(nbytes: int, rounds: int, say: Say) -> dict[str, float]:
    """All figures of this file."""
    config = model_of(nbytes)
    random = np.random.default_rng(0)
    tensors = {
        name: np.ones(shape, np.float32)
        if len(shape) == 1
        else random.standard_normal(shape, np.float32) * np.float32(0.02)
        for name, (_, shape) in trainer_holding(config).local(0).items()
    }
    with TemporaryDirectory() as folder:
        async with System() as system:
            workers = [await _spawn(system, config, Path(folder), i) for i in range(WORKERS)]
            publisher = Publisher("policy")
            try:
                await asyncio.gather(*(worker.load(publisher.publish(0, tensors)) for worker in workers))
                await asyncio.gather(*(worker.watch() for worker in workers))
                say(f"{sum(a.nbytes for a in tensors.values()) >> 20} MiB in {len(tensors)} tensors, workers generate")
                return await _publish_while_they_generate(workers, publisher, tensors, rounds)
            finally:
                publisher.close()


async def _spawn(system: System, config: ModelConfig, folder: Path, index: int) -> Ref:
    job = load_job(CLUSTER)
    worker = TimedRollout(
        run=RunSpec(name=f"worker{index}", seed=index, directory=str(folder)), model=config, task=job.task,
        num_slots=SEQUENCES, rl=replace(job.rl, max_new_tokens=LENGTH),
    )  # fmt: skip
    return await system.spawn(worker, name=f"worker_{index}", node=f"worker_{index}")


async def _publish_while_they_generate(
    workers: list[Ref], publisher: Publisher, tensors: dict[str, np.ndarray], rounds: int
) -> dict[str, float]:
    generating = [asyncio.create_task(_generate(worker)) for worker in workers]
    publishes, spent = [], []
    await asyncio.sleep(4 * QUIET_S)
    for version in range(1, rounds + 1):
        began = time.perf_counter()
        manifest = await asyncio.to_thread(publisher.publish, version, tensors)
        await asyncio.gather(*(worker.load(manifest) for worker in workers))
        publishes.append((began, time.perf_counter()))
        spent.append(publishes[-1][1] - began)
        await asyncio.sleep(QUIET_S)
    for task in generating:
        task.cancel()
    ended = await asyncio.gather(*generating, return_exceptions=True)
    broken = [error for error in ended if not isinstance(error, asyncio.CancelledError)]
    inside: list[float] = []
    outside: list[float] = []
    swaps: list[tuple[float, float]] = []
    failed, delays, quiet = len(broken), [], []
    for worker in workers:
        ends, swapped, count_failed = await worker.times()
        within = [(b - a, any(a < stop and b > start for start, stop in publishes)) for a, b in pairwise(ends)]
        calm = [step for step, busy in within if not busy]
        median = statistics.median(calm)
        delays += [(step - median) / median for step, busy in within if busy]
        quiet += [(step - median) / median for step in calm]
        inside += [step for step, busy in within if busy]
        outside += calm
        swaps += swapped
        failed += count_failed
    return {
        "decode_step_us": statistics.median(outside) * 1e6,
        "decode_step_in_publish_us": statistics.median(inside) * 1e6,
        "decode_steps_in_publish_count": len(inside),
        "decode_worst_delay_over_median_ratio": max(delays),
        "decode_worst_delay_outside_over_median_ratio": max(quiet),
        "decode_failed_count": failed,
        "decode_publish_s": statistics.median(spent),
        "swap_us": max(wall for wall, _ in swaps) * 1e6,
        "swap_computing_us": max(computing for _, computing in swaps) * 1e6,
        "swaps_count": len(swaps),
    }


async def _generate(worker: Ref) -> None:
    """One group after the other, so that there is always something to decode."""
    prompt = np.arange(1, 9, dtype=np.int32)
    for ordinal in count():
        request = Request(
            key=ordinal, ordinal=ordinal, prompt=prompt, members=list(range(SEQUENCES)), max_new_tokens=LENGTH
        )
        async for _ in worker.generate.stream([request]):
            pass
