"""The critic's process: killed at any moment it comes back the same to the bit; and a whole VAPO job around it."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from algorithm_batches import groups
from tiny_job import CLUSTER, NODES, Launch, check_rows, launch, lines

from headrace.actors.algorithms import Batch, returns_to_go
from headrace.actors.algorithms.updates import ValueUpdate
from headrace.actors.algorithms.vapo import Vapo
from headrace.actors.model.config import ModelConfig
from headrace.actors.run_state import RunState, latest_checkpoint
from headrace.actors.trainer import Critic, checkpoint
from headrace.actors.trainer.durable import DurableCritic
from headrace.actors.trainer.settings import CriticSettings
from headrace.runtime import System
from headrace.runtime.rundir import RunSpec

VAPO = CLUSTER.parent / "bin" / "clusters" / "vapo.toml"

TINY = {
    "algorithm.value_pretraining": 6, "algorithm.adaptive_alpha": 1.0, "critic.mini_batches": 2, "rl.steps": 16,
}  # fmt: skip

MODEL = ModelConfig(
    vocab_size=11, hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, num_experts=2,
    moe_intermediate_size=8, max_positions=64,
)  # fmt: skip


def critic_of(folder: Path) -> Critic:
    settings = CriticSettings(learning_rate=1e-2, warmup_steps=2, mini_batches=2)
    return Critic(run=RunSpec(name="run", directory=str(folder), seed=3), model=MODEL, critic=settings)


def batch(step: int) -> Batch:
    return Batch(groups(4, seed=step))


def keep(run: Path, name: str, parts: dict[str, str]) -> None:
    """The trainer's share of a checkpoint: any weights will do."""
    from headrace.actors.model.qwen3_moe import Qwen3Moe

    weights = {f"weights/{name}": p.detach().numpy() for name, p in Qwen3Moe(MODEL, seed=1).named_parameters()}
    optimizer = {"optimizer/m": np.zeros(1, np.float32)}
    checkpoint.write(run / "checkpoints", name, MODEL, weights | optimizer, {}, {}, parts, keep=2)


async def test_kill_9_in_the_middle_of_an_update_costs_no_bit(tmp_path: Path) -> None:
    """A critic that was killed says what one that was not says, to the bit; its past is shown again once."""
    run = tmp_path / "run"
    run.mkdir()
    keep(run, "sft-000005", {})
    async with System(tmp_path / "alone-run") as system:
        alone = DurableCritic(await system.spawn(critic_of(tmp_path), name="critic", node="critic"), RunState())
        for step in (1, 2, 3):
            await Vapo().pretrain(batch(step), critic=alone)
        expected = await alone.values(batch(9))

    async with System(tmp_path / "killed-run") as system:
        state = RunState()
        critic = DurableCritic(await system.spawn(critic_of(tmp_path), name="critic", node="critic"), state)
        await Vapo().pretrain(batch(1), critic=critic)
        parts = await critic.checkpoint("value-000001")
        assert parts == {"critic": "value-000001-critic.new"}
        keep(run, "value-000001", parts)
        critic.forget()
        await Vapo().pretrain(batch(2), critic=critic)
        assert critic.num_kept == 1
        update = asyncio.create_task(Vapo().pretrain(batch(3), critic=critic))
        await asyncio.sleep(0.01)
        os.kill(system.pids()["critic"], signal.SIGKILL)
        await update
        async with asyncio.timeout(60):  # On a fast machine the update was done as the kill came.
            while not system.restarts:  # noqa: ASYNC110 (nothing else tells)
                await asyncio.sleep(0.01)
        assert dict(system.restarts) == {"critic": 1} and state.critic_updates == 3
        said = await critic.values(batch(9))
        await critic.rewind()
        assert [row.tobytes() for row in said] == [row.tobytes() for row in expected]
        assert [row.tobytes() for row in await critic.values(batch(9))] == [row.tobytes() for row in expected]
    folder = latest_checkpoint(run)
    assert folder is not None and sorted(p.name for p in (folder / "critic").iterdir()) == [
        "state.safetensors", "trainer.json",
    ]  # fmt: skip
    assert not list((run / "checkpoints").glob("*.new"))


