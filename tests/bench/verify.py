"""Verifiable rewards: does a verdict agree with labels, how fast is it, and what do hostile answers achieve.

math      math-verify in killable processes against the labels of ../shared/data/verifier_triples, and the references
          of MATH-500 against themselves; figures are None where the data are not on this machine.
puzzles   22 tasks: what our own solver says is accepted, what was corrupted is refused; tests/puzzle_oracle.py, which
          shares nothing with the suite, says first that the one is right and the other wrong.
code      programs against tests in sandboxes: right ones, wrong ones and attacks, and what a sandbox costs; figures are
          None where bubblewrap does not work, or the data are not there.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

from _verify_code import BARS as CODE_BARS
from _verify_code import measure_code
from _verify_math import measure_math
from _verify_puzzles import measure_puzzles

from headrace.benchmark import Bar, Figures, Say

EXAMPLE = "bin/bench verify --instances 2200 --json verify.json"

BARS = [
    Bar("math_agreement_ratio", ">=", 0.99),
    Bar("math_agreement_math_verify_tests_ratio", ">=", 0.99),
    Bar("math_agreement_gsm8k_model_solutions_1000_ratio", ">=", 0.99),
    Bar("math500_self_ratio", ">=", 1.0),
    Bar("math_verdicts_per_s", ">=", 200.0),
    Bar("hostile_cases", ">=", 60),
    Bar("hostile_verdict_ratio", ">=", 1.0),
    Bar("hostile_code_runs", "<=", 0),
    Bar("puzzle_tasks_count", ">=", 22),
    Bar("puzzles_accepted_count", ">=", 20_000),
    Bar("puzzles_accepted_ratio", ">=", 1.0),
    Bar("puzzles_refused_count", ">=", 20_000),
    Bar("puzzles_refused_ratio", ">=", 1.0),
    Bar("puzzles_solved_proven_ratio", ">=", 1.0),
    Bar("puzzles_corrupted_proven_ratio", ">=", 1.0),
    Bar("puzzle_verdicts_per_s", ">=", 5000.0),
    *CODE_BARS,
]


SECTIONS: dict[str, Callable[[argparse.Namespace, Say], Figures]] = {
    "math": lambda options, say: measure_math(say),
    "puzzles": lambda options, say: measure_puzzles(options.instances, say),
    "code": lambda options, say: measure_code(say),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--instances", type=int, default=20_000, metavar="N", help="puzzles in all, over 22 tasks (default 20000)"
    )
    parser.add_argument("--only", choices=SECTIONS, help="measure this part; the figures of the others are missing")


def measure(options: argparse.Namespace, say: Say) -> Figures:
    """All figures of all parts, or of one; those that are barred and were not measured are None."""
    figures: dict[str, float | None] = {bar.name: None for bar in BARS}
    for name, section in SECTIONS.items():
        if options.only in (None, name):
            figures |= section(options, say)
    return figures
