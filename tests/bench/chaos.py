"""A million messages among processes that are killed and stopped at random, and nothing is silent.

Senders call and cast, runners run: five nodes, eight actors. All keep books (_chaos_ledger.py) that survive kill -9 and
trust nothing of what the runtime says. Meanwhile nodes get SIGKILL, or SIGSTOP and SIGCONT, and actors fail. Then all
is quiet, and the books are read:

    every call         has ended in a reply, a remote error or a typed failure, by its deadline + 100 ms (from when its
                       process could go on, if it was stopped over its deadline)
    every cast         ran; or was refused at once; or was with an actor or a node that ended, and is among what the
                       runtime reported as dead letters or lost; or was in the hands of a sender that was killed
    no message         ran twice, ran though it was refused, or was answered though it did not run

`silent` counts what is in none of these; then the nodes' own counters must add up: sent = handled + dead-lettered +
withdrawn + reported as lost. The plan of faults follows from --seed; which message it meets does not.

Partitions are tried in a network in memory, with a virtual clock (_chaos_memory.py). At last a root is killed, again
and again, in the middle of whatever it does: 100 ms later nothing that it started may live, what its nodes have started
included.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

import _chaos_memory
import _chaos_orphans
import _chaos_run
import uvloop

from headrace.benchmark import Bar, Figures, Say

EXAMPLE = "bin/bench chaos --messages 100000 --seed 7 --json chaos.json"

BARS = [
    Bar("silent_messages", "<=", 0),
    Bar("counters_disagree", "<=", 0),
    Bar("unended_calls", "<=", 0),
    Bar("hung", "<=", 0),
    Bar("late_calls", "<=", 0),
    Bar("untyped_failures", "<=", 0),
    Bar("wrong_answers", "<=", 0),
    Bar("ran_twice", "<=", 0),
    Bar("phantoms", "<=", 0),
    Bar("not_sent", "<=", 0),
    Bar("partition_violations", "<=", 0),
    Bar("orphans", "<=", 0),
    Bar("leaked_segments", "<=", 0),
    Bar("leaked_processes", "<=", 0),
]

TRIALS = 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--messages", type=_count, default=1_000_000, metavar="N", help="(default 1,000,000)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the faults (default 0)")
    parser.add_argument(
        "--trials", type=_count, default=TRIALS, metavar="N", help=f"how often a root is killed (default {TRIALS})"
    )
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep books and logs there")


def _count(text: str) -> int:
    number = int(text.replace("_", "").replace(",", ""))
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def measure(options: argparse.Namespace, say: Say) -> Figures:
    """All figures, the barred ones first."""
    folder = (options.keep or Path(tempfile.mkdtemp(prefix="headrace-chaos-"))).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        figures = uvloop.run(_chaos_run.run(folder, options.messages, options.seed, say))
        figures |= _chaos_memory.run(options.seed, say)
        figures |= _chaos_orphans.run(options.trials, options.seed, say)
    finally:
        if options.keep is None:
            shutil.rmtree(folder)
    return {name: figures.get(name) for name in dict.fromkeys([*(bar.name for bar in BARS), *figures])}
