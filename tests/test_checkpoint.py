"""Checkpoint folders appear whole or not at all, and a trainer that comes back from one is the same to the bit."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from headrace.actors.algorithms import Batch, group_advantages
from headrace.actors.algorithms.dapo import Dapo
from headrace.actors.algorithms.updates import PolicyUpdate
from headrace.actors.data.running_sum import RunningSum
from headrace.actors.model.config import ModelConfig
from headrace.actors.run_state import LATEST, POOL, STATE, RunState, latest_checkpoint, load_state
from headrace.actors.trainer import Trainer, checkpoint
from headrace.actors.trainer.durable import DurableTrainer
from headrace.actors.trainer.settings import RlSettings, SftSettings
from headrace.actors.types import Group, Segment, Trajectory, Verdict
from headrace.runtime import System
from headrace.runtime.codec import dumps
from headrace.runtime.exchange import Receiver
from headrace.runtime.rundir import RunSpec

TASK = RunningSum(max_operands=3)
MODEL = ModelConfig(
    vocab_size=TASK.vocab_size, hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16, num_experts=4,
    moe_intermediate_size=16,
)  # fmt: skip
SFT = SftSettings(steps=5, batch=4, warmup_steps=2, learning_rate=4e-3, muon_learning_rate=0.012)
RL = RlSettings(steps=6, group_size=4, groups_per_step=3, mini_batches=2, warmup_steps=2, learning_rate=1e-3)


def trainer_of(tmp_path: Path, name: str = "run") -> Trainer:
    run = RunSpec(name=name, directory=str(tmp_path), seed=3)
    return Trainer(run=run, model=MODEL, task=TASK, sft=SFT, rl=RL, keep_checkpoints=2)


async def started(tmp_path: Path, name: str = "run") -> Trainer:
    trainer = trainer_of(tmp_path, name)
    (tmp_path / name).mkdir(exist_ok=True)
    await trainer.start()
    return trainer


def batch(step: int) -> list[Group]:
    """Groups as a stream would bring them: half of the answers wrong, some of two versions."""
    random = np.random.default_rng(step)
    groups = []
    for prompt in TASK.prompts(0, np.arange(3 * step, 3 * step + 3)):
        trajectories = []
        for member in range(RL.group_size):
            tokens = TASK.solve(prompt)
            if wrong := member % 2 == 1:
                tokens[-2] = random.integers(3, 13)
            cut = int(random.integers(1, len(tokens)))
            logprobs = -random.random(len(tokens)).astype(np.float32)
            segments = [
                Segment(version=step, tokens=tokens[:cut], logprobs=logprobs[:cut]),
                Segment(version=step + 1, tokens=tokens[cut:], logprobs=logprobs[cut:]),
            ]
            verdict = Verdict(correct=not wrong)
            reward = -1.0 if wrong else 1.0
            trajectories.append(
                Trajectory(member=member, segments=segments, finish="stop", verdict=verdict, reward=reward)
            )
        groups.append(Group(prompt=prompt, trajectories=trajectories))
    return groups


def update(step: int) -> PolicyUpdate:
    whole = Batch(batch(step))
    return PolicyUpdate(
        groups=whole.groups, advantages=[*whole.spread(group_advantages(whole))], objective=Dapo().objective
    )


def state_of(trainer: Trainer) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    return trainer._learner.state()


def assert_same(one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> None:
    assert one.keys() == other.keys()
    for name, array in one.items():
        assert array.dtype == other[name].dtype
        assert array.tobytes() == other[name].tobytes(), name


async def test_a_trainer_that_comes_back_reaches_the_same_bits(tmp_path: Path) -> None:
    """Killed after each of its steps in turn, with the last checkpoint in the warm-up, at its end, and in RL."""
    undisturbed = await started(tmp_path, "undisturbed")
    await undisturbed.warm_up(SFT.steps)
    expected_metrics = [await undisturbed.step(step, update(step)) for step in range(1, 5)]
    expected, info = state_of(undisturbed)
    assert info == {"stage": "rl", "step": 4, "skipped_in_row": 0}

    trainer = await started(tmp_path)
    await trainer.warm_up(2)
    trainer.checkpoint("sft-000002", {}, {})
    await trainer.warm_up(3)
    for sft_steps, rl_steps, name in ((5, 1, "sft-000005"), (5, 3, "rl-000003"), (5, 4, "")):
        trainer = await started(tmp_path)
        await trainer.warm_up(sft_steps)
        if name.startswith("sft"):
            trainer.checkpoint(name, {}, {})
        for step in range(await trainer.position() + 1, rl_steps + 1):
            metrics = await trainer.step(step, update(step))
            same = {key for key in metrics if not key.endswith("_s")}
            assert {k: metrics[k] for k in same} == {k: expected_metrics[step - 1][k] for k in same}
        if name.startswith("rl"):
            trainer.checkpoint(name, {}, {})
            await trainer.step(rl_steps + 1, update(rl_steps + 1))
    assert_same(state_of(trainer)[0], expected)


async def test_rewind_goes_back_to_the_newest_checkpoint_and_is_free_at_it(tmp_path: Path) -> None:
    trainer = await started(tmp_path)
    fresh, _ = state_of(trainer)
    await trainer.warm_up(2)
    trainer.rewind()
    assert_same(state_of(trainer)[0], fresh)
    await trainer.warm_up(SFT.steps)
    await trainer.step(1, update(1))
    trainer.checkpoint("rl-000001", {}, {})
    kept, _ = state_of(trainer)
    learner = trainer._learner
    trainer.rewind()
    assert trainer._learner is learner
    await trainer.step(2, update(2))
    trainer.rewind()
    assert_same(state_of(trainer)[0], kept)
    assert await trainer.position() == 1


async def test_steps_come_in_order_and_once(tmp_path: Path) -> None:
    trainer = await started(tmp_path)
    await trainer.warm_up(SFT.steps)
    with pytest.raises(ValueError, match="RL step 2 can't follow 0; show the trainer the batches in between"):
        await trainer.step(2, update(2))
    await trainer.step(1, update(1))
    with pytest.raises(ValueError, match="RL step 1 can't follow 1"):
        await trainer.step(1, update(1))
    assert await trainer.warm_up(SFT.steps) == {}, "the warm-up is over"


@pytest.mark.slow
async def test_kill_9_in_the_middle_of_a_step_costs_no_bit(tmp_path: Path) -> None:
    """The published weights of a trainer process that was killed are those of one that was not."""
    alone = await started(tmp_path, "alone")
    await alone.warm_up(SFT.steps)
    for step in (1, 2, 3):
        await alone.step(step, update(step))

    (tmp_path / "run").mkdir()
    async with System(tmp_path / "run") as system:
        ref = await system.spawn(trainer_of(tmp_path), name="trainer", node="trainer")
        trainer, receiver = DurableTrainer(ref, RunState()), Receiver()
        await trainer.warm_up(SFT.steps)
        await Dapo().step(Batch(batch(1)), policy=trainer)
        await trainer.checkpoint("rl-000001", {}, {})
        await Dapo().step(Batch(batch(2)), policy=trainer)
        assert trainer.num_kept == 1
        step = asyncio.create_task(Dapo().step(Batch(batch(3)), policy=trainer))
        await asyncio.sleep(0.01)
        os.kill(system.pids()["trainer"], signal.SIGKILL)
        await step
        manifest = await trainer.publish()
        assert dict(system.restarts) == {"trainer": 1}
        assert_same(receiver.receive(manifest), alone._learner.weights())
        receiver.close()


# Folders ------------------------------------------------------------------------------------------------------


def write(checkpoints: Path, name: str, keep: int = 2, **files: bytes) -> Path:
    weights = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}
    arrays = {f"weights/{key}": array for key, array in weights.items()} | {"optimizer/m": np.ones(3, np.float32)}
    return checkpoint.write(checkpoints, name, MODEL, arrays, {"stage": "rl", "step": 1}, files, keep=keep)


@pytest.fixture(scope="module", autouse=True)
def shapes() -> None:
    from headrace.actors.model.qwen3_moe import Qwen3Moe

    SHAPES.update({name: tuple(p.shape) for name, p in Qwen3Moe(MODEL, seed=0).named_parameters()})


SHAPES: dict[str, tuple[int, ...]] = {}


def test_a_checkpoint_reads_back_and_the_newest_are_kept(tmp_path: Path) -> None:
    for step in range(1, 5):
        folder = write(tmp_path, f"rl-{step:06d}", state=b"abc")
        os.utime(folder, (step, step))
    assert sorted(path.name for path in tmp_path.iterdir()) == [LATEST, "rl-000003", "rl-000004"]
    assert (tmp_path / LATEST).read_text() == "rl-000004"
    config, arrays, info = checkpoint.read(folder)
    assert config == MODEL and info == {"stage": "rl", "step": 1}
    assert arrays["optimizer/m"].tolist() == [1, 1, 1]
    assert {name.removeprefix("weights/") for name in arrays if name.startswith("weights/")} == set(SHAPES)
    assert (folder / "state").read_bytes() == b"abc"


def test_a_name_that_is_taken_is_not_replaced(tmp_path: Path) -> None:
    first, second = write(tmp_path, "rl-000001"), write(tmp_path, "rl-000001")
    assert (first.name, second.name) == ("rl-000001", "rl-000001.2")
    assert first.is_dir() and (tmp_path / LATEST).read_text() == "rl-000001.2"


def test_a_full_disk_leaves_the_checkpoint_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "rl-000001")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match=r"rl-000002 can't be written: .*No space left.*the one before it is kept"):
        write(tmp_path, "rl-000002")
    assert sorted(path.name for path in tmp_path.iterdir()) == [LATEST, "rl-000001"]


def test_what_a_death_leaves_half_written_is_ignored_and_cleared_away(tmp_path: Path) -> None:
    run = tmp_path
    write(run / "checkpoints", "rl-000001")
    (run / "checkpoints" / "rl-000002.new").mkdir()
    assert latest_checkpoint(run) == run / "checkpoints" / "rl-000001"
    write(run / "checkpoints", "rl-000003")
    assert not (run / "checkpoints" / "rl-000002.new").exists()


def test_state_and_pool_come_from_the_newest_checkpoint(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) is None
    state, pool = load_state(tmp_path)
    assert (state.stage, state.step, pool) == ("sft", 0, None)
    kept = RunState(stage="rl", sft_steps=5, rl_steps=2, version=3, next_ordinal=9, in_flight={7: batch(1)[0]})
    write(tmp_path / "checkpoints", "rl-000002", **{STATE: dumps(kept), POOL: dumps({"entries": []})})
    state, pool = load_state(tmp_path)
    assert (state.stage, state.step, state.version, state.next_ordinal) == ("rl", 2, 3, 9)
    assert state.in_flight[7].trajectories[1].tokens().tolist() == kept.in_flight[7].trajectories[1].tokens().tolist()
    assert pool == {"entries": []}


def test_damage_is_reported_with_what_to_do(tmp_path: Path) -> None:
    files = {STATE: dumps(RunState()), POOL: dumps({})}
    folder = write(tmp_path / "checkpoints", "rl-000001", **files)
    (folder / STATE).write_bytes(b"\x93")
    with pytest.raises(
        ValueError, match=r"rl-000001 can't be read \(state.msgpack: .*write the name of an older one into"
    ):
        load_state(tmp_path)
    with open(folder / checkpoint.OPTIMIZER, "r+b") as file:
        file.truncate(20)
    with pytest.raises(ValueError, match=r"rl-000001 can't be read: .*; write the name of an older one into .*LATEST"):
        checkpoint.read(folder)
    write(tmp_path / "checkpoints", "rl-000002", **files)
    (tmp_path / "checkpoints" / LATEST).write_text("rl-000009")
    with pytest.raises(
        FileNotFoundError, match=r"names checkpoint 'rl-000009', which is not there; write rl-000002 into it"
    ):
        latest_checkpoint(tmp_path)


async def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    trainer = await started(tmp_path)
    trainer.checkpoint("sft-000000", {}, {})
    other = Trainer(
        run=trainer.run, model=ModelConfig(vocab_size=TASK.vocab_size), task=TASK, sft=SFT, rl=RL, keep_checkpoints=2
    )
    with pytest.raises(ValueError, match="is of another model than the \\[model\\] table"):
        await other.start()
