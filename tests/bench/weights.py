"""Weight exchange: what a publish costs, what generation feels of it, what faults do to it, and planning for 235B.

shm       1 GiB of bfloat16 in 300 tensors to two receivers through shared memory, beside the memcpys it must do
tree      the same over ZeroMQ on loopback tcp, beside raw ZeroMQ
decode    two rollout workers generate while weights of that size come to both
faults    receivers and publishers that are killed or stopped at any moment
plan      Qwen3-235B-A22B's shapes from FSDP 64 x EP 8 x TP 4 to 16 engines of TP 8 / EP 8

What goes between GPUs (NCCL, CUDA IPC) is measured by tests/gpu/exchange, on a machine that has one.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Callable

from _weights_decode import DECODE_BARS, measure_decode
from _weights_faults import FAULT_BARS, measure_faults
from _weights_plan import PLAN_BARS, measure_plan
from _weights_shm import SHM_BARS, measure_shm
from _weights_tree import TREE_BARS, measure_tree

from headrace.benchmark import Bar, Figures, Say

EXAMPLE = "bin/bench weights --mib 256 --trials 10 --json weights.json"

BARS: list[Bar] = [*SHM_BARS, *TREE_BARS, *DECODE_BARS, *FAULT_BARS, *PLAN_BARS]

SECTIONS: dict[str, Callable[[argparse.Namespace, Say], Figures]] = {
    "shm": lambda options, say: asyncio.run(measure_shm(options.mib << 20, options.rounds, say)),
    "tree": lambda options, say: asyncio.run(measure_tree(options.mib << 20, options.rounds, say)),
    "decode": lambda options, say: asyncio.run(measure_decode(options.mib << 20, options.rounds, say)),
    "faults": lambda options, say: asyncio.run(measure_faults(options.trials, say, options.seed)),
    "plan": lambda options, say: measure_plan(say),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--mib", type=int, default=1024, metavar="N", help="size of the weights (default 1024)")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="publishes of each kind (default 7)")
    parser.add_argument("--trials", type=int, default=100, metavar="N", help="faults, at random moments (default 100)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the faults (default 0)")
    parser.add_argument("--only", choices=SECTIONS, help="measure this part; the figures of the others are missing")


def measure(options: argparse.Namespace, say: Say) -> Figures:
    """All figures of all parts, or of one; those that are barred and were not measured are None."""
    figures: dict[str, float | None] = {bar.name: None for bar in BARS}
    for name, section in SECTIONS.items():
        if options.only in (None, name):
            say(name)
            figures |= section(options, say)
    say("NCCL and CUDA IPC: not yet measured on a GPU; tests/gpu/exchange measures them where there is one")
    return figures
