"""Balance of expert parallelism: the busiest rank over the mean, as placed and split, against EPLB and the optimum.

128 experts in 144 slots of 8 ranks, 32,768 (token, choice) pairs a batch. Popularities are lognormal (sigma 1) and
drift by an AR(1) process, by 0, 0.05 or 0.15 of a log unit a batch. Before each batch the experts are placed by a mean
of the batches so far (each weighs 0.5 of the next one); nothing of the batch itself is known. Then its pairs are
divided.

none    experts in order, no replicas            eplb   EPLB's placement, replicas share alike
placed  place_experts, then level_split          kept   the same with the placement before kept as far as it is good
lp      the best division of `placed` that there is (linear programming, scipy)
worst   of all batches; the others are means

Loads are counted in pairs, as if they took the same time on each rank. On the CPU; no kernel is timed.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Iterator

import numpy as np
import scipy.optimize
from _eplb import eplb
from _loads import FIXTURES, Ints, drifting

from headrace.benchmark import Bar, BenchmarkError, Figures, Say
from headrace.kernels.leveling import even_split, level_split, rank_load
from headrace.kernels.placement import Placement, place_experts

EXAMPLE = "bin/bench balance --batches 10 --seeds 1"

EXPERTS, SLOTS, RANKS, PAIRS, SIGMA, DECAY = 128, 144, 8, 32_768, 1.0, 0.5
DRIFTS = (0.0, 0.05, 0.15)

BARS = [
    Bar("placed_drift_005_worst_ratio", "<=", 1.01),
    Bar("placed_drift_015_worst_ratio", "<=", 1.02),
    Bar("kept_drift_005_worst_ratio", "<=", 1.01),
    Bar("kept_drift_015_worst_ratio", "<=", 1.02),
    Bar("placed_over_lp_worst_ratio", "<=", 1.005),
    Bar("batches_worse_than_even_split", "<=", 0),
    Bar("batches_worse_than_eplb", "<=", 0),
    Bar("fixtures", ">=", 40),
    Bar("fixtures_worse_than_eplb", "<=", 0),
    Bar("kept_moves_over_eplb_ratio", "<=", 0.5),
    Bar("kept_moves_over_new_ratio", "<=", 0.5),
    Bar("kept_even_load_over_new_worst_ratio", "<=", 1.01),
    Bar("kept_load_over_placed_ratio", "<=", 1.01),
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batches", type=int, default=60, metavar="N", help="of each drift and seed (default 60)")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="default 3")


def measure(options: argparse.Namespace, say: Say) -> Figures:
    """All figures. Raises BenchmarkError if there are too few batches for a placement and a move."""
    if options.batches < 3 or options.seeds < 1:
        raise BenchmarkError(
            f"--batches must be 3 or more and --seeds 1 or more, got {options.batches}, {options.seeds}"
        )
    figures: dict[str, float | None] = {}
    seen: dict[str, list[float]] = defaultdict(list)
    for drift in DRIFTS:
        ratios: dict[str, list[float]] = defaultdict(list)
        for seed in range(options.seeds):
            for batch in _batches(drift, seed, options.batches):
                for name, value in batch.items():
                    (ratios if name in ("none", "eplb", "placed", "kept", "lp") else seen)[name].append(value)
            say(f"drift {drift:g}, seed {seed}: placed {np.mean(ratios['placed']):.4f}, lp {np.mean(ratios['lp']):.4f}")
        for name, values in ratios.items():
            figures[f"{name}_drift_{round(drift * 100):03}_ratio"] = float(np.mean(values))
            figures[f"{name}_drift_{round(drift * 100):03}_worst_ratio"] = float(np.max(values))
    return {
        **figures,
        "placed_over_lp_worst_ratio": float(max(seen["over_lp"])),
        "batches": len(seen["over_lp"]),
        "batches_worse_than_even_split": int(np.sum(seen["worse_than_even"])),
        "batches_worse_than_eplb": int(np.sum(seen["worse_than_eplb"])),
        "fixtures": len(FIXTURES),
        "fixtures_worse_than_eplb": sum(_worse_than_eplb(*case) for case in FIXTURES),
        "eplb_moves": float(np.mean(seen["eplb_moves"])),
        "new_moves": float(np.mean(seen["new_moves"])),
        "kept_moves": float(np.mean(seen["kept_moves"])),
        "kept_moves_over_eplb_ratio": float(np.sum(seen["kept_moves"]) / np.sum(seen["eplb_moves"])),
        "kept_moves_over_new_ratio": float(np.sum(seen["kept_moves"]) / np.sum(seen["new_moves"])),
        "kept_even_load_over_new_worst_ratio": float(max(seen["kept_even"])),
        "kept_load_over_placed_ratio": float(np.mean(seen["kept_over_placed"])),
        "place_us": float(np.median(seen["place_us"])),
        "keep_us": float(np.median(seen["keep_us"])),
        "split_us": float(np.median(seen["split_us"])),
    }


def _batches(drift: float, seed: int, number: int) -> Iterator[dict[str, float]]:
    """What was seen of each batch but the first, by which the first placement is made."""
    expected = np.zeros(EXPERTS)
    kept = theirs = new = None
    loads = drifting(experts=EXPERTS, pairs=PAIRS, drift=drift, sigma=SIGMA, batches=number, seed=seed)
    for index, load in enumerate(loads):
        if index:
            mean = expected * (1 - DECAY) / (1 - DECAY**index)
            began = time.perf_counter()
            placed = place_experts(mean, SLOTS, RANKS)
            between = time.perf_counter()
            kept_now = placed if kept is None else place_experts(mean, SLOTS, RANKS, keep=kept)
            ended = time.perf_counter()
            theirs_now = Placement(eplb(mean, SLOTS, RANKS), EXPERTS, RANKS)
            result = _judged(load, placed, kept_now, theirs_now)
            result |= {"place_us": (between - began) * 1e6}
            if kept is not None and theirs is not None and new is not None:
                result |= {
                    "keep_us": (ended - between) * 1e6,
                    "eplb_moves": _copies(theirs, theirs_now),
                    "new_moves": _copies(new, placed),
                    "kept_moves": len(kept_now.moves_from(kept)),
                    "kept_even": kept_now.even_load(mean).max() / placed.even_load(mean).max(),
                }
            yield result
            kept, theirs, new = kept_now, theirs_now, placed
        expected = DECAY * expected + load


def _judged(load: Ints, placed: Placement, kept: Placement, theirs: Placement) -> dict[str, float]:
    mean = PAIRS / RANKS
    began = time.perf_counter()
    level_split(load, placed.slots_ER, num_ranks=RANKS, slots_per_rank=placed.slots_per_rank)
    split_us = (time.perf_counter() - began) * 1e6
    ours, with_kept = placed.level_load(load).max(), kept.level_load(load).max()
    even = rank_load(
        even_split(load, placed.slots_ER), placed.slots_ER, num_ranks=RANKS, slots_per_rank=placed.slots_per_rank
    ).max()
    best = _optimum(placed, load)
    return {
        "none": Placement.contiguous(EXPERTS, RANKS).even_load(load).max() / mean,
        "eplb": theirs.even_load(load).max() / mean,
        "placed": ours / mean,
        "kept": with_kept / mean,
        "lp": best / mean,
        "over_lp": ours / best,
        "worse_than_even": float(ours > even),
        "worse_than_eplb": float(ours > np.ceil(theirs.even_load(load).max())),
        "kept_over_placed": with_kept / ours,
        "split_us": split_us,
    }


def _optimum(placement: Placement, load: Ints) -> float:
    """The lowest highest load of a rank, pairs divisible: min t, what slots take sums to the load of their expert, what
    the slots of a rank take is at most t."""
    expert, rank = placement.experts_P, np.arange(SLOTS) // placement.slots_per_rank
    found = scipy.optimize.linprog(
        np.append(np.zeros(SLOTS), 1.0),
        A_ub=np.hstack((np.equal.outer(np.arange(RANKS), rank), -np.ones((RANKS, 1)))), b_ub=np.zeros(RANKS),
        A_eq=np.hstack((np.equal.outer(np.arange(EXPERTS), expert), np.zeros((EXPERTS, 1)))), b_eq=load,
    )  # fmt: skip
    return float(found.fun)


def _copies(old: Placement, new: Placement) -> int:
    """Experts that a rank has now and had not before: an order of the slots inside a rank costs nothing."""
    ranks = zip(old.experts_P.reshape(RANKS, -1).tolist(), new.experts_P.reshape(RANKS, -1).tolist(), strict=True)
    return sum(len(set(now) - set(before)) for before, now in ranks)


def _worse_than_eplb(name: str, load: Ints, num_slots: int, num_ranks: int) -> bool:
    theirs = Placement(eplb(load, num_slots, num_ranks), len(load), num_ranks)
    ours = place_experts(load, num_slots, num_ranks)
    return bool(ours.even_load(load).max() > theirs.even_load(load).max() * (1 + 1e-6))
