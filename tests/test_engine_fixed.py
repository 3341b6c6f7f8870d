"""With fixed shapes a response has the same bits whatever it is batched with, and after any interruption."""

import numpy as np
import pytest

from headrace.actors.model.config import ModelConfig
from headrace.actors.model.qwen3_moe import Qwen3Moe
from headrace.actors.rollout.engine import Engine
from headrace.actors.rollout.requests import Request
from headrace.actors.types import Trajectory

CONFIG = ModelConfig(
    vocab_size=40, hidden_size=48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, num_experts=6,
    moe_intermediate_size=24, max_positions=64, initializer_range=0.2,
)  # fmt: skip
WEIGHTS = {name: p.detach().numpy() for name, p in Qwen3Moe(CONFIG, seed=3).named_parameters()}


def engine(num_slots, **changes):
    settings = {"max_prompt_tokens": 20, "max_new_tokens": 40, "eos_id": 0, "seed": 5, "version": 0, "chunk_tokens": 6}
    return Engine(CONFIG, WEIGHTS, num_slots=num_slots, fixed_shapes=True, **settings | changes)


def request(key, members=(0, 1, 2), prefixes=()):
    prompt = np.random.default_rng(key).integers(1, 40, 3 + 5 * key).astype(np.int32)
    return Request(
        key=key, ordinal=key, prompt=prompt, members=list(members), prefixes=list(prefixes), max_new_tokens=34,
        temperature=0.9 if key else 0.0,
    )  # fmt: skip


def generated(running, requests):
    trajectories = {(r.key, m): Trajectory(member=m) for r in requests for m in r.members}
    for asked in requests:
        running.submit(asked)
    while running.num_live or running.num_waiting:
        for chunk in running.step():
            trajectories[chunk.key, chunk.member].append(chunk)
    return trajectories


@pytest.fixture(scope="module")
def alone():
    return {
        name: trajectory
        for key in range(4)
        for member in range(3)
        for name, trajectory in generated(engine(1), [request(key, [member])]).items()
    }


def assert_same_bits(trajectory, wanted, begin=0):
    np.testing.assert_array_equal(trajectory.tokens(), wanted.tokens()[begin:])
    assert trajectory.logprobs().tobytes() == wanted.logprobs()[begin:].tobytes()


@pytest.mark.parametrize(
    "settings",
    [
        {"num_slots": 12},
        {"num_slots": 5, "page_tokens": 4, "prefill_tokens": 3},
        {"num_slots": 9, "page_tokens": 7, "kv_tokens": 150},
    ],
)
def test_bits_do_not_depend_on_the_batch(alone, settings):
    running = engine(**settings)
    together = generated(running, [request(key) for key in (2, 0, 3, 1)])
    assert (running.scheduler.num_preempted > 0) == ("kv_tokens" in settings)
    for name, trajectory in together.items():
        assert trajectory.segments[0].origin.exact
        assert_same_bits(trajectory, alone[name])


def test_bits_do_not_depend_on_interruption(alone):
    for key, done in ((1, 1), (2, 13), (3, 21)):
        prefixes = [alone[key, m].tokens()[:done] for m in range(3)]
        left = [m for m in range(3) if len(alone[key, m].tokens()) > done]
        assert left
        asked = request(key, left, [prefixes[m] for m in left])
        for name, trajectory in generated(engine(4), [asked, request(0)]).items():
            assert_same_bits(trajectory, alone[name], done if name[0] == key else 0)
