"""TextVerifier as an actor: its settings, groups and cases, in a node of its own, with a judge that crashes."""

import asyncio
import os
import re
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
from sample_actors import until

from headrace.actors.algorithms.groups import has_signal
from headrace.actors.data.running_sum import RunningSum, encode
from headrace.actors.job import load_job
from headrace.actors.reward import Reward
from headrace.actors.trainer.settings import RlSettings
from headrace.actors.types import Group, Segment, Trajectory, Verdict
from headrace.actors.verifier import Case, RuleVerifier, TextVerifier
from headrace.actors.verifier.court import Care
from headrace.actors.verifier.workers import Limits
from headrace.runtime import System
from headrace.runtime.cluster import load_cluster
from headrace.runtime.errors import ActorDied
from headrace.runtime.toml import ConfigError, parse

CLUSTER = Path(__file__).parents[1] / "cluster.toml"

CLASS = "headrace.actors.verifier:TextVerifier"


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    """verifier_functions.py is found here and in the processes that are started."""
    monkeypatch.syspath_prepend(Path(__file__).parent)


def groups(count: int) -> list[Group]:
    """Groups of a right answer, a wrong one, one that ran out of tokens and one that has not ended."""
    task = RunningSum()
    made = []
    for prompt in task.prompts(0, np.arange(count), np.full(count, 3)):
        right = task.solve(prompt)
        wrong = right.copy()
        wrong[-2] = next(digit for digit in encode("12") if digit != right[-2])
        answers = [(right, "stop"), (wrong, "stop"), (right[:-1], "length"), (right[:-1], "")]
        none = np.zeros(0, np.float32)
        trajectories = [
            Trajectory(member=m, segments=[Segment(version=1, tokens=tokens, logprobs=none)], finish=finish)
            for m, (tokens, finish) in enumerate(answers)
        ]
        made.append(Group(prompt=prompt, trajectories=trajectories))
    return made


# Settings


def message(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_cluster(parse(f'[run]\nname = "x"\n[actors.verifier]\nclass = "{CLASS}"\n{text}', "c.toml"), {})
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "must be set, or function"),
        ('rule = "math"\nfunction = "verifier_functions:judge"', "must be set, or function"),
        ('rule = "maths"', "there is no rule 'maths'; did you mean \"math\"?"),
        ('rule = "math"\npolicy = {decimal = 2}', "unknown key 'decimal'; did you mean \"decimals\"?"),
        ('rule = "math"\npolicies = {gsm8k = {units = "some"}}', "gsm8k: units must be 'ignore' or 'compare'"),
        ('rule = "math"\noptions = {a = 1}', "need a class"),
        ('rule = "math"\nlimits = {cpu_s = 0}', "cpu_s: must be greater than 0, got 0"),
        ('function = "judge"', 'must be "module:name"'),
        ('function = "verifier_functionz:judge"', "there is no module verifier_functionz"),
        ('function = "verifier_functions:juge"', 'has no juge; did you mean "judge"?'),
        ('function = "verifier_functions:NUMBER"', "is a int, must be a function or a class"),
        ('function = "verifier_functions:later"', "is async"),
        ('function = "verifier_functions:judge"\noptions = {a = 1}', "a function has none"),
        ('function = "verifier_functions:Closeness"\noptions = {a = 1}', "don't fit Closeness()"),
        ('function = "verifier_functions:judge"\npolicy = {decimals = 2}', "needs a rule"),
    ],
)
def test_each_mistake_gets_one_message(text, expected):
    found = message(text)
    assert expected in found and found.startswith("c.toml:")
    assert "\n" not in found


