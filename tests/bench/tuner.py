"""The kernel tuner on a recorded table: what its choices cost against the best, and what finding them costs.

The tuner is trained on the middle of each bucket of loads and judged on loads that it never saw. Regret of a load: time
of the chosen configuration over that of the best one, less one; times are medians of all recorded runs. Exhaustive
means all runs of all configurations. Then it goes live on loads that jitter and jump, and its exploring, switching and
re-picking are counted. --table FILE takes a table that tests/gpu/run has recorded; without one the timings are modelled
(tests/bench/_timing_model.py), and no device was measured.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import _timing_model
import numpy as np

from headrace.benchmark import Bar, BenchmarkError, Figures, Say
from headrace.kernels.buckets import Bucket, Load, Watch
from headrace.kernels.timings import Cell, Replay, Timings
from headrace.kernels.tuner import Kernel

EXAMPLE = "bin/bench tuner --json tuner.json"

BARS = [
    Bar("regret_mean_ratio", "<=", 0.03),
    Bar("regret_p95_ratio", "<=", 0.08),
    Bar("held_out_points", ">=", 200),
    Bar("budget_ratio", "<=", 0.10),
    Bar("worse_than_default_ratio", "<=", 0.02),
    Bar("explored_ratio", "<=", 0.01),
    Bar("steps_to_pick_anew", "<=", 50),
    Bar("switches_per_100_steps", "<=", 1),
]

CALLS_PER_STEP = 768
"""Of one kernel in a training step: 48 layers, 16 micro-batches."""

STEPS = 300
"""Under each of the live loads; flapping is counted in the last 200."""

JITTER = 0.03
"""Of the tokens from step to step."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--table", type=Path, metavar="FILE", help="timings that tests/gpu/run recorded")
    parser.add_argument(
        "--models", type=int, default=3, metavar="N", help="modelled tables without --table (default 3)"
    )


def measure(options: argparse.Namespace, say: Say) -> Figures:
    """All figures, over all tables together."""
    pooled = Pooled()
    for seed, (train, test) in enumerate(_tables(options)):
        say(f"{train.device}{'' if train.measured else f', model {seed}: no device was measured'}")
        for name, cells in train.cells.items():
            pooled.tune(cells, test.cells[name])
        pooled.go_live(train, seed)
    return {
        "regret_mean_ratio": statistics.fmean(pooled.regrets),
        "regret_p95_ratio": float(np.quantile(pooled.regrets, 0.95)),
        "regret_of_default_mean_ratio": statistics.fmean(pooled.default_regrets),
        "held_out_points": len(pooled.regrets),
        "budget_ratio": pooled.runs / pooled.exhaustive,
        "worse_than_default_ratio": max(pooled.against_default),
        "explored_ratio": pooled.explored / pooled.calls,
        "steps_to_pick_anew": max(pooled.steps_to_pick),
        "switches_per_100_steps": max(pooled.switches),
        "modelled": float(options.table is None),
    }


@dataclass
class Pooled:
    """What was counted so far."""

    regrets: list[float] = field(default_factory=list)
    default_regrets: list[float] = field(default_factory=list)
    against_default: list[float] = field(default_factory=list)
    runs: int = 0
    exhaustive: int = 0
    calls: int = 0
    explored: int = 0
    steps_to_pick: list[float] = field(default_factory=list)
    switches: list[float] = field(default_factory=list)

    def tune(self, cells: Sequence[Cell], held_out: Sequence[Cell]) -> None:
        """Searches one kernel on `cells`, judges its choices on `held_out`."""
        kernel, replay = Kernel(list(cells[0].seconds)), Replay(cells)
        for load in replay.loads:
            kernel.tune(load.bucket, partial(replay.measure, load))
        middles = {load.bucket: load for load in replay.loads}
        kernel.settle(partial(_measure, replay, middles))
        self.runs += replay.num_runs
        self.exhaustive += sum(len(runs) for cell in cells for runs in cell.seconds.values())
        for cell in held_out:
            medians = {config: statistics.median(runs) for config, runs in cell.seconds.items()}
            chosen, default = medians[kernel.pick(cell.load.bucket)[0]], medians[kernel.configs[0]]
            self.regrets.append(chosen / min(medians.values()) - 1)
            self.default_regrets.append(default / min(medians.values()) - 1)
            self.against_default.append(chosen / default - 1)

    def go_live(self, table: Timings, seed: int) -> None:
        """Four sudden loads in turn, each with jitter; nothing was searched. The device answers by the table."""
        random = np.random.default_rng(seed)
        for cells in table.cells.values():
            kernel, replay, watch = Kernel(list(cells[0].seconds)), Replay(cells), Watch()
            for at in random.choice(len(cells), 4, replace=False):
                self._live(kernel, replay, watch, cells[at], random)

    def _live(self, kernel: Kernel, replay: Replay, watch: Watch, cell: Cell, random: np.random.Generator) -> None:
        medians = {config: statistics.median(runs) for config, runs in cell.seconds.items()}
        good = {config for config, median in medians.items() if median <= 1.05 * min(medians.values())}
        found, steady_switches = math.inf, 0
        for step in range(1, STEPS + 1):
            jittered = round(cell.load.tokens * random.uniform(1 - JITTER, 1 + JITTER))
            bucket = watch.bucket(Load(jittered, cell.load.skew, cell.load.active))
            held = kernel.incumbent(bucket)
            for _ in range(CALLS_PER_STEP):
                config, timed = kernel.pick(bucket)
                self.explored += config != kernel.incumbent(bucket)
                if timed:
                    kernel.observe(bucket, config, replay.measure(cell.load, config, 1)[0])
            self.calls += CALLS_PER_STEP
            steady_switches += step > STEPS - 200 and kernel.incumbent(bucket) != held
            if kernel.incumbent(bucket) in good:
                found = min(found, step)
        self.steps_to_pick.append(found)
        self.switches.append(steady_switches / 2)


def _measure(replay: Replay, middles: Mapping[Bucket, Load], bucket: Bucket, config: str, runs: int) -> list[float]:
    return replay.measure(middles[bucket], config, runs)


def _tables(options: argparse.Namespace) -> Iterator[tuple[Timings, Timings]]:
    """Pairs of tables: to train on, and held out."""
    if options.table is None:
        for seed in range(options.models):
            yield _timing_model.recorded(seed, held_out=False), _timing_model.recorded(seed, held_out=True)
        return
    try:
        table = Timings.read(options.table)
    except (OSError, ValueError) as error:
        raise BenchmarkError(str(error)) from None
    train, test = (
        Timings(table.device, table.measured, table.versions, {name: c[half::2] for name, c in table.cells.items()})
        for half in (0, 1)
    )
    yield train, test
