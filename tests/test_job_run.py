"""A whole job as a user runs it: what it leaves behind, how it is interrupted and resumed, and what is refused."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_job import CLUSTER, Launch, check_rows, launch, wait_until_gone

from headrace.actors.report import SUMMARY

LONG = {"rl.steps": 30}


def refused(tmp: Path, *arguments: str, files: str = "*") -> str:
    """What a launch says that ends with exit code 2. It must leave `files` of the run as they are."""

    def written() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in tmp.glob(f"runs/tiny/{files}") if path.name != "lock"}

    before = written()
    with launch(tmp, LONG, *arguments) as job:
        assert job.finish() == 2, job.errors
    assert job.output == ""
    assert job.errors.count("\n") == 1
    assert written() == before
    return job.errors


def test_a_run_reaches_its_end_and_cannot_be_launched_again(tmp_path: Path) -> None:
    with launch(tmp_path, LONG | {"rl.steps": 6, "evaluation.every": 4}) as job:
        job.wait_for_event("first_rollout")
        assert f"in use by process {job.process.pid}" in refused(tmp_path, files="config.toml")
        assert job.finish() == 0, job.errors
    assert job.errors == ""
    assert job.left_behind() == []
    check_rows(job, 6)
    assert [row["step"] for row in job.rows("sft")] == [20, 40, 60]
    assert [row["version"] for row in job.rows("sft")] == [0, 0, 1]
    assert [row.get("eval_version") for row in job.rows()] == [None, None, None, 5, None, 7]
    assert all(row["publish_s"] > 0 for row in job.rows()[1:-1] if "publish_s" in row)

    summary = job.summary
    assert summary.keys() == SUMMARY.keys()
    assert summary["ok"] and summary["steps"] == 6 and summary["restarts"] == {}
    assert [(e["stage"], e["step"], e["version"]) for e in summary["evaluation"]] == [
        ("sft", 60, 1), ("rl", 4, 5), ("rl", 6, 7),
    ]  # fmt: skip
    assert all(e["n"] == 16 and 0 <= e["pass_at_1"] <= 1 and 0 <= e["greedy"] <= 1 for e in summary["evaluation"])
    assert summary["tokens"]["trained"] == sum(row["trained_tokens"] for row in job.rows())
    assert sum(summary["stages"].values()) == pytest.approx(summary["wall_s"], abs=0.5)
    assert summary["peak_rss_bytes"] > 100 << 20

    names = {event["event"] for event in job.events()}
    assert {"system_start", "node_start", "actor_up", "first_rollout", "checkpoint", "system_stop"} <= names
    assert sorted(e["node"] for e in job.events("node_start")) == ["reward", "rollout", "trainer", "verifier"]
    assert sorted(path.name for path in (job.run / "checkpoints").iterdir()) == ["LATEST", "done-000006", "rl-000004"]
    assert [line for line in job.output.splitlines() if "rl" in line.split()[1:2]] != []
    assert "tiny finished: 6 RL steps" in job.output

    assert "finished run (6 steps); start another run with --set run.name=tiny-2" in refused(tmp_path)
    assert "the run has finished (6 steps)" in refused(tmp_path, "--resume")


def test_a_run_that_was_never_started_cannot_be_resumed(tmp_path: Path) -> None:
    assert "no run to resume" in refused(tmp_path, "--resume")
    assert not (tmp_path / "runs").exists()


def test_ctrl_c_drains_and_resume_goes_on(tmp_path: Path) -> None:
    with launch(tmp_path, LONG) as job:
        job.wait_for_step(6)
        os.killpg(job.process.pid, signal.SIGINT)
        assert job.finish() == 130, job.errors
    assert job.errors == f"stopped; go on with: bin/launch {job.run}/config.toml --resume\n"
    assert "draining: " in job.output
    assert job.left_behind() == []
    drained, steps = job.rows(), len(job.rows())
    assert steps >= 6
    assert not job.summary["ok"] and job.summary["reason"] == "interrupted" and job.summary["steps"] == steps
    assert "continue it with --resume" in refused(tmp_path)

    with launch(tmp_path, LONG, "--resume") as job:
        assert job.finish() == 0, job.errors
    assert job.events("resumed")[0].items() >= {"stage": "rl", "step": steps}.items()
    assert job.events("first_rollout") == []
    assert first_step_shown(job) == steps + 1
    check_rows(job, 30)
    assert job.rows()[:steps] == drained
    check_totals(job)


@pytest.mark.slow
def test_a_killed_launcher_leaves_no_process_and_resume_goes_on_from_the_last_checkpoint(tmp_path: Path) -> None:
    with launch(tmp_path, LONG) as job:
        job.wait_for_step(10)
        os.kill(job.process.pid, signal.SIGKILL)
        job.finish()
        wait_until_gone([e["pid"] for e in job.events("node_start")])
    lost = job.rows()
    kept = int(job.events("checkpoint")[-1]["folder"].removeprefix("rl-"))
    assert 8 <= kept <= len(lost)

    with launch(tmp_path, LONG, "--resume") as job:
        job.wait_for_event("resumed", stage="rl", step=kept)
        assert job.finish() == 0, job.errors
    assert first_step_shown(job) == kept + 1
    check_rows(job, 30)
    assert job.rows()[:kept] == lost[:kept]
    check_totals(job)


@pytest.mark.slow
def test_ctrl_c_in_the_warm_up_keeps_its_steps(tmp_path: Path) -> None:
    settings = {"sft.steps": 400, "sft.checkpoint_every": 100}
    with launch(tmp_path, settings) as job:
        job.wait_for_step(120, "sft")
        job.interrupt(signal.SIGTERM)
        assert job.finish() == 130, job.errors
    done = job.rows("sft")[-1]["step"]
    with launch(tmp_path, settings, "--resume") as job:
        job.wait_for_event("resumed", stage="sft", step=done)
        job.wait_for_step(done + 40, "sft")
    steps = [row["step"] for row in job.rows("sft")]
    assert steps == list(range(20, steps[-1] + 1, 20))


def test_ctrl_c_before_anything_was_learned_stops_at_once(tmp_path: Path) -> None:
    with launch(tmp_path) as job:
        job.wait_for_event("node_start", node="trainer")
        job.interrupt()
        assert job.finish(10) == 130, job.errors
    assert job.errors == f"stopped; go on with: bin/launch {job.run}/config.toml --resume\n"
    assert job.output == ""
    assert job.left_behind() == []


@pytest.mark.slow
def test_a_second_ctrl_c_stops_at_once(tmp_path: Path) -> None:
    """Even while the trainer is stuck."""
    with launch(tmp_path, LONG) as job:
        job.wait_for_step(1)
        os.kill(job.pid("trainer"), signal.SIGSTOP)
        job.interrupt()
        job.interrupt(signal.SIGTERM)  # Two signals of one kind may arrive as one.
        assert job.finish(15) == 130, job.errors
    assert "Traceback" not in job.output + job.errors
    assert job.left_behind() == []


def test_with_attach_the_prompt_is_here_and_the_run_goes_on_without_it(tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-m", "headrace", "launch", str(CLUSTER), "--attach"]
    command += ["--set", f"run.directory={tmp_path}", "--set", "run.name=seen"]
    done = subprocess.run(
        command, input="print(tree())\n", capture_output=True,
        text=True, timeout=60, check=False,
    )  # fmt: skip
    try:
        assert done.returncode == 0, done.stderr
        assert "controller" in done.stdout and "the run goes on" in done.stdout
    finally:
        pid = int(done.stdout.split("the run is process ")[1].split(";")[0])
        os.kill(pid, signal.SIGINT)
        os.kill(pid, signal.SIGINT)
    deadline = time.monotonic() + 30
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{pid}").exists()
    again = subprocess.run(command, input="", capture_output=True, text=True, timeout=60, check=False)
    assert again.returncode == 2 and "seen" in again.stderr, again.stderr


@pytest.mark.parametrize("delay_s", [0.02, 0.15, 0.4])
def test_ctrl_c_while_it_reads_its_code_says_no_more_than_a_line(delay_s: float, tmp_path: Path) -> None:
    code = (
        "import os, signal, sys\n"
        "signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGINT))\n"
        "from headrace.__main__ import main\n"
        f"signal.setitimer(signal.ITIMER_REAL, {delay_s})\n"
        f"sys.exit(main(['launch', {str(CLUSTER)!r}, '--set', 'run.directory={tmp_path}']))\n"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 130, done.stderr
    assert done.stderr.count("\n") <= 1, done.stderr


def check_totals(job: Launch) -> None:
    """They go on where an earlier process left them."""
    rows, summary = job.rows(), job.summary
    assert [(e["stage"], e["step"], e["version"]) for e in summary["evaluation"]] == [("sft", 60, 1), ("rl", 30, 31)]
    assert summary["wall_s"] >= rows[-1]["elapsed_s"]
    assert summary["tokens"]["trained"] == sum(row["trained_tokens"] for row in rows)
    assert summary["staleness"]["max"] == max(row["staleness_max"] for row in rows)
    submitted = [row["submitted_groups"] for row in rows]
    assert submitted == sorted(submitted)
    assert len({path.name for path in (job.run / "checkpoints").iterdir()}) == 3


def first_step_shown(job: Launch) -> int:
    return next(
        int(line.split()[2].partition("/")[0]) for line in job.output.splitlines() if line.split()[1:2] == ["rl"]
    )