def test_a_broken_module_gets_one_message(tmp_path, monkeypatch):
    (tmp_path / "broken_judge.py").write_text("import no_such_package\n")
    (tmp_path / "failing_judge.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert "needs 'no_such_package', which is not installed" in message('function = "broken_judge:judge"')
    assert "can't be imported: ZeroDivisionError" in message('function = "failing_judge:judge"')


def test_a_job_takes_it_and_its_resolved_settings_load_again(tmp_path):
    sets = ["class=" + CLASS, "function=verifier_functions:Closeness", "options={scale=2.0}", "care={attempts=2}"]
    job = load_job(CLUSTER, [f"run.directory={tmp_path}", *(f"actors.verifier.{text}" for text in sets)])
    (tmp_path / "again.toml").write_text(job.to_toml())
    assert load_job(tmp_path / "again.toml").cluster.actors["verifier"] == job.cluster.actors["verifier"]


# Verdicts


async def test_a_rule_of_the_users_own_agrees_with_the_rule_of_the_default_job():
    verifier = TextVerifier(function="verifier_functions:judge")
    await verifier.start()
    try:
        for group in groups(3):
            expected = await RuleVerifier().judge(group)
            verdicts = await verifier.judge(group)
            assert [v.correct for v in verdicts] == [v.correct for v in expected] == [True, False, False, False]
            assert [bool(v.error) for v in verdicts] == [bool(v.error) for v in expected] == [False, False, False, True]
            assert verdicts[3].error.startswith(f"prompt {group.prompt.ordinal} of running_sum: ")
        stats = await verifier.stats()
        assert stats["correct"] >= 1 and stats["latency_p50_s"] > 0
        assert stats["errors"] == stats["errors/unfinished"] == stats["out_of_tokens"] == 3
    finally:
        await verifier.stop(None)


def readme(title: str) -> list[str]:
    """The blocks of a section."""
    section = (CLUSTER.parent / "README.md").read_text().split(f"## {title}\n")[1].split("\n## ")[0]
    return re.findall(r"^```\w+\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)


@asynccontextmanager
async def as_written(settings: str) -> AsyncIterator[TextVerifier]:
    """The verifier of a block of settings."""
    cluster, _ = load_cluster(parse(f'[run]\nname = "x"\n{settings}', "README.md"), {})
    verifier = cluster.actors["verifier"].instance
    assert isinstance(verifier, TextVerifier)
    await verifier.start()
    try:
        yield verifier
    finally:
        await verifier.stop(None)


async def test_the_readmes_verifiers_of_ones_own(tmp_path, monkeypatch):
    program, by_function, by_class = readme("A verifier of your own")
    (tmp_path / "my_judge.py").write_text(program)
    monkeypatch.syspath_prepend(tmp_path)
    [group] = groups(1)
    total = int(group.prompt.answer)
    async with as_written(by_function) as verifier:
        assert [v.correct for v in await verifier.judge(group)][:2] == [True, False]
    async with as_written(by_class) as verifier:
        near = Case(reference=group.prompt.answer, response=f"#{total + 10}")
        [verdict] = await verifier.judge_cases([near])
        assert (await verifier.judge(group))[0].reward == 1.0 and verdict.reward == 0.5


async def test_the_readmes_policies():
    [settings] = readme("Verifiers")
    cases = [
        Case(reference=reference, response=f"Answer: {response}", dataset=dataset)
        for dataset, reference, response in (
            ("gsm8k", "50", "50 %"), ("physics", "5 \\text{ cm}", "5 m"), ("other", "5 \\text{ cm}", "5 m"),
            ("physics", "1/3", "0.33"), ("other", "1/3", "0.33"),
        )
    ]  # fmt: skip
    async with as_written(settings) as verifier:
        assert [v.correct for v in await verifier.judge_cases(cases)] == [True, False, True, True, False]


async def test_a_graded_verdict_is_the_reward_and_makes_a_signal():
    [group] = groups(1)
    for trajectory, number in zip(group.trajectories, (0.25, 0.25, 0.25, 1.0), strict=True):
        trajectory.verdict = Verdict(correct=True, reward=number)
    reward = Reward(rl=RlSettings(max_new_tokens=96), overlong_cache=8)
    assert await reward.score(group) == pytest.approx([0.25, 0.25, 0.25, 1.0])
    assert has_signal(group)
    group.trajectories.pop()
    assert not has_signal(group)


async def test_in_a_node_crashes_and_hangs_cost_nobody_else_anything(tmp_path):
    verifier = TextVerifier(
        function="verifier_functions:misbehave", limits=Limits(wall_s=1.5), care=Care(attempts=2, cache_size=0)
    )
    async with System(tmp_path / "run") as system:
        ref = await system.spawn(verifier, name="verifier", node="verifier")
        texts = ["fine", "exit", "hang", "segfault", "raise", "print", "pid"]
        verdicts = await ref.judge_cases([Case(reference="r", response=text, row=text) for text in texts])
        assert [v.kind for v in verdicts] == ["", "worker died", "timeout", "worker died", "raised", "", ""]
        assert all(v.error.startswith(f"{t}: ") for t, v in zip(texts, verdicts, strict=True) if v.error)
        stats = await ref.stats()
        assert stats["errors"] == 4 and stats["retries"] >= 1 and stats["errors/timeout"] == 1
        worker = int(verdicts[-1].reward)
        node = system.pids()["verifier"]
        os.kill(node, signal.SIGKILL)
        await until(lambda: not Path(f"/proc/{worker}").exists())

        async def judged_again() -> bool:
            try:
                [verdict] = await ref.judge_cases([Case(reference="r", response="fine")])
            except ActorDied:
                return False
            return bool(verdict.correct)

        await until(judged_again)
        assert system.pids()["verifier"] != node
        busy = asyncio.create_task(ref.judge_cases([Case(reference="r", response="hang")]))
        await asyncio.sleep(0.2)
    with pytest.raises((ActorDied, asyncio.CancelledError)):
        await busy
