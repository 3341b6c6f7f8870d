"""A trainer of two ranks, as real processes: one model, the weights of a trainer alone, and nothing lost by a death."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_checkpoint import MODEL, RL, SFT, TASK, assert_same, state_of, update
from tiny_job import check_rows, launch
from worker_actors import LonelyError

from headrace.actors.algorithms import Batch
from headrace.actors.patience import patiently
from headrace.actors.run_state import RunState, latest_checkpoint
from headrace.actors.trainer import Trainer, checkpoint
from headrace.actors.trainer.durable import DurableTrainer
from headrace.runtime import System
from headrace.runtime.errors import RankError
from headrace.runtime.layout import Layout
from headrace.runtime.rundir import RunSpec
from headrace.runtime.worker_group import WorkerGroup

pytestmark = pytest.mark.slow

# The router's balancing loss is one of a micro-batch by its definition, so it depends on how a batch is split.
PLAIN_SFT = dataclasses.replace(SFT, aux_weight=0.0)
PLAIN_RL = dataclasses.replace(RL, aux_weight=0.0, max_skipped=1)


def trainer_of(tmp_path: Path, name: str) -> Trainer:
    run = RunSpec(name=name, directory=str(tmp_path), seed=3)
    (tmp_path / name).mkdir(exist_ok=True)
    return Trainer(run=run, model=MODEL, task=TASK, sft=PLAIN_SFT, rl=PLAIN_RL)


async def gang_of(system: System, trainer: Trainer, ranks: int = 2) -> WorkerGroup:
    return await WorkerGroup.spawn(system, trainer, name="trainer", layout=Layout(dp=ranks))


def written(tmp_path: Path, name: str) -> dict[str, np.ndarray]:
    folder = latest_checkpoint(tmp_path / name)
    assert folder is not None
    return checkpoint.read(folder)[1]


async def test_two_ranks_learn_what_one_learns(tmp_path: Path) -> None:
    alone = trainer_of(tmp_path, "alone")
    await alone.start()
    async with System() as system:
        gang = await gang_of(system, trainer_of(tmp_path, "gang"))
        expected: list[dict[str, float]] = [await alone.warm_up(SFT.steps)]
        metrics: list[dict[str, float]] = [await gang.warm_up(SFT.steps)]
        for step in range(1, 4):
            expected.append(await alone.step(step, update(step)))
            metrics.append(await gang.step(step, update(step)))
        for ours, theirs in zip(metrics, expected, strict=True):
            assert ours.keys() == theirs.keys()
            for key in theirs:
                if not key.endswith("_s"):
                    # The balancing loss has no weight here, and is watched as each micro-batch sees it.
                    tolerance = {"aux_loss": 0.2}.get(key, 2e-4)
                    assert ours[key] == pytest.approx(theirs[key], rel=tolerance, abs=1e-5), key
        assert len(set(await gang.digest())) == 1
        await gang.checkpoint("one", {}, {})
    ours, theirs = written(tmp_path, "gang"), state_of(alone)[0]
    for name, array in theirs.items():
        if name.startswith("weights/"):
            assert np.abs(ours[name] - array).max() <= 1e-5, name


async def test_an_update_that_is_wrong_is_refused_by_all_and_the_gang_goes_on(tmp_path: Path) -> None:
    async with System() as system:
        gang = await gang_of(system, trainer_of(tmp_path, "run"))
        await gang.warm_up(SFT.steps)
        with pytest.raises(Exception, match=r"rank [01] of trainer.*RL step 2 can't follow 0"):
            await gang.step(2, update(2))
        assert await gang.position() == 0
        await gang.step(1, update(1))
        before = await gang.digest()
        # One sample makes the gradient of one rank infinite, and so the sum: both skip, whoever worked on it.
        given = update(2)
        assert given.advantages[0] is not None
        given.advantages[0] = np.full_like(given.advantages[0], 3e38)
        metrics = await gang.step(2, given)
        assert metrics["skipped_updates"] == 1
        assert len(set(await gang.digest())) == len(set(before)) == 1
        with pytest.raises(RankError, match=r"2 updates in a row had no finite gradient"):
            everywhere = [np.full_like(row, 3e38) for row in given.advantages if row is not None]
            await gang.step(3, dataclasses.replace(given, advantages=everywhere))
        assert system.restarts == {}


@pytest.mark.parametrize("victim", [0, 1])
async def test_a_rank_that_is_killed_in_the_middle_of_a_step_leads_to_the_same_bits(
    tmp_path: Path, victim: int
) -> None:
    expected: dict[str, np.ndarray] = {}
    for name, kills in (("undisturbed", False), ("disturbed", True)):
        async with System() as system:
            gang = await gang_of(system, trainer_of(tmp_path, name))
            state = RunState()
            durable = DurableTrainer(gang, state)
            await durable.warm_up(SFT.steps)
            await durable.checkpoint("first", {}, {})
            for step in range(1, 4):
                work = asyncio.create_task(_train(durable, step))
                if kills and step in (1, 3):
                    # Somewhere in the step: it takes some tens of milliseconds.
                    await asyncio.sleep(0.005 * step)
                    os.kill(system.pids()["trainer-" + str(victim)], signal.SIGKILL)
                await work
            digests = await patiently(gang.digest)
            assert len(set(digests)) == 1
            await durable.checkpoint("last", {}, {})
            if kills:
                assert system.restarts["trainer"] >= 1 and system.restarts["trainer/1"] >= 1
        if not kills:
            expected = written(tmp_path, name)
    assert_same(written(tmp_path, "disturbed"), expected)


async def test_a_rank_that_fails_alone_takes_the_others_with_it_and_no_bit_is_lost(tmp_path: Path) -> None:
    fields = {f.name: getattr(trainer_of(tmp_path, "disturbed"), f.name) for f in dataclasses.fields(Trainer)}
    fragile = LonelyError(**fields, flag=str(tmp_path / "failed"))
    finals = []
    for name, trainer in (("undisturbed", trainer_of(tmp_path, "undisturbed")), ("disturbed", fragile)):
        async with System() as system:
            durable = DurableTrainer(await gang_of(system, trainer), RunState())
            await durable.warm_up(SFT.steps)
            for step in range(1, 4):
                await _train(durable, step)
            await durable.checkpoint("last", {}, {})
            finals.append((written(tmp_path, name), dict(system.restarts)))
    (expected, none), (ours, restarts) = finals
    assert none == {} and restarts.keys() == {"trainer", "trainer/1"}
    assert_same(ours, expected)


async def _train(durable: DurableTrainer, step: int) -> Any:
    given = update(step)
    return await durable.update(Batch(given.groups), given.advantages, given.objective)


def test_a_job_with_two_trainer_ranks_survives_the_death_of_one(tmp_path: Path) -> None:
    with launch(tmp_path, {"actors.trainer.ranks": 2, "rl.steps": 12}) as job:
        job.wait_for_step(3)
        job.kill("trainer-1")
        job.wait_for_event("actor_up", actor="trainer/1", incarnation=2)
        assert job.finish(120) == 0, job.errors
        assert job.errors == ""
        assert job.left_behind() == []
        check_rows(job, 12)
    restarts = job.summary["restarts"]
    assert restarts["trainer"] >= 1 and restarts["trainer/1"] >= 1
    assert any(e["batches"] for e in job.events("batches_repeated"))
