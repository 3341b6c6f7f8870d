"""The puzzle part of `bin/bench verify`: generate, solve, accept; corrupt, refuse; and how fast one process judges.

    figures = measure_puzzles(20_000, say)

Instances are spread evenly over the tasks and over the levels 1..10 of each. A verdict is timed as a verifier gives it:
from the whole text of a response to True or False. "long" is the same behind 16 Ki characters of reasoning. That
solutions are right and corrupted ones wrong is proven by tests/puzzle_oracle.py, not by the suite.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from headrace.actors.verifier.puzzles import MAX_LEVEL, TASKS, Puzzle, corrupt, generate, solve, verify

SEED = 20
REASONING = "Row 3 needs a 4, so column 2 can't hold it; I try 1 = 4 - 3 and \\boxed{1}.\n" * 220
MARK = "Answer:\n"
SHOWN = 3
"""Failures that are printed for each task."""

Judged = list[tuple[Puzzle, str]]


def measure_puzzles(instances: int, say: Callable[[str], None]) -> dict[str, float]:
    """Figures of at least `instances` puzzles, over all tasks together."""
    each = -(-instances // len(TASKS))
    right, wrong = _make(each, say)
    oracle = _oracle()
    accepted, refused, solved, corrupted, seconds, slowest = 0, 0, 0, 0, 0.0, 0.0
    for task in TASKS:
        began = time.perf_counter()
        passed = [verify(puzzle, text) for puzzle, text in right[task]]
        failed = [not verify(puzzle, text) for puzzle, text in wrong[task]]
        spent = time.perf_counter() - began
        seconds, slowest = seconds + spent, max(slowest, spent / (2 * each))
        accepted, refused = accepted + sum(passed), refused + sum(failed)
        good = [oracle.right(task, puzzle.data, text.removeprefix(MARK)) for puzzle, text in right[task]]
        bad = [not oracle.right(task, puzzle.data, text.removeprefix(MARK)) for puzzle, text in wrong[task]]
        solved, corrupted = solved + sum(good), corrupted + sum(bad)
        _show(say, "a solution is wrong by the second opinion", good, right[task])
        _show(say, "a corrupted answer is right by the second opinion", bad, wrong[task])
        _show(say, "a solution was refused", passed, right[task])
        _show(say, "a wrong answer was accepted", failed, wrong[task])
    total = each * len(TASKS)
    return {
        "puzzle_tasks_count": len(TASKS),
        "puzzles_accepted_count": accepted,
        "puzzles_accepted_ratio": accepted / total,
        "puzzles_refused_count": refused,
        "puzzles_refused_ratio": refused / total,
        "puzzles_solved_proven_ratio": solved / total,
        "puzzles_corrupted_proven_ratio": corrupted / total,
        "puzzle_verdicts_per_s": 2 * total / seconds,
        "puzzle_slowest_task_verdicts_per_s": 1 / slowest,
        "puzzle_long_verdicts_per_s": _long(right),
    }


def _make(each: int, say: Callable[[str], None]) -> tuple[dict[str, Judged], dict[str, Judged]]:
    """For each task, puzzles with their solutions, and with corrupted ones."""
    right: dict[str, Judged] = {}
    wrong: dict[str, Judged] = {}
    for task in TASKS:
        began = time.perf_counter()
        puzzles = [generate(task, seed=SEED, ordinal=i, difficulty=i % MAX_LEVEL + 1) for i in range(each)]
        made = time.perf_counter()
        right[task] = [(puzzle, solve(puzzle)) for puzzle in puzzles]
        solved = time.perf_counter()
        wrong[task] = [
            (puzzle, corrupt(puzzle, text, seed=SEED, ordinal=i)) for i, (puzzle, text) in enumerate(right[task])
        ]
        say(f"{task}: {each} puzzles made in {made - began:.1f} s, solved in {solved - made:.1f} s")
    return right, wrong


def _long(right: dict[str, Judged]) -> float:
    texts = [(puzzle, REASONING + text) for judged in right.values() for puzzle, text in judged[:20]]
    began = time.perf_counter()
    for puzzle, text in texts:
        verify(puzzle, text)
    return len(texts) / (time.perf_counter() - began)


def _show(say: Callable[[str], None], what: str, ok: list[bool], judged: Judged) -> None:
    bad = [(puzzle, text) for fine, (puzzle, text) in zip(ok, judged, strict=True) if not fine]
    for puzzle, text in bad[:SHOWN]:
        say(f"{what}: {puzzle.task}, difficulty {puzzle.difficulty}, data {puzzle.data}, text {text!r}")


def _oracle() -> ModuleType:
    spec = importlib.util.spec_from_file_location("puzzle_oracle", Path(__file__).parents[1] / "puzzle_oracle.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
