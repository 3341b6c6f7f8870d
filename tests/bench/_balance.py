"""Karmarkar-Karp: against the golden instances of ../shared/data, and the time of a large one."""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path

import numpy as np

from headrace.actors.trainer.packing import balance
from headrace.benchmark import Bar

BALANCE_BARS = [
    Bar("balance_golden_reached_count", ">=", 21),
    Bar("balance_8192_into_128_s", "<=", 0.3),
]

GOLDEN = Path(__file__).parents[3] / "shared" / "data" / "kk_golden" / "instances.json"
LARGE = (8192, 128)
"""Sequences, parts"""


def measure_balance() -> dict[str, float | None]:
    """Figures of the golden instances are None where the data are not on this machine."""
    sequences, parts = LARGE
    lengths = np.random.default_rng(0).integers(64, 20481, sequences).tolist()
    times = []
    for _ in range(5):
        began = time.perf_counter()
        bins = balance(lengths, parts)
        times.append(time.perf_counter() - began)
    heaviest = max(sum(lengths[i] for i in b) for b in bins)
    return {
        "balance_8192_into_128_s": statistics.median(times),
        "balance_8192_into_128_over_ideal_ratio": heaviest / (sum(lengths) / parts),
        "balance_golden_reached_count": _golden(),
    }


def _golden() -> int | None:
    """Instances whose heaviest part is at most the golden one."""
    if not GOLDEN.exists():
        return None
    reached = 0
    for case in json.loads(GOLDEN.read_text()):
        bins = balance(case["lens"], case["k"])
        reached += max(sum(case["lens"][i] for i in b) for b in bins) <= case["kk"]["max"]
    return reached
