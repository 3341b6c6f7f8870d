"""Timings of kernels on an H200 that is not here: a model, to try the tuner on until a device has recorded a table.

Three things make the best configuration change with the load, and all are in it:

    bandwidth   a wave of resident blocks takes its bytes at the copy rate, or as fast as what a block keeps in flight
                comes back after a latency, whichever is slower
    waves       the last wave is partly empty, and takes no less than one block's time
    stragglers  where blocks belong to experts, the busiest expert ends last; splitting helps, and costs a reduction

plus a launch, plus what no formula knows: a lognormal of 4 % for each configuration and power of two of tokens, fixed
by the seed; plus noise of each run: 2 %, and one in twenty disturbed by a third. Numbers of an H200: 132
multiprocessors, 4.3 TB/s, 600 ns.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from headrace.kernels.buckets import STEPS, Load
from headrace.kernels.timings import Cell, Config, Timings, label
from headrace.kernels.tuner import Report, occupancy

PROCESSORS, COPY_RATE, LATENCY_S, LAUNCH_S = 132, 4.3e12, 6e-7, 2.5e-6
RUNS = 20


@dataclass(frozen=True)
class Modelled:
    """One kernel and shape."""

    name: str
    shape: str
    bytes_per_row: float
    lanes: int
    """Elements of a row that threads share: a block of BLOCK threads of VEC elements takes as many rows as fit."""
    by_expert: bool
    """Whether blocks belong to experts, so that skew counts."""
    configs: tuple[Config, ...]
    """The default first."""

    def report(self, config: Config) -> Report:
        """What a compiler would say: registers grow with what a thread holds."""
        held = config.get("VEC", 1) * config.get("UNROLL", 1)
        registers = min(255, 20 + 3 * held)
        spills = 64 if 20 + 3 * held > 255 else 0
        shared = config["BLOCK"] * config.get("STAGE", 0) * 16
        return Report(config["BLOCK"], registers, spills, shared)


def _grid(**axes: tuple[int, ...]) -> tuple[Config, ...]:
    return tuple(dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values()))


KERNELS = (
    Modelled("permute", "H2048", 8192, 2048, False, _grid(BLOCK=(256, 64, 128, 512, 1024), VEC=(8, 2), UNROLL=(1, 4))),
    Modelled("unpermute", "H2048-k8", 36864, 2048, False, _grid(BLOCK=(256, 128, 512), VEC=(8, 4), UNROLL=(1, 2, 8))),
    Modelled("align_scatter", "E128-k8", 16, 1, False, _grid(BLOCK=(256, 128, 512, 1024), UNROLL=(4, 1, 8, 16))),
    Modelled("topk_gate", "E128-k8", 320, 128, False, _grid(BLOCK=(256, 64, 128, 512), VEC=(4, 1, 8), UNROLL=(1, 2))),
    Modelled("fp8_quant", "H2048", 6144, 2048, False, _grid(BLOCK=(256, 128, 512, 1024), VEC=(8, 16), UNROLL=(1, 2))),
    Modelled("moe_gemv", "H2048-F768", 12288, 2048, True, _grid(BLOCK=(128, 64, 256), SPLIT=(1, 2, 4, 8), VEC=(8, 16))),
)


def seconds(kernel: Modelled, config: Config, load: Load) -> float:
    """Of one undisturbed run."""
    report = kernel.report(config)
    share = occupancy(report)
    assert share, f"{label(config)} does not fit"
    vector, unroll, split = config.get("VEC", 1), config.get("UNROLL", 1), config.get("SPLIT", 1)
    at_once = share * 2048 / config["BLOCK"] * PROCESSORS
    rows_per_block = max(1.0, config["BLOCK"] * vector / kernel.lanes) * unroll
    bytes_per_block = rows_per_block * kernel.bytes_per_row / split
    in_flight = config["BLOCK"] * min(vector * 2, 16) * unroll
    alone = LATENCY_S * (2 + bytes_per_block / in_flight)
    blocks = max(1.0, load.tokens / rows_per_block) * split
    whole, rest = divmod(blocks, at_once)
    spent = whole * max(alone, at_once * bytes_per_block / COPY_RATE)
    spent += max(alone, rest * bytes_per_block / COPY_RATE) if rest else 0.0
    if kernel.by_expert:
        spent *= 1 + (load.skew - 1) / (2.0 * split) + 0.04 * (split - 1) / max(1.0, load.skew - 0.5)
    return float(LAUNCH_S + spent + 0.3e-6 * (unroll > 4) + 0.8e-6 * (split > 1))


def loads(seed: int, *, held_out: bool) -> Iterator[Load]:
    """Where the tuner is trained: the middle of every bucket; held out: anywhere, 60 of them."""
    random = np.random.default_rng(seed)
    if held_out:
        for _ in range(60):
            tokens = int(2 ** random.uniform(6, 20))
            yield Load(tokens, 1 + float(random.exponential(1.0)), int(random.integers(8, 129)))
    else:
        for step in range(6 * STEPS, 20 * STEPS):
            for skew in (1.07, 1.27, 1.57, 2.0, 2.6, 3.7, 5.6, 9.0):
                for active in (12, 24, 48, 100):
                    yield Load(round(2 ** ((step + 0.5) / STEPS)), skew, active)


def recorded(seed: int, *, held_out: bool) -> Timings:
    """The table that a device of this kind would have recorded. The same seed gives the same table."""
    random = np.random.default_rng((seed, held_out))
    table = Timings("modelled H200", measured=False)
    for kernel in KERNELS:
        # Of a region of loads, not of one: a configuration that suits 10,000 tokens suits 10,001.
        quirks = np.exp(
            0.04 * np.random.default_rng((seed, len(kernel.name))).standard_normal((len(kernel.configs), 21))
        )
        fitting = [c for c in kernel.configs if occupancy(kernel.report(c)) and not kernel.report(c).spill_bytes]
        cells = []
        for load in loads(seed, held_out=held_out):
            runs: dict[str, tuple[float, ...]] = {}
            for config in fitting:
                at = np.log2(load.tokens)
                quirk = np.interp(at, np.arange(21), quirks[kernel.configs.index(config)])
                noise = np.exp(0.02 * random.standard_normal(RUNS)) * np.where(random.random(RUNS) < 0.05, 1.33, 1.0)
                runs[label(config)] = tuple((seconds(kernel, config, load) * quirk * noise).tolist())
            cells.append(Cell(load, runs))
        table.cells[f"{kernel.name}/{kernel.shape}"] = cells
    return table
