"""The trainer: tokens per second of one process, balanced packing, and what a call of a worker group costs.

trainer_over_plain_loop   one trainer process on the default model beside a plain torch loop with the same model and
                          tokens, neither with padding; see _throughput.py.
packed_over_padded        tokens per second of packed sequences beside padded ones, lengths with a long tail.
balance                   Karmarkar-Karp: the heaviest of 128 parts of 8,192 sequences, and golden instances reached.
group_call                8 ranks in processes of their own, 32 MiB of batch; see _groups.py. in: the batch is cut,
                          copied into shared memory and sent; in_out: and 32 MiB come back and are joined. Their ratios
                          are to one memcpy of those bytes plus the same call with 8 numbers (latency). born: the batch
                          was made in shared memory; kept: and the result stays with the ranks; to the latency alone.

Turn by turn in one run, so ratios hold on a busy machine too; tokens per second and times do not.
"""

from __future__ import annotations

import argparse

import uvloop
from _balance import measure_balance
from _groups import measure_groups
from _throughput import measure_throughput

from headrace.benchmark import Bar, Figures, Say

EXAMPLE = "bin/bench trainer --quick --json trainer.json"

BARS = [
    Bar("trainer_over_plain_loop_ratio", ">=", 0.9),
    Bar("packed_over_padded_ratio", ">=", 2.0),
    Bar("balance_golden_reached_count", ">=", 21),
    Bar("balance_8192_into_128_s", "<=", 0.3),
    Bar("group_call_in_ratio", "<=", 1.3),
    Bar("group_call_in_out_ratio", "<=", 1.3),
    Bar("group_call_born_ratio", "<=", 1.3),
    Bar("group_call_kept_ratio", "<=", 1.3),
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="fewer rounds: half a minute")


def measure(options: argparse.Namespace, say: Say) -> Figures:
    """All figures."""
    figures: dict[str, float | None] = {**measure_throughput(8 if options.quick else 40, say)}
    figures |= measure_balance()
    say("balancing: done")
    return figures | uvloop.run(measure_groups(say))
