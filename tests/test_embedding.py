"""headrace inside other programs: on a running loop, from a plain script, with classes and algorithms of their own."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import headrace
from headrace import Actor, message
from headrace.actors.algorithms import Objective
from headrace.actors.algorithms.advantages import group_advantages
from headrace.actors.types import Group, Verdict
from headrace.runtime.errors import RemoteError
from headrace.runtime.toml import ConfigError

ROOT = Path(__file__).resolve().parent.parent
SMALL = {"sft.steps": 30, "rl.steps": 4, "evaluation.num_problems": 32, "rl.groups_per_step": 4, "rl.max_running": 10}


@dataclass(kw_only=True)
class Adder(Actor):
    by: int = 1

    async def start(self) -> None:
        if self.by == 13:
            raise ValueError("thirteen brings bad luck")

    @message
    async def add(self, number: int) -> int:
        return number + self.by

    @message
    async def pid(self) -> int:
        return os.getpid()


@dataclass(kw_only=True)
class Lenient(Actor):
    """Every other answer is right."""

    @message
    async def judge(self, group: Group) -> list[Verdict]:
        return [Verdict(correct=t.member % 2 == 0) for t in group.trajectories]


def alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


async def test_four_actors_of_ones_own_come_and_leave_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the loop that pytest-asyncio runs, as a notebook runs one."""
    folder = tempfile.mkdtemp(prefix="hr-")
    monkeypatch.setattr(tempfile, "tempdir", folder)
    config = headrace.Config({"nodes": {"a": {}}}, actors={"one": Adder, "two": Adder(by=2)})
    async with headrace.open_cluster(config) as cluster:
        three = await cluster.spawn(Adder(by=3), name="three", node="a")
        await cluster.spawn(Adder(by=4), name="four", node="b")
        assert await asyncio.gather(*(cluster.find(n).add(10) for n in ("one", "two", "three", "four"))) == [
            11,
            12,
            13,
            14,
        ]
        assert await cluster.resize("three", 2) == ["three", "three_2"]
        pids = [await cluster.find(name).pid() for name in ("three", "three_2", "four")]
        assert len({*pids, os.getpid()}) == 4
        with pytest.raises(LookupError, match="5 actors of class Adder"):
            cluster.find(Adder)
        with pytest.raises(TypeError, match="trains nothing"):
            await cluster.wait()
        events = cluster.events()
        kinds = {(await anext(events))["event"] for _ in range(4)}
        assert {"system_start", "actor_up"} <= kinds
        os.kill(pids[0], signal.SIGKILL)
        async for event in events:
            if event["event"] == "actor_up" and event["actor"] == "three" and event["incarnation"] == 2:
                break
        await events.aclose()
        assert await three.add(1) == 4, "supervised as all are"
    assert not any(map(alive, pids))
    os.rmdir(folder)  # Which is empty.


async def test_what_can_not_be_is_said_before_anything_starts(tmp_path: Path) -> None:
    cluster_toml = ROOT / "cluster.toml"

    def class_in_a_function() -> type[Actor]:
        @dataclass(kw_only=True)
        class Hidden(Actor):
            pass

        return Hidden

    async def no_roles(batch: Any) -> dict[str, float]:
        return {}

    for config, said in (
        (headrace.Config(cluster_toml, {"rl.stepz": 3}), r'rl.stepz.*unknown key; did you mean "steps"'),
        (headrace.Config({"nodez": {}}), "unknown table"),
        (headrace.Config({}, actors={"x": dict}), "dict is no actor"),  # type: ignore[dict-item]
        (headrace.Config({}, actors={"x": class_in_a_function()}), "at the top level of a file"),
        (headrace.Config(cluster_toml, algorithm=no_roles), r"step must be .async def. and take \(batch, \*, policy\)"),
        (headrace.Config(tmp_path / "none.toml"), "none.toml"),
    ):
        with pytest.raises(ConfigError, match=said):
            async with headrace.open_cluster(config):
                pytest.fail("it was opened")


async def test_an_actor_that_does_not_start_ends_it_and_errors_of_the_body_pass(tmp_path: Path) -> None:
    with pytest.raises(RemoteError, match="thirteen brings bad luck"):
        async with headrace.open_cluster(headrace.Config({}, actors={"x": Adder(by=13)})):
            pytest.fail("it was opened")
    with pytest.raises(ZeroDivisionError):
        async with headrace.open_cluster(
            headrace.Config({"run": {"name": "r", "directory": str(tmp_path)}})
        ) as cluster:
            pid = await (await cluster.spawn(Adder(), name="y", node="n")).pid()
            1 / 0  # noqa: B018
    assert not alive(pid)
    assert (tmp_path / "r" / "events.jsonl").exists()


