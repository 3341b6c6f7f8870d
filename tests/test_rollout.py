"""The rollout actor in a running system: many streams at once, weights swapped and streams left while it decodes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest

from headrace.actors.data.running_sum import RunningSum
from headrace.actors.model.config import ModelConfig
from headrace.actors.model.qwen3_moe import Qwen3Moe
from headrace.actors.rollout import Rollout
from headrace.actors.rollout.answers import finish_answers
from headrace.actors.rollout.engine import Engine
from headrace.actors.rollout.requests import Request
from headrace.actors.trainer.settings import RlSettings
from headrace.actors.types import Group, Trajectory
from headrace.runtime import System
from headrace.runtime.errors import RemoteError
from headrace.runtime.exchange import Publisher
from headrace.runtime.ref import Ref
from headrace.runtime.rundir import RunSpec

MODEL = ModelConfig(
    hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, num_experts=4, moe_intermediate_size=8
)
TASK = RunningSum(max_operands=3)
RL = RlSettings(group_size=3, max_new_tokens=40)
SEED = 7
KEY = 5


def weights(seed: int) -> dict[str, np.ndarray]:
    return {name: p.detach().numpy() for name, p in Qwen3Moe(MODEL, seed=seed).named_parameters()}


def request(ordinal: int, max_new_tokens: int = RL.max_new_tokens) -> Request:
    (prompt,) = TASK.prompts(SEED, np.array([ordinal]))
    members = list(range(RL.group_size))
    return Request(key=KEY, ordinal=ordinal, prompt=prompt.tokens, members=members, max_new_tokens=max_new_tokens)


async def answer(rollout: Ref, asked: Request) -> list[Trajectory]:
    """All responses; Trajectory.append refuses what comes after the last chunk."""
    trajectories = [Trajectory(member=m) for m in asked.members]
    async for chunks in rollout.generate.stream([asked]):
        for chunk in chunks:
            assert chunk.key == KEY  # and not that of `asked`, which was given away
            trajectories[chunk.member].append(chunk)
    assert all(t.finish for t in trajectories)
    return trajectories


@asynccontextmanager
async def worker(run: Path) -> AsyncIterator[tuple[Ref, Publisher]]:
    """A rollout worker with version 1, of fewer slots than the tests ask for."""
    async with System(run) as system:
        actor = Rollout(
            run=RunSpec(name="r", seed=SEED), model=MODEL, task=TASK, rl=RL, num_slots=8, chunk_tokens=4
        )  # fmt: skip
        rollout = await system.spawn(actor, name="rollout")
        publisher = Publisher("policy")
        try:
            assert await rollout.load(publisher.publish(1, weights(1))) == 1
            yield rollout, publisher
        finally:
            publisher.close()


async def until(rollout: Ref, holds: Callable[[dict[str, float]], bool]) -> dict[str, float]:
    """The first stats for which `holds`."""
    async with asyncio.timeout(30):
        while not holds(stats := await rollout.stats()):  # noqa: ASYNC110 (nobody tells)
            await asyncio.sleep(0.001)
    return dict(stats)


def idle(stats: dict[str, float]) -> bool:
    return not stats["live"] and not stats["waiting"]


async def test_streams_get_what_the_engine_alone_would_give_them(tmp_path: Path) -> None:
    engine = Engine(
        MODEL, weights(1), version=1, num_slots=8, max_prompt_tokens=TASK.max_prompt_tokens,
        max_new_tokens=RL.max_new_tokens, eos_id=TASK.eos_id, seed=SEED,
    )  # fmt: skip
    async with worker(tmp_path) as (rollout, _):
        answers = await asyncio.gather(*(answer(rollout, request(ordinal)) for ordinal in range(12)))
        stats = await until(rollout, idle)
    assert stats["tokens"] == sum(t.num_tokens for trajectories in answers for t in trajectories)
    assert stats["version"] == 1
    assert 0 < stats["busy_s"] < 30
    for ordinal, trajectories in enumerate(answers):
        engine.submit(request(ordinal))
        alone = [Trajectory(member=m) for m in range(RL.group_size)]
        while engine.num_live or engine.num_waiting:
            for chunk in engine.step():
                alone[chunk.member].append(chunk)
        for mine, theirs in zip(trajectories, alone, strict=True):
            np.testing.assert_array_equal(mine.tokens(), theirs.tokens())
            np.testing.assert_allclose(mine.logprobs(), theirs.logprobs(), atol=1e-5)
            assert mine.finish == theirs.finish


async def test_weights_are_swapped_while_it_decodes(tmp_path: Path) -> None:
    async with worker(tmp_path) as (rollout, publisher):
        work = asyncio.gather(*(answer(rollout, request(ordinal)) for ordinal in range(40)))
        for version in range(2, 6):
            begun = (await rollout.stats())["tokens"]
            await until(rollout, lambda stats, begun=begun: stats["tokens"] > begun)
            assert await rollout.load(publisher.publish(version, weights(version))) == version
            assert (await rollout.stats())["version"] == version
        answers = await work
        late = await answer(rollout, request(40))
    versions = [t.versions() for trajectories in answers for t in trajectories]
    assert all((np.diff(v) >= 0).all() for v in versions)
    assert {1, 5} <= set(np.concatenate(versions).tolist())
    assert all((t.versions() == 5).all() for t in late)


async def test_a_stream_that_is_left_stops_and_the_others_go_on(tmp_path: Path) -> None:
    async with worker(tmp_path) as (rollout, _):
        others = asyncio.gather(*(answer(rollout, request(ordinal)) for ordinal in range(4)))
        stream = rollout.generate.stream([request(100 + i) for i in range(30)])
        async for _chunks in stream:
            break
        await stream.aclose()
        assert len(await others) == 4
        stats = await until(rollout, idle)
        assert stats["tokens"] < 34 * RL.group_size * RL.max_new_tokens
        await asyncio.sleep(0.05)
        busy_s = (await rollout.stats())["busy_s"]
        await asyncio.sleep(0.05)
        assert (await rollout.stats())["busy_s"] == busy_s, "time without work counts as busy"
        assert len(await answer(rollout, request(200))) == RL.group_size


async def test_a_request_that_cannot_be_generated_is_refused(tmp_path: Path) -> None:
    async with worker(tmp_path) as (rollout, _):
        with pytest.raises(RemoteError, match=r"max_new_tokens must be 1\.\.40"):
            await answer(rollout, request(0, max_new_tokens=41))
        assert len(await answer(rollout, request(0))) == RL.group_size


async def test_sampling_is_that_of_the_settings_and_a_text_ends_an_answer(tmp_path: Path) -> None:
    """Through the messages that a job sends: [rl] top_k and stop_strings are fields of its requests."""
    async with worker(tmp_path) as (rollout, _):
        groups = [group(ordinal) for ordinal in range(6)]
        await finish_answers(rollout, groups, **RlSettings(max_new_tokens=40, top_k=1).sampling())
        for one in groups:
            tokens = {tuple(t.tokens().tolist()) for t in one.trajectories}
            assert len(tokens) == 1, "the likeliest token alone may be drawn, by every member"
            assert all((t.logprobs() == 0).all() for t in one.trajectories), "of what is left"
        text = TASK.decode(groups[0].trajectories[0].tokens())
        assert len(text) > 4
        stopped = [group(0)]
        await finish_answers(
            rollout, stopped, **RlSettings(max_new_tokens=40, top_k=1, stop_strings=(text[2:4],)).sampling()
        )
        for t in stopped[0].trajectories:
            assert text.startswith(TASK.decode(t.tokens()))
            assert text[2:4] in TASK.decode(t.tokens()) and text[2:4] not in TASK.decode(t.tokens()[:-1])
        assert [t.finish for t in stopped[0].trajectories] == ["stop"] * 3


def group(ordinal: int) -> Group:
    (prompt,) = TASK.prompts(SEED, np.array([ordinal]))
    return Group(prompt=prompt, trajectories=[Trajectory(member=m) for m in range(RL.group_size)])
