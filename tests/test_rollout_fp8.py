"""A rollout worker with an FP8 policy in a running system: what it samples from, and that it falls back."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import orjson

from headrace.actors.data.running_sum import RunningSum
from headrace.actors.model.config import ModelConfig
from headrace.actors.model.qwen3_moe import Qwen3Moe
from headrace.actors.rollout import Rollout
from headrace.actors.rollout.precision import Kind, Precision, Schedule
from headrace.actors.rollout.requests import Request
from headrace.actors.rollout.scheduled import ScheduledRunner
from headrace.actors.trainer.settings import RlSettings
from headrace.actors.types import Trajectory
from headrace.runtime import System
from headrace.runtime.exchange import Publisher
from headrace.runtime.ref import Ref
from headrace.runtime.rundir import RunSpec

MODEL = ModelConfig(
    hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16, num_experts=4, moe_intermediate_size=16,
    initializer_range=0.2,
)  # fmt: skip
TASK = RunningSum(max_operands=3)
RL = RlSettings(group_size=3, max_new_tokens=40)
SEED = 7


def weights(seed: int) -> dict[str, np.ndarray]:
    return {name: p.detach().numpy() for name, p in Qwen3Moe(MODEL, seed=seed).named_parameters()}


async def answer(rollout: Ref, ordinal: int) -> tuple[np.ndarray, list[Trajectory]]:
    """The prompt, and all responses to it."""
    (prompt,) = TASK.prompts(SEED, np.array([ordinal]))
    members = list(range(RL.group_size))
    asked = Request(
        key=ordinal, ordinal=ordinal, prompt=prompt.tokens, members=members, max_new_tokens=RL.max_new_tokens
    )
    trajectories = [Trajectory(member=m) for m in members]
    async for chunks in rollout.generate.stream([asked]):
        for chunk in chunks:
            trajectories[chunk.member].append(chunk)
    return prompt.tokens, trajectories


def worker(precision: Precision) -> Rollout:
    return Rollout(
        run=RunSpec(name="r", seed=SEED), model=MODEL, task=TASK, rl=RL, num_slots=8, chunk_tokens=4,
        precision=precision, routes=True,
    )  # fmt: skip


def distance(reader: ScheduledRunner, kind: Kind, prompt: np.ndarray, responses: list[Trajectory]) -> float:
    """Largest difference of their log-probabilities from what weights of that kind say."""
    worst = 0.0
    for t in responses:
        logprobs = reader.read([np.concatenate([prompt, t.tokens()])], kind).log_softmax(-1).numpy()
        said = logprobs[np.arange(len(prompt) - 1, len(logprobs) - 1), t.tokens()]
        worst = max(worst, float(np.abs(said - t.logprobs()).max()))
    return worst


def precisions(responses: list[Trajectory]) -> set[str]:
    """As their origins say."""
    return {segment.origin.precision for t in responses for segment in t.segments if segment.origin}


async def test_it_samples_from_fp8_until_that_is_too_far_from_full_precision(tmp_path: Path) -> None:
    near = Precision(prefill="fp8", decode="fp8", activations="fp8", kl_bound=10.0, sample=2)
    strict = Precision(prefill="fp8", decode="fp8", kl_bound=1e-9, sample=2)
    reader = ScheduledRunner(MODEL, Schedule(near), num_pages=1, page_tokens=16)
    reader.load(reader.prepare(weights(1)))
    publisher = Publisher("policy")
    try:
        async with System(tmp_path) as system:
            manifest = publisher.publish(1, weights(1))
            fp8, falling = [
                await system.spawn(worker(precision), name=name) for name, precision in (("a", near), ("b", strict))
            ]
            await asyncio.gather(fp8.load(manifest), falling.load(manifest))
            for ordinal in range(2):
                prompt, responses = await answer(fp8, ordinal)
                assert distance(reader, "fp8", prompt, responses) < 1e-4
                assert distance(reader, "full", prompt, responses) > 1e-3
                assert precisions(responses) == {"prefill fp8, decode fp8, score full, activations fp8"}
                rows = [sum(len(s.routes) for s in t.segments if s.routes is not None) for t in responses]
                assert rows == [len(prompt) + t.num_tokens - 1 for t in responses], "routes come with FP8, too"
            stats = await fp8.stats()
            assert stats["precision_bits/decode"] == 8 and stats["precision_bits/score"] == 32
            assert 0 < stats["fp8_token_kl_nats"] < 10

            await answer(falling, 0)
            prompt, responses = await answer(falling, 1)
            assert distance(reader, "full", prompt, responses) < 1e-4
            assert precisions(responses) == {"full"}
            stats = await falling.stats()
            assert stats["precision_bits/decode"] == 32 and stats["fp8_token_kl_nats"] > 1e-9
    finally:
        publisher.close()
    events = [orjson.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    (told,) = [event for event in events if event["event"] == "precision"]
    assert told["actor"] == "b" and told["now"] == "full" and told["version"] == 1 and told["token_kl"] > told["bound"]