@pytest.mark.slow
async def test_a_job_with_a_verifier_and_an_algorithm_of_ones_own(tmp_path: Path) -> None:
    seen: list[int] = []

    async def mine(batch: Any, *, policy: Any) -> dict[str, float]:
        """A closure: it lives in this process, beside the loop of the test."""
        seen.append(len(batch.groups))
        advantages = [*batch.spread(group_advantages(batch))]
        metrics: dict[str, float] = await policy.update(batch, advantages, Objective(clip_high=0.25))
        return metrics

    config = headrace.Config(
        ROOT / "cluster.toml",
        {**SMALL, "run.name": "own", "run.directory": str(tmp_path)},
        actors={"verifier": Lenient, "adder": Adder(by=5)},
        algorithm=mine,
    )
    async with headrace.open_cluster(config) as cluster:
        assert await cluster.find(Adder).add(1) == 6
        steps, groups = [], []

        async def read() -> None:
            async for group in cluster.samples():
                groups.append(group)

        reading = asyncio.create_task(read())
        async for step in cluster.steps():
            steps.append((step["stage"], step["step"]))
            if step["stage"] == "rl" and step["step"] == 2:
                assert await cluster.resize("rollout", 2) == ["rollout", "rollout_2"]
        reading.cancel()
        summary = await cluster.wait()
        assert cluster.text(groups[0].prompt.tokens).endswith("=")
        pids = list(cluster.system.pids().values())
    assert summary["ok"] and summary["steps"] == 4
    assert [step for step in steps if step[0] == "rl"] == [("rl", n) for n in (1, 2, 3, 4)]
    assert seen == [4] * 4
    assert {t.verdict.correct for g in groups for t in g.trajectories if t.member % 2 == 0} == {True}, (
        "judged by Lenient"
    )
    assert not any(alive(pid) for pid in pids if pid != os.getpid())
    assert (tmp_path / "own" / "summary.json").exists()

    with pytest.raises(ConfigError, match="own"):
        async with headrace.open_cluster(config):
            pytest.fail("a finished run was opened")


@pytest.mark.slow
async def test_a_run_that_is_drained_goes_on_later_and_run_blocks_where_a_loop_runs(tmp_path: Path) -> None:
    config = headrace.Config(
        ROOT / "cluster.toml", {**SMALL, "run.name": "two", "run.directory": str(tmp_path), "rl.steps": 6}
    )
    async with headrace.open_cluster(config) as cluster:
        async for step in cluster.steps():
            if step["stage"] == "rl":
                break
        await cluster.drain()
        done = (await cluster.wait())["steps"]
    assert 1 <= done < 6
    summary = headrace.run(config, resume=True)  # A loop runs in this thread.
    assert summary["ok"] and summary["steps"] == 6


PROGRAM = """
import asyncio, os
from dataclasses import dataclass
import headrace
from headrace import Actor, message

@dataclass(kw_only=True)
class Sleeper(Actor):
    @message
    async def pid(self) -> int:
        return os.getpid()

async def main():
    async with headrace.open_cluster({}) as cluster:
        ref = await cluster.spawn(Sleeper(), name="sleeper", node="elsewhere")
        print(await ref.pid(), flush=True)
        await asyncio.sleep(60)

if __name__ == "__main__":
    asyncio.run(main())
"""


def test_a_script_that_is_interrupted_leaves_nothing(tmp_path: Path) -> None:
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    with subprocess.Popen(
        [sys.executable, "-P", script], stdout=subprocess.PIPE, text=True, stderr=subprocess.PIPE
    ) as p:
        assert p.stdout is not None
        pid = int(p.stdout.readline())
        p.send_signal(signal.SIGINT)
        _, errors = p.communicate(timeout=20)
    assert "KeyboardInterrupt" in errors and "never retrieved" not in errors
    deadline = time.monotonic() + 5
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not alive(pid)


def test_a_failing_job_says_why(tmp_path: Path) -> None:
    async def broken(batch: Any, *, policy: Any) -> dict[str, float]:
        raise ArithmeticError("this algorithm is broken")

    config = headrace.Config(ROOT / "cluster.toml", {"rl.steps": -1}, algorithm=broken)
    with pytest.raises(ConfigError, match=r"rl\.steps"):
        headrace.run(config)
