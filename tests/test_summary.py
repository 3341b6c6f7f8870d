"""The report at the end of a run."""

from __future__ import annotations

import io
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from headrace.actors.data import running_sum
from headrace.actors.data.running_sum import RunningSum
from headrace.actors.job import load_job
from headrace.actors.report import SUMMARY
from headrace.summary import accuracy_table, final_report, first_and_last, size_ranges, suggestions, wrong_step

CLUSTER = Path(__file__).parents[1] / "cluster.toml"


def evaluation(stage: str, step: int, score: float) -> Any:
    """All of the 10 problems of size s have the score `score` / s."""
    by_size = {str(size): [10, score / size, score / size] for size in range(2, 15)}
    mean = float(np.mean([score / size for size in range(2, 15)]))
    return {"stage": stage, "step": step, "version": 1, "pass_at_1": mean, "greedy": mean, "n": 130, "by_size": by_size}


def summary(**changes: Any) -> dict[str, Any]:
    found: dict[str, Any] = {
        "ok": True, "reason": "", "run": "default", "steps": 200, "wall_s": 261.0, "stages": {"sft": 62.1, "rl": 181.0},
        "evaluation": [evaluation("sft", 300, 0.5), evaluation("rl", 180, 1.5), evaluation("rl", 200, 2.0)],
        "samples": [
            {
                "prompt": "a+9b+7=", "solution": "a+9=9b+7=16#16", "before": "a+9=9b+7=6#6", "after": "a+9=9b+7=16#16",
                "before_correct": False, "after_correct": True,
            }
        ],
        "restarts": {"trainer": 1, "pool": 0}, "staleness": {"mean": 1.25, "max": 4},
        "tokens": {"sampled": 3_123_456, "trained": 1_512_345}, "peak_rss_bytes": 3 << 29,
    }  # fmt: skip
    assert found.keys() == SUMMARY.keys()
    return found | changes


def text_of(content: dict[str, Any], run: Path, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width, record=True, color_system=None, highlight=False)
    final_report(content, run, console=console)
    return console.export_text()


def test_the_report_says_what_was_learned_and_what_it_took() -> None:
    text = text_of(summary(), Path("runs/default"))
    for part in (
        "default finished: 200 RL steps in 4:21 (SFT 1:02, RL 3:01)", "3.12M tokens sampled, 1.51M trained",
        "staleness 1.2 on average, 4 at most", "memory 1.5 GiB", "restarts: trainer 1; files are in runs/default/",
        "Accuracy on 130 fixed problems", "after 200 RL steps", "before   a+9=9[b+7=6]#6  wrong",
        "after    a+9=9b+7=16#16  right",
    ):  # fmt: skip
        assert " ".join(part.split()) in " ".join(text.split()), part


def test_the_accuracy_of_a_range_weighs_each_problem_alike() -> None:
    console = Console(file=io.StringIO(), width=100, record=True, color_system=None)
    console.print(accuracy_table(evaluation("sft", 300, 0.5), evaluation("rl", 200, 2.0)))
    lines = [line.split() for line in console.export_text().splitlines()]
    assert lines[0] == ["2-5", "6-8", "9-11", "12-14", "all"]
    assert lines[1] == ["problems", "40", "30", "30", "30", "130"]
    ranges = ((2, 6), (6, 9), (9, 12), (12, 15))
    expected = [f"{np.mean([2.0 / size for size in range(low, high)]):.2f}" for low, high in ranges]
    assert lines[3][-5:-1] == expected
    assert lines[5][-5:-1] == expected


def test_first_and_last_evaluations() -> None:
    early, late, end = evaluation("sft", 100, 0.1), evaluation("sft", 300, 0.2), evaluation("rl", 20, 0.3)
    assert first_and_last([]) == (None, None)
    assert first_and_last([early, late, end]) == (late, end)
    assert first_and_last([end]) == (end, end)


def test_a_run_that_was_stopped_early_still_has_a_report(tmp_path: Path) -> None:
    text = text_of(summary(ok=False, reason="interrupted", evaluation=[], samples=[], stages={}, steps=0), tmp_path)
    assert "stopped (interrupted): 0 RL steps in 4:21" in text
    assert "Accuracy" not in text


