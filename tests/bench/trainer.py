"""The trainer: tokens per second of one process, balanced packing, and what a call of a worker group costs.

trainer_over_plain_loop   one trainer process on the default model beside a plain torch loop with the same model and
                          tokens, neither with padding; see _throughput.py.
packed_over_padded        tokens per second of packed sequences beside padded ones, lengths with a long tail.
balance                   Karmarkar-Karp: the heaviest of 128 parts of 8,192 sequences, and golden instances reached.
group_call                8 ranks in processes of their own, 32 MiB of batch; see _groups.py. in: the batch is cut,
                          copied into shared memory and sent; in_out: and 32 MiB come back and are joined. Their ratios
                          are to one memcpy of those bytes plus the same call with 8 numbers (latency). born: the batch
                          was made in shared memory; kept: and the result stays with the ranks; to the latency alone.

learning                  DAPO and VAPO on the default task, and VAPO without two of its parts; see _learning.py. Twenty
                          minutes on two quiet cores; the other sections take two.

Turn by turn in one run, so ratios hold on a busy machine too; tokens per second and times do not.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping

import uvloop
from _balance import BALANCE_BARS, measure_balance
from _groups import GROUP_BARS, measure_groups
from _learning import LEARNING_BARS, measure_learning
from _throughput import THROUGHPUT_BARS, measure_throughput

from headrace.benchmark import Figures, Say

EXAMPLE = "bin/bench trainer --section throughput --section groups --quick --json trainer.json"

BARS = [*THROUGHPUT_BARS, *BALANCE_BARS, *GROUP_BARS, *LEARNING_BARS]

SECTIONS: Mapping[str, Callable[[bool, Say], Mapping[str, float | None]]] = {
    "throughput": lambda quick, say: measure_throughput(8 if quick else 40, say),
    "balance": lambda quick, say: measure_balance(),
    "groups": lambda quick, say: uvloop.run(measure_groups(10 if quick else 40, say)),
    "learning": lambda quick, say: measure_learning(say),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="fewer rounds in the sections throughput and groups")
    parser.add_argument(
        "--section", action="append", choices=[*SECTIONS], help="only this one, or these; what is left out is None"
    )


def measure(options: argparse.Namespace, say: Say) -> Figures:
    """The figures of the sections that are asked for."""
    figures: dict[str, float | None] = {bar.name: None for bar in BARS}
    for name in options.section or SECTIONS:
        figures |= SECTIONS[name](options.quick, say)
        say(f"{name}: done")
    return figures
