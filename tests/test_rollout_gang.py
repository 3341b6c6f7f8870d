"""A rollout worker of several processes: the greedy answers of one, weights swapped, and none lost by a killed rank."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from tiny_job import check_rows, launch

from headrace.actors.data.running_sum import RunningSum
from headrace.actors.model.config import ModelConfig
from headrace.actors.model.qwen3_moe import Qwen3Moe
from headrace.actors.patience import patiently
from headrace.actors.rollout import Rollout
from headrace.actors.rollout.answers import finish_answers
from headrace.actors.rollout.engine import Engine
from headrace.actors.rollout.requests import Request
from headrace.actors.trainer.settings import RlSettings
from headrace.actors.types import Group, Trajectory
from headrace.runtime import Ref, System
from headrace.runtime.errors import RemoteError
from headrace.runtime.exchange import Publisher
from headrace.runtime.layout import Layout
from headrace.runtime.rundir import RunSpec
from headrace.runtime.worker_group import WorkerGroup

pytestmark = pytest.mark.slow

MODEL = ModelConfig(
    hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, num_experts=8, moe_intermediate_size=16,
    initializer_range=0.2,
)  # fmt: skip
TASK = RunningSum(max_operands=3)
RL = RlSettings(group_size=2, max_new_tokens=60)
NUM_GROUPS = 5


@cache
def weights(seed: int) -> dict[str, np.ndarray]:
    return {name: p.detach().numpy() for name, p in Qwen3Moe(MODEL, seed=seed).named_parameters()}


def groups() -> list[Group]:
    prompts = TASK.prompts(7, np.arange(NUM_GROUPS))
    return [Group(prompt=p, trajectories=[Trajectory(member=m) for m in range(RL.group_size)]) for p in prompts]


@cache
def expected(seed: int) -> list[Group]:
    """What an engine of one rank answers."""
    engine = Engine(
        MODEL, weights(seed), version=1, num_slots=8, max_prompt_tokens=TASK.max_prompt_tokens,
        max_new_tokens=RL.max_new_tokens, eos_id=TASK.eos_id, seed=7, routes=True,
    )  # fmt: skip
    asked = groups()
    for key, group in enumerate(asked):
        members = list(range(RL.group_size))
        engine.submit(
            Request(
                key=key, ordinal=group.prompt.ordinal, prompt=group.prompt.tokens, members=members,
                max_new_tokens=RL.max_new_tokens, temperature=0.0,
            )
        )  # fmt: skip
    while engine.num_live or engine.num_waiting:
        for chunk in engine.step():
            asked[chunk.key].trajectories[chunk.member].append(chunk)
    return asked


async def write(rollout: Ref, asked: list[Group]) -> list[Group]:
    await finish_answers(rollout, asked, max_new_tokens=RL.max_new_tokens, temperature=0.0)
    return asked


def assert_same(given: list[Group], wanted: list[Group]) -> None:
    for ours, theirs in zip(given, wanted, strict=True):
        for mine, other in zip(ours.trajectories, theirs.trajectories, strict=True):
            np.testing.assert_array_equal(mine.tokens(), other.tokens())
            np.testing.assert_allclose(mine.logprobs(), other.logprobs(), atol=1e-4)


def assert_same_routes(given: list[Group], wanted: list[Group]) -> None:
    for ours, theirs in zip(given, wanted, strict=True):
        for mine, other in zip(ours.trajectories, theirs.trajectories, strict=True):
            routes = mine.routes(len(ours.prompt.tokens))
            assert routes is not None
            np.testing.assert_array_equal(routes, other.routes(len(ours.prompt.tokens)))


@asynccontextmanager
async def ranks(tmp_path: Path, **sizes: int) -> AsyncIterator[tuple[System, Ref, Publisher]]:
    run = RunSpec(name="r", directory=str(tmp_path), seed=7)
    (tmp_path / "r").mkdir()
    worker = Rollout(run=run, model=MODEL, task=TASK, rl=RL, num_slots=8, chunk_tokens=4)
    worker = replace(worker, **sizes)  # type: ignore[arg-type]
    publisher = Publisher("policy")
    try:
        async with System(tmp_path / "r") as system:
            await WorkerGroup.spawn(system, worker, name="rollout", layout=Layout(dp=worker.mesh.size))
            yield system, system.find("rollout"), publisher
    finally:
        publisher.close()


async def test_ranks_answer_as_one_and_take_new_weights(tmp_path: Path) -> None:
    async with ranks(tmp_path, sp=2, routes=True) as (system, rollout, publisher):
        await rollout.load(publisher.publish(1, weights(1)))
        answers = await write(rollout, groups())
        assert_same(answers, expected(1))
        assert_same_routes(answers, expected(1))
        other = {name: array for name, array in weights(2).items() if "norm" not in name}
        with pytest.raises(RemoteError, match=r"weights are of another model"):
            await rollout.load(publisher.publish(2, other))
        assert (await rollout.stats())["version"] == 1
        assert await rollout.load(publisher.publish(3, weights(2))) == 3
        assert_same(await write(rollout, groups()), expected(2))
        with pytest.raises(RemoteError, match=r"rollout/1 is a rank of rollout and follows it; ask rollout"):
            await write(system.find("rollout/1"), groups())
        assert system.restarts == {}


async def test_a_rank_that_is_killed_takes_the_others_with_it_and_answers_go_on(tmp_path: Path) -> None:
    async with ranks(tmp_path, tp=2, ep=2, spare_experts=1) as (system, rollout, publisher):
        manifest = publisher.publish(1, weights(1))
        await rollout.load(manifest)
        for deaths, victim in enumerate((3, 0), start=1):
            asked = groups()
            writing = asyncio.create_task(write(rollout, asked))
            while sum(group.num_tokens for group in asked) < 40:  # noqa: ASYNC110 (nobody tells)
                await asyncio.sleep(0.002)
            os.kill(system.pids()[f"rollout-{victim}"], signal.SIGKILL)
            await patiently(lambda: rollout.load(manifest))  # As the rollout pool does when it comes back.
            assert_same(await writing, expected(1))
            names = ["rollout", "rollout/1", "rollout/2", "rollout/3"]
            assert all(system.restarts.get(name, 0) >= deaths for name in names)


def test_a_job_whose_rollout_worker_has_two_ranks_survives_the_death_of_one(tmp_path: Path) -> None:
    settings = {"actors.rollout.ranks": 2, "actors.rollout.ep": 2, "actors.rollout.spare_experts": 1, "rl.steps": 8}
    with launch(tmp_path, settings) as job:
        job.wait_for_step(2)
        job.kill("rollout-1")
        job.wait_for_event("actor_up", actor="rollout/1", incarnation=2)
        assert job.finish(120) == 0, job.errors
        assert job.left_behind() == []
        check_rows(job, 8)
    restarts = job.summary["restarts"]
    assert restarts["rollout"] >= 1 and restarts["rollout/1"] >= 1
    assert any(event["groups"] for event in job.events("answers_continued"))
