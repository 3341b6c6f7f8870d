"""Planning the exchange of Qwen3-235B-A22B: from FSDP 64 x EP 8 x TP 4 to 16 engines of TP 8 / EP 8. Shapes only.

"FSDP 64 x EP 8 x TP 4" is read both ways: EP's ranks are among FSDP's (256 ranks), or beside them (2,048 ranks); a
figure is the worse of both. Planning ends when every copy has its sender, the bytes of each rank are known, and the
busiest rank of each side has its buckets.
"""

from __future__ import annotations

import time

import numpy as np

from headrace.actors.model.config import ModelConfig
from headrace.actors.model.shards import engine_holding, trainer_holding
from headrace.benchmark import Bar, Say
from headrace.runtime.exchange.boxes import overlaps
from headrace.runtime.exchange.buckets import BUCKET_BYTES, Schedule
from headrace.runtime.exchange.plan import Plan, make_plan

PLAN_BARS = [
    Bar("plan_s", "<=", 2.0),
    Bar("plan_sent_over_needed_ratio", "<=", 1.0),
    Bar("plan_sent_twice_count", "<=", 0),
    Bar("plan_peak_buckets_ratio", "<=", 2.0),
    Bar("plan_busiest_sender_over_mean_ratio", "<=", 1.05),
]

QWEN3_235B = ModelConfig(
    vocab_size=151_936, hidden_size=4096, num_layers=94, num_heads=64, num_kv_heads=4, head_dim=128, num_experts=128,
    num_experts_per_tok=8, moe_intermediate_size=1536, rope_theta=1e6, max_positions=40_960,
)  # fmt: skip
"""As its config.json has it."""

PARAMETERS = 235_093_634_560
"""Of the published model."""

SAMPLED = 12
"""Ranks of each side whose schedules are looked at, beside the busiest."""


def measure_plan(say: Say) -> dict[str, float]:
    """All figures of this file."""
    layouts = [_measure(folded) for folded in (True, False)]
    figures = {name: max(layout[name] for layout in layouts) for name in layouts[0]}
    say(f"plans: {figures['plan_sent_bytes'] / 1e12:.2f} TB to 128 ranks, each byte once to each rank that needs it")
    return figures | {"plan_trainer_ranks_count": 2048}


def _measure(folded: bool) -> dict[str, float]:
    began = time.perf_counter()
    source = trainer_holding(QWEN3_235B, fsdp=64, ep=8, tp=4, folded=folded, dtype="bfloat16")
    dest = engine_holding(QWEN3_235B, engines=16, tp=8, ep=8, fuse_qkv=True, dtype="bfloat16", first=source.mesh.size)
    plan = make_plan(source, dest)
    traffic = plan.traffic
    busiest = [int(traffic.sent.argmax()), source.mesh.size + int(traffic.received.argmax())]
    schedules = [Schedule(plan, rank) for rank in busiest]
    spent = time.perf_counter() - began
    sample = [np.linspace(s.mesh.first, s.mesh.first + s.mesh.size - 1, SAMPLED).astype(int) for s in (source, dest)]
    schedules += [Schedule(plan, rank) for rank in np.concatenate(sample).tolist()]
    parameters = sum(whole.nbytes for whole in source.wholes.values()) // 2
    assert parameters == PARAMETERS, parameters
    assert (traffic.received == dest.nbytes()).all(), "a rank gets more or less than it holds"
    largest = max(int(side.nbytes().max()) for side in (source, dest))
    return {
        "plan_s": spent,
        "plan_parameters_count": parameters,
        "plan_sent_bytes": int(traffic.sent.sum()),
        "plan_sent_over_needed_ratio": int(traffic.sent.sum()) / int(dest.nbytes().sum()),
        "plan_sent_twice_count": sum(_twice(plan, rank) for rank in sample[1].tolist()),
        "plan_peak_buckets_ratio": float(max(schedule.peak_bytes() for schedule in schedules) / BUCKET_BYTES),
        "plan_largest_rank_of_model_ratio": largest / (2 * parameters),
        "plan_busiest_sender_over_mean_ratio": float(traffic.sent.max() / traffic.sent.mean()),
    }


def _twice(plan: Plan, rank: int) -> int:
    """Pairs of boxes that overlap in an array of this rank, in the first and the last layer and all else."""
    moves = plan.moves(dest=rank)
    num_layers, twice = QWEN3_235B.num_layers, 0
    for number in np.unique(moves.dest_held):
        name = plan.dest.held[number].name
        if name.startswith("model.layers.") and int(name.split(".")[2]) not in (0, num_layers - 1):
            continue
        rows = moves.dest_held == number
        start, stop = moves.dest_at[rows], (moves.dest_at + moves.shape)[rows]
        twice += len(overlaps(start, stop, start, stop)[0]) - len(start)
    return twice
