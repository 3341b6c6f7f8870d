"""Verifiers in a whole job: puzzles as the task, verdicts in the metrics, and a user's verifier that never answers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_job import CLUSTER, PUZZLES, Launch, launch

from headrace.actors.data import Puzzles
from headrace.actors.job import load_job
from headrace.actors.run_state import load_state

TESTS = Path(__file__).parent
HANGS = {
    "rl.steps": 200, "actors.verifier.class": "headrace.actors.verifier:TextVerifier",
    "actors.verifier.function": "verifier_functions:hang",
}  # fmt: skip


def check_verdicts(job: Launch) -> None:
    """Totals never fall, and fit each other."""
    rows = [row for row in job.rows() if "verifier_verdicts" in row]
    assert len(rows) >= len(job.rows()) - 2
    for name in ("verdicts", "correct", "incorrect", "errors", "cache_hits"):
        counts = [row[f"verifier_{name}"] for row in rows]
        assert counts == sorted(counts)
    for row in rows:
        parts = ("correct", "incorrect", "graded", "errors", "cache_hits")
        assert row["verifier_verdicts"] == sum(row[f"verifier_{name}"] for name in parts)
        assert row["verifier_errors"] == 0 and 0 <= row["verifier_latency_p50_s"] <= row["verifier_latency_p99_s"]
    assert rows[-1]["verifier_correct"] > 0 and rows[-1]["verifier_incorrect"] > 0


@pytest.mark.slow
def test_verdicts_are_counted_over_the_deaths_of_the_verifier(tmp_path: Path) -> None:
    with launch(tmp_path, {"rl.steps": 20}) as job:
        job.wait_for_step(5)
        before = job.rows()[-1]["verifier_verdicts"]
        job.kill("verifier")
        job.wait_for_event("actor_up", actor="verifier", incarnation=2)
        assert job.finish() == 0, job.errors
    check_verdicts(job)
    judged = 4 * job.rows()[-1]["groups"] * 10
    assert job.rows()[-1]["verifier_verdicts"] > before + judged


@pytest.mark.slow
def test_puzzles_are_trained_evaluated_and_resumed(tmp_path: Path) -> None:
    with launch(tmp_path, {"rl.steps": 24}, cluster=PUZZLES) as job:
        job.wait_for_step(8)
        job.kill("verifier")
        job.wait_for_step(len(job.rows()) + 2)
        job.interrupt()
        assert job.finish() == 130, job.errors
    assert isinstance(load_job(job.run / "config.toml").task, Puzzles)
    state, _ = load_state(job.run)
    assert state.adaptation["puzzles"] == ["kakurasu", "countdown"]
    drained = job.rows()
    with launch(tmp_path, {"rl.steps": 24}, "--resume", cluster=PUZZLES) as job:
        assert job.finish() == 0, job.errors
    assert job.left_behind() == []
    check_verdicts(job)
    rows = job.rows()
    assert [row["step"] for row in rows] == list(range(1, 25)) and rows[: len(drained)] == drained
    assert all(1 <= row["puzzle_level/kakurasu"] <= 2 for row in rows)
    assert rows[len(drained)]["verifier_verdicts"] >= drained[-1]["verifier_verdicts"]
    for evaluation in job.summary["evaluation"]:
        assert sum(scores[0] for scores in evaluation["by_dataset"].values()) == evaluation["n"] == 16
    assert "The same by puzzle" in job.output


# A verifier that hangs


def processes_with(text: str) -> list[int]:
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            try:
                if text.encode() in (folder / "environ").read_bytes():
                    found.append(int(folder.name))
            except (PermissionError, FileNotFoundError, ProcessLookupError):
                pass
    return found


def ended(job: Launch, flag: Path) -> None:
    assert job.finish(30) == 130, job.errors
    assert job.errors == f"stopped; go on with: bin/launch {job.run}/config.toml --resume\n"
    assert job.left_behind() == []
    until = time.monotonic() + 10
    while left := processes_with(str(flag)):
        assert time.monotonic() < until, left
        time.sleep(0.05)


@pytest.fixture
def flag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """While this file is there, verifier_functions.hang never answers, and takes no signal that can be refused."""
    monkeypatch.setenv("HEADRACE_TEST_HANG", str(tmp_path / "hang"))
    return tmp_path / "hang"


def hanging(flag: Path) -> Callable[[], bool]:
    return flag.with_name("hang.reached").exists


@pytest.mark.slow
def test_a_verifier_that_hangs_in_rl_does_not_keep_the_run_from_stopping(tmp_path: Path, flag: Path) -> None:
    with launch(tmp_path, HANGS) as job:
        job.wait_for_step(3)
        flag.touch()
        steps = len(job.rows())
        job.wait("no more verdicts", hanging(flag))
        job.interrupt(signal.SIGTERM)
        ended(job, flag)
    assert len(job.rows()) >= steps
    state, _ = load_state(job.run)
    assert state.rl_steps >= steps and state.in_flight, "what was not judged goes on after a resume"


@pytest.mark.slow
def test_a_verifier_that_hangs_from_the_start_does_not_either(tmp_path: Path, flag: Path) -> None:
    flag.touch()
    with launch(tmp_path, HANGS) as job:
        job.wait("a verdict is waited for", hanging(flag))
        job.interrupt(signal.SIGTERM)
        ended(job, flag)


@pytest.mark.slow
@pytest.mark.parametrize("signals", [[signal.SIGTERM], [signal.SIGTERM, signal.SIGINT]])
def test_nor_in_an_evaluation(signals: list[signal.Signals], tmp_path: Path, flag: Path) -> None:
    with launch(tmp_path, HANGS) as job:
        job.wait_for_step(40, "sft")
        flag.touch()
        job.wait("a verdict is waited for", hanging(flag))
        for number in signals:
            job.interrupt(number)
        ended(job, flag)
    given_up = job.events("evaluation_given_up")
    assert bool(given_up) is (len(signals) == 1)
    if given_up:
        assert "eval_version" not in job.rows("sft")[-1] and load_state(job.run)[0].stage == "rl"


# What can't be imported


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["actors.verifier.class=my_verifiers:Judge"], "[actors.verifier] class: there is no module my_verifiers"),
        (
            ["actors.verifier.class=headrace.actors.verifier:PuzleVerifier"],
            'has no class PuzleVerifier; did you mean "PuzzleVerifier"?',
        ),
        (
            ["actors.verifier.class=headrace.actors.verifier:TextVerifier", "actors.verifier.function=no_such:judge"],
            "[actors.verifier] function: no_such:judge: there is no module no_such; is its folder on PYTHONPATH?",
        ),
        (
            [
                "actors.verifier.class=headrace.actors.verifier:TextVerifier",
                "actors.verifier.function=verifier_functions:Judge",
            ],
            "verifier_functions has no Judge",
        ),
        (["task.kind=puzzle"], '[task] kind: there is no task "puzzle"; did you mean "puzzles"?'),
        (["task.kind=puzzles", "task.puzzles={maize=1.0}"], "there is no 'maize'; did you mean"),
        (["task.kind=puzzles", "task.max_level=9"], "max_prompt_tokens: no maze of level 5 fits 160 tokens"),
        (["task.kind=puzzles", "rl.max_new_tokens=50"], "max_level: a solution of sudoku at level 3 has 73 tokens"),
        (["task.kind=puzzles", "task.max_level=2"], "[model] vocab_size: must be at least 120"),
    ],
)  # fmt: skip
def test_one_clear_error_at_check(settings: list[str], message: str) -> None:
    command = [sys.executable, "-P", "-m", "headrace", "launch", str(CLUSTER), "--check"]
    cleared = ["task.max_operands", "task.bias"]
    sets = [part for text in settings for part in ("--set", text)]
    cluster = CLUSTER.read_text()
    if any(text.startswith("task.kind") for text in settings):
        lines = [line for line in cluster.splitlines() if not line.startswith(("max_operands", "bias"))]
        assert len(lines) == len(cluster.splitlines()) - len(cleared)
        command[5] = "/dev/stdin"
        cluster = "\n".join(lines)
    done = subprocess.run(
        [*command, *sets], input=cluster, capture_output=True, text=True, timeout=60,
        env={**os.environ, "PYTHONPATH": str(TESTS)},
    )  # fmt: skip
    assert done.returncode == 2 and done.stdout == ""
    assert message in done.stderr and done.stderr.count("\n") == 1