@given(sizes=st.sets(st.integers(1, 60), min_size=1))
def test_ranges_cover_every_size_once(sizes: set[int]) -> None:
    ranges = size_ranges(sorted(sizes))
    assert [sum(low <= size <= high for low, high in ranges) for size in sizes] == [1] * len(sizes)
    counts = [sum(low <= size <= high for size in sizes) for low, high in ranges]
    assert max(counts) - min(counts) <= 1
    assert len(ranges) <= 4


@pytest.mark.parametrize(
    ("answer", "marked"),
    [
        ("a+9=9b+7=16c-2=14#14", None),
        ("a+9=9b+7=6c-2=4#4", "b+7=6"),
        ("a+9=9b+8=17c-2=15#15", "b+8=17"),
        ("a+9=9b+7=16c-2=14#1", ""),
        ("a+9=9b+7=16c-2=14#14#14", "#14"),
        ("a+9=9b+7=16c-2=14#15", "#15"),
        ("x", "x"),
        ("", ""),
        ("=9", "=9"),
    ],
)
def test_the_first_wrong_step(answer: str, marked: str | None) -> None:
    span = wrong_step(answer, "a+9=9b+7=16c-2=14#14")
    assert (None if span is None else answer[slice(*span)]) == marked


def test_a_demonstrator_is_marked_at_its_first_wrong_total() -> None:
    """Oracle: follow the sum, operand by operand."""
    task = RunningSum(bias=0.5)
    for example in task.demonstrations(0, np.arange(200), 14):
        answer, solution = running_sum.decode(example.response), running_sum.decode(task.solve(example.prompt))
        span = wrong_step(answer, solution)
        totals = np.cumsum(running_sum.operands_of(example.prompt))
        steps = answer.replace("#", " #").split(" ")[0]
        written = [part.split("=") for part in _split(steps)]
        wrong = next((i for i, (_, total) in enumerate(written) if int(total) != totals[i]), None)
        if wrong is None:
            assert span is None
        else:
            assert span is not None
            assert answer[slice(*span)] == "=".join(written[wrong])


def _split(steps: str) -> list[str]:
    out: list[str] = []
    for letter in steps:
        if letter.isalpha():
            out.append("")
        out[-1] += letter
    return out


def test_every_suggested_command_is_a_valid_job(tmp_path: Path) -> None:
    run = tmp_path / "default"
    (run / "tensorboard").mkdir(parents=True)
    (run / "config.toml").write_text(load_job(CLUSTER).to_toml())
    commands = [shlex.split(command) for _, command in suggestions(summary(restarts={}), run)]
    assert len(commands) == 5
    for program, *arguments in commands:
        if program == "tensorboard":
            continue
        assert (program, arguments[0]) == ("bin/launch", str(run / "config.toml"))
        overrides = arguments[2::2]
        assert set(arguments[1::2]) == {"--set"}
        job = load_job(arguments[0], overrides)
        assert job.run.name != "default"


def test_what_is_suggested_depends_on_what_happened(tmp_path: Path) -> None:
    def reasons(**changes: Any) -> str:
        return "\n".join(why for why, _ in suggestions(summary(**changes), tmp_path))

    assert "train longer" in reasons()
    assert "train longer" not in reasons(evaluation=[evaluation("sft", 1, 1.0), evaluation("rl", 9, 1.0)])
    assert "kill -9" not in reasons()
    assert "kill -9" in reasons(restarts={"trainer": 0})
    assert "all curves" not in reasons()


def test_several_data_sets_have_a_table_and_their_answers_no_steps(tmp_path: Path) -> None:
    scores = [evaluation("sft", 300, 0.5), evaluation("rl", 200, 2.0)]
    for score, right in zip(scores, (0.25, 0.75), strict=True):
        score["by_dataset"] = {"maze": [100, right, right], "sudoku": [30, 0.0, right]}
    (tmp_path / "config.toml").write_text('[task]\nkind = "puzzles"\n')
    text = text_of(summary(evaluation=scores), tmp_path)
    lines = [line.split() for line in text.split("The same by puzzle")[1].splitlines()]
    assert lines[1:3] == [["maze", "sudoku", "all"], ["problems", "100", "30", "130"]]
    assert lines[4][-3:-1] == ["0.75", "0.75"] and lines[5][-3:-1] == ["0.25", "0.00"]
    assert "before   a+9=9b+7=6#6    wrong" in text and "[" not in text.split("Greedy answers")[1].split("What to")[0]
    assert "The same by puzzle" not in text_of(summary(), tmp_path)