async def test_updates_come_in_order_and_a_critic_begins_as_the_checkpoints_policy(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    critic = critic_of(tmp_path)
    await critic.start()
    random = critic._learner._updater.weights()["model.embed_tokens.weight"].copy()
    keep(run, "sft-000005", {})
    critic.rewind()
    policy = checkpoint.read_policy(run / "checkpoints" / "sft-000005")[1]["model.embed_tokens.weight"]
    begun = critic._learner._updater.weights()["model.embed_tokens.weight"]
    assert np.array_equal(begun, policy) and not np.array_equal(begun, random)
    update = ValueUpdate(groups=batch(1).groups, returns=returns_to_go(batch(1).token_rewards()))
    with pytest.raises(ValueError, match="update 2 can't follow 0; show the critic those in between"):
        await critic.update(2, update)
    await critic.update(1, update)
    assert await critic.position() == 1
    critic.rewind()
    assert await critic.position() == 0


def test_a_damaged_part_is_reported_with_what_to_do(tmp_path: Path) -> None:
    part = tmp_path / "checkpoints" / "rl-000003" / "critic"
    part.mkdir(parents=True)
    (part / "state.safetensors").write_bytes(b"short")
    with pytest.raises(ValueError, match=r"part .*critic can't be read: .*write the name of an older checkpoint into"):
        checkpoint.read_part(part)


# The job ------------------------------------------------------------------------------------------------------


def check_critic(job: Launch, value_steps: int, steps: int) -> None:
    check_rows(job, steps)
    value = job.rows("value")
    assert [row["step"] for row in value] == list(range(1, value_steps + 1))
    assert {row["version"] for row in value} <= {1}, "the policy is fixed"
    for row in value + job.rows():
        assert row["value_loss"] >= 0 and row["explained_variance"] <= 1
    assert job.rows()[-1]["filtered_groups"] == 0, "VAPO keeps every group"


@pytest.mark.slow
def test_the_critic_may_be_killed_in_its_pretraining_and_in_rl(tmp_path: Path) -> None:
    settings = TINY | {"rl.steps": 30}
    with launch(tmp_path, settings, cluster=VAPO) as job:
        job.wait_for_step(2, "value")
        job.kill("critic")
        job.wait_for_event("actor_up", actor="critic", incarnation=2)
        job.wait_for_step(3)
        job.kill("critic", "trainer")
        job.wait_for_event("actor_up", actor="critic", incarnation=3)
        job.wait_for_step(len(job.rows()) + 3)
        job.kill("critic", *NODES)
        assert job.finish() == 0, job.errors
    assert job.errors == "" and job.left_behind() == [] and job.events("actor_exit") == []
    check_critic(job, 6, 30)
    assert job.summary["restarts"] == {"critic": 3, "trainer": 2, "rollout": 1, "verifier": 1, "reward": 1}
    assert sorted(path.name for path in (job.run / "checkpoints").iterdir() if path.suffix == ".new") == []


@pytest.mark.slow
def test_ppo_needs_no_groups_and_grpo_no_critic(tmp_path: Path) -> None:
    """The special cases, as jobs: PPO on single responses, GRPO on the default cluster."""
    before, _, after = VAPO.read_text().partition("\n[algorithm]\n")
    cluster = tmp_path / "ppo.toml"
    cluster.write_text(f"{before}\n[critic]\n{after.partition('[critic]')[2]}")
    single = {"rl.algorithm": "ppo", "rl.group_size": 1, "rl.min_group_size": 1, "rl.steps": 4}
    with launch(tmp_path, single, cluster=cluster) as job:
        assert job.finish() == 0, job.errors
    check_critic(job, 0, 4)
    assert {row["responses"] for row in job.rows()} == {4}
    with launch(tmp_path, {"rl.algorithm": "grpo", "run.name": "tiny2"}) as job:
        job.run = tmp_path / "runs" / "tiny2"
        assert job.finish() == 0, job.errors
    check_rows(job, 6)
    assert job.rows()[-1]["filtered_groups"] == 0


@pytest.mark.slow
def test_a_run_that_is_killed_whole_resumes_its_value_pretraining(tmp_path: Path) -> None:
    settings = TINY | {"algorithm.value_pretraining": 20, "rl.checkpoint_every": 4}
    with launch(tmp_path, settings, cluster=VAPO) as job:
        job.wait_for_event("checkpoint", folder="value-000008")
        os.kill(job.process.pid, signal.SIGKILL)
        job.finish()
    before = job.rows("value")
    with launch(tmp_path, settings, "--resume", cluster=VAPO) as job:
        kept = int(job.run.joinpath("checkpoints", "LATEST").read_text().partition("-")[2])
        job.wait_for_event("resumed", stage="value", step=kept)
        assert job.finish() == 0, job.errors
    check_critic(job, 20, 16)
    assert job.rows("value")[:kept] == before[:kept]
    assert set(job.summary["stages"]) == {"sft", "value", "rl"}
    assert lines(job.run / "metrics.jsonl")[-1]["stage"] == "rl"
