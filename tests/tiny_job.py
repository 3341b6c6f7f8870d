"""A job that takes seconds, launched as a user does, watched by its files, killed and interrupted. Holds no tests."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import orjson

CLUSTER = Path(__file__).parents[1] / "cluster.toml"

NODES = ("rollout", "verifier", "reward", "trainer")

SETTINGS: dict[str, object] = {
    # A model of 11 k parameters on sums of two digits: it learns the format in 40 steps, and then errs often enough for
    # mixed groups.
    "model.hidden_size": 32, "model.num_layers": 1, "model.num_heads": 2, "model.num_kv_heads": 1, "model.head_dim": 16,
    "model.moe_intermediate_size": 32, "model.num_experts": 4,
    "task.max_operands": 2, "task.max_operand": 4, "task.slip": 0.3, "task.bias": 0.0,
    "sft.steps": 60, "sft.batch": 32, "sft.report_every": 20, "sft.checkpoint_every": 40, "sft.warmup_steps": 5,
    "rl.steps": 6, "rl.groups_per_step": 4, "rl.group_size": 4, "rl.max_new_tokens": 16, "rl.max_running": 12,
    "rl.checkpoint_every": 4, "evaluation.num_problems": 16, "actors.rollout.num_slots": 32,
    "actors.rollout.chunk_tokens": 4,
}  # fmt: skip

WAIT_S = 60.0
"""No event of a tiny job takes as long, even where tests of other projects load the machine."""


PUZZLES = CLUSTER.parent / "bin" / "clusters" / "puzzles.toml"

PUZZLE_SETTINGS: dict[str, object] = {
    # 60 k parameters on grids of 3x3 and on sums of three numbers: after the warm-up some answers are right.
    "model.hidden_size": 64, "model.num_layers": 1, "model.num_heads": 2, "model.num_kv_heads": 1, "model.head_dim": 32,
    "model.moe_intermediate_size": 64, "model.num_experts": 4,
    "task.puzzles": "{kakurasu=1.0, countdown=1.0}", "task.patience": 8,
    "sft.steps": 120, "sft.batch": 32, "sft.report_every": 40, "sft.checkpoint_every": 80, "sft.warmup_steps": 5,
    "rl.steps": 10, "rl.groups_per_step": 4, "rl.group_size": 4, "rl.max_new_tokens": 32, "rl.max_running": 12,
    "rl.checkpoint_every": 4, "evaluation.num_problems": 16, "actors.rollout.num_slots": 32,
}  # fmt: skip


class Launch:
    """One process of `bin/launch`, and what it writes."""

    def __init__(self, tmp: Path, settings: Mapping[str, object], *arguments: str, cluster: Path = CLUSTER) -> None:
        usual = PUZZLE_SETTINGS if cluster == PUZZLES else SETTINGS
        self.run = tmp / "runs" / "tiny"
        self.scratch = tmp / "t"
        self.scratch.mkdir(exist_ok=True)
        values = {"run.directory": str(tmp / "runs"), "run.name": "tiny", **usual, **settings}
        sets = [part for key, value in values.items() for part in ("--set", f"{key}={value}")]
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "headrace", "launch", str(cluster), "--plain", *sets, *arguments],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
            env={**os.environ, "TMPDIR": str(self.scratch), "PYTHONPATH": f"{Path(__file__).parent}:{tmp}"},
        )  # fmt: skip
        self.begun = time.time()
        self.output = self.errors = ""

    # What it writes -----------------------------------------------------------------------------------------

    def events(self, name: str = "") -> list[dict[str, Any]]:
        """Events of this process so far, or those of one kind."""
        events = [e for e in lines(self.run / "events.jsonl") if e["time"] >= self.begun - 0.01]
        return [e for e in events if e["event"] == name] if name else events

    def rows(self, stage: str = "rl") -> list[dict[str, Any]]:
        return [row for row in lines(self.run / "metrics.jsonl") if row["stage"] == stage]

    @property
    def summary(self) -> dict[str, Any]:
        return dict(orjson.loads((self.run / "summary.json").read_bytes()))

    def pid(self, node: str) -> int:
        """The newest process of a node."""
        return int([e["pid"] for e in self.events("node_start") if e["node"] == node][-1])

    # What is done to it -------------------------------------------------------------------------------------

    def wait(self, for_what: str, condition: Callable[[], object], timeout_s: float = WAIT_S) -> None:
        """Returns when the condition holds. Fails if the process ends before, or after `timeout_s`."""
        until = time.monotonic() + timeout_s
        while not condition():
            ended = self.process.poll() is not None
            assert not ended or condition(), f"ended before: {for_what}\n{self.finish()}\n{self.output}\n{self.errors}"
            assert time.monotonic() < until, f"waited {timeout_s:g} s for: {for_what}; events: {self.events()[-5:]}"
            time.sleep(0.01)

    def wait_for_event(self, name: str, **fields: object) -> None:
        wanted = fields.items()
        self.wait(f"{name} {fields}", lambda: any(wanted <= e.items() for e in self.events(name)))

    def wait_for_step(self, step: int, stage: str = "rl") -> None:
        self.wait(f"{stage} step {step}", lambda: any(row["step"] >= step for row in self.rows(stage)))

    def kill(self, *nodes: str) -> None:
        for pid in [self.pid(node) for node in nodes]:
            os.kill(pid, signal.SIGKILL)

    def interrupt(self, number: signal.Signals = signal.SIGINT) -> None:
        """To the launcher alone."""
        self.process.send_signal(number)

    def finish(self, timeout_s: float = WAIT_S) -> int:
        """Waits for its end; returns the exit code, and fills `output` and `errors`."""
        try:
            self.output, self.errors = self.process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.output, self.errors = self.process.communicate()
            raise AssertionError(f"still running after {timeout_s:g} s\n{self.output}\n{self.errors}") from None
        return self.process.returncode

    def left_behind(self) -> list[str]:
        """Processes of its nodes that live, files in its temporary folder, named shared memory."""
        processes = [f"{e['node']} {e['pid']}" for e in self.events("node_start") if lives(e["pid"])]
        files = [*self.scratch.glob("headrace*"), *Path("/dev/shm").glob("*headrace*")]
        return processes + [str(path) for path in files]


@contextmanager
def launch(
    tmp: Path, settings: Mapping[str, object] = MappingProxyType({}), *arguments: str, cluster: Path = CLUSTER
) -> Iterator[Launch]:
    """A launch that does not outlive its test."""
    job = Launch(tmp, settings, *arguments, cluster=cluster)
    try:
        yield job
    finally:
        if job.process.poll() is None:
            job.process.kill()
            job.finish()


def lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file of JSON lines."""
    if not path.exists():
        return []
    whole, _, _ = path.read_bytes().rpartition(b"\n")
    return [orjson.loads(line) for line in whole.splitlines()]


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until_gone(pids: list[int]) -> None:
    """Returns when none of the processes lives; fails after some seconds."""
    until = time.monotonic() + 5
    while alive := [pid for pid in pids if lives(pid)]:
        assert time.monotonic() < until, alive
        time.sleep(0.01)


def check_rows(job: Launch, steps: int) -> None:
    """What must hold of every finished run, whatever was killed."""
    rows = job.rows()
    assert [row["step"] for row in rows] == list(range(1, steps + 1))
    assert [row["version"] for row in rows] == list(range(2, steps + 2))
    for row in rows:
        ends = [row[f"{end}_groups"] for end in ("running", "partial", "accepted", "filtered", "failed")]
        assert row["submitted_groups"] == sum(ends), row
        assert 0 <= row["staleness_max"] <= 4
        assert row["groups"] == 4
        assert row["loss"] is not None and row["trained_tokens"] > 0
    elapsed = [row["elapsed_s"] for row in job.rows("sft") + rows]
    assert elapsed == sorted(elapsed)
