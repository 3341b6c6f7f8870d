"""Off-policy corrections: their weights by hand, and a learner's steps against the formulas written out as loops."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from algorithm_batches import groups
from hypothesis import given
from hypothesis import strategies as st

from headrace.actors.algorithms import Batch, Objective, group_advantages
from headrace.actors.algorithms.losses import decoupled_weights, truncated_weights
from headrace.actors.algorithms.updates import PolicyUpdate
from headrace.actors.model.config import ModelConfig
from headrace.actors.model.qwen3_moe import Qwen3Moe
from headrace.actors.report import METRICS
from headrace.actors.trainer.batch import collate, rated
from headrace.actors.trainer.learner import Learner
from headrace.actors.trainer.settings import Correction, RlSettings, SftSettings
from headrace.actors.types import Group

CONFIG = ModelConfig(
    vocab_size=11, hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, num_experts=4,
    moe_intermediate_size=12, max_positions=64, initializer_range=0.2,
)  # fmt: skip
RL = RlSettings(
    steps=20, warmup_steps=0, decay_ratio=0.0, mini_batches=2, groups_per_step=4, aux_weight=0.0, learning_rate=2e-2,
    weight_decay=0.0, micro_batch_tokens=40,
)  # fmt: skip
OBJECTIVE = Objective()


def learner(rl: RlSettings) -> Learner:
    return Learner(CONFIG, SftSettings(), rl, seed=0)


def update(batch: list[Group]) -> PolicyUpdate:
    whole = Batch(batch)
    return PolicyUpdate(groups=batch, advantages=[*whole.spread(group_advantages(whole))], objective=OBJECTIVE)


@torch.no_grad()
def logprobs_of(weights: dict[str, np.ndarray], batch: list[Group]) -> np.ndarray:
    """Of all response tokens of the batch, end to end."""
    model = Qwen3Moe(CONFIG)
    for name, parameter in model.named_parameters():
        parameter.copy_(torch.from_numpy(weights[name]))
    inputs = collate([sample for row in rated(batch) for sample in row])
    out = model(inputs.tokens, inputs.positions, inputs.lengths)
    chosen: np.ndarray = (
        model.logits(out.hidden[inputs.rows]).log_softmax(-1)[torch.arange(len(inputs.targets)), inputs.targets].numpy()
    )
    return chosen


def by_hand(
    new: np.ndarray, begun_from: np.ndarray, sampled: np.ndarray, advantage: np.ndarray, bound: float
) -> tuple[float, int]:
    """Sum over tokens of minus the corrected surrogate, and how many weights met the bound."""
    total, truncated = 0.0, 0
    for n, p, mu, a in zip(new.tolist(), begun_from.tolist(), sampled.tolist(), advantage.tolist(), strict=True):
        ratio, weight = math.exp(n - p), math.exp(p - mu)
        truncated += weight > bound
        total -= min(weight, bound) * min(ratio * a, min(max(ratio, 0.8), 1.28) * a)
    return total, truncated


def test_weights_are_those_of_a_few_tokens_by_hand() -> None:
    sampled = torch.log(torch.tensor([0.5, 0.1, 0.8, 0.25]))
    begun_from = torch.log(torch.tensor([0.25, 0.4, 0.8, 0.5]))
    torch.testing.assert_close(decoupled_weights(begun_from, sampled), torch.tensor([0.5, 4.0, 1.0, 2.0]))
    torch.testing.assert_close(truncated_weights(begun_from, sampled, 2.0), torch.tensor([0.5, 2.0, 1.0, 2.0]))


@given(st.lists(st.tuples(st.floats(-200, 0), st.floats(-200, 0)), min_size=1), st.floats(1, 50))
def test_weights_are_finite_positive_and_bounded(pairs: list[tuple[float, float]], bound: float) -> None:
    begun_from, sampled = torch.tensor(pairs).unbind(1)
    whole, cut = decoupled_weights(begun_from, sampled), truncated_weights(begun_from, sampled, bound)
    assert (whole.isfinite() & (whole > 0)).all()
    assert (cut <= torch.tensor(bound)).all() and torch.equal(cut, whole.clamp(max=bound))


def test_weights_carry_no_gradient() -> None:
    begun_from = torch.zeros(3, requires_grad=True)
    assert not decoupled_weights(begun_from, torch.zeros(3)).requires_grad


@pytest.mark.parametrize(("correction", "bound"), [("tis", 1.5), ("decoupled", math.inf)])
def test_a_step_of_two_mini_batches_is_the_formula(correction: Correction, bound: float) -> None:
    """The second one is compared with where the step began, not with where the first one led."""
    rl = replace(RL, correction=correction, truncation=1.5)
    batch = groups(4)
    whole = Batch(batch)
    advantage = np.concatenate(whole.spread(group_advantages(whole)))
    sampled = np.concatenate([t.logprobs() for t in whole.responses])
    half = sum(t.num_tokens for group in batch[:2] for t in group.trajectories)

    tested, first = learner(rl), learner(replace(rl, mini_batches=1))
    begun_from = logprobs_of(tested.weights(), batch)
    metrics = tested.rl_step(update(batch))
    first.rl_step(update(batch[:2]))
    after_first = logprobs_of(first.weights(), batch)
    assert np.abs(after_first - begun_from).max() > 0.3  # else the test would not see the difference

    one, met = by_hand(begun_from[:half], begun_from[:half], sampled[:half], advantage[:half], bound)
    other, met_too = by_hand(after_first[half:], begun_from[half:], sampled[half:], advantage[half:], bound)
    shares = one / half * half + other / (len(sampled) - half) * (len(sampled) - half)
    assert metrics["loss"] == pytest.approx(shares / len(sampled), rel=1e-3, abs=1e-5)
    assert metrics["truncated_weight_ratio"] == pytest.approx((met + met_too) / len(sampled))
    assert (metrics["truncated_weight_ratio"] > 0) == (correction == "tis")
    assert metrics["ratio_max"] == pytest.approx(float(np.exp(begun_from - sampled).max()), rel=1e-3)
    assert metrics["clip_ratio"] > 0
    assert metrics.keys() <= METRICS.keys()


def test_one_update_needs_no_second_pass_over_the_batch() -> None:
    """Its ratio is one everywhere, and its gradient that of weight * advantage * log-probability."""
    batch = groups(4)
    for group in batch:
        for trajectory in group.trajectories:
            trajectory.segments[0].logprobs -= 0.7
    plain, corrected = learner(replace(RL, mini_batches=1)), learner(replace(RL, mini_batches=1, correction="tis"))
    assert corrected.rl_step(update(batch))["clip_ratio"] == 0
    assert plain.rl_step(update(batch))["clip_ratio"] > 0


@pytest.mark.parametrize("correction", ["tis", "decoupled"])
def test_tokens_of_the_policy_itself_need_no_correction(correction: Correction) -> None:
    batch = groups(4)
    plain, corrected = learner(RL), learner(replace(RL, correction=correction))
    own = iter(logprobs_of(plain.weights(), batch))
    for group in batch:
        for trajectory in group.trajectories:
            for segment in trajectory.segments:
                segment.logprobs = np.array([next(own) for _ in segment.tokens], np.float32)
    plain.rl_step(update(copy.deepcopy(batch)))
    corrected.rl_step(update(batch))
    for name, weights in plain.weights().items():
        np.testing.assert_allclose(corrected.weights()[name], weights, atol=2e-5, err_msg=name)


def test_an_own_loss_is_not_corrected_behind_its_back() -> None:
    tested = learner(replace(RL, correction="tis"))
    before = {name: array.copy() for name, array in tested.weights().items()}
    wanted = replace(update(groups(4)), objective=Objective(function="math:exp"))
    with pytest.raises(ValueError, match=r"\[rl\] correction = 'tis' corrects the surrogate, not the loss math:exp"):
        tested.rl_step(wanted)
    assert tested.stage == "sft" and all(np.array_equal(before[n], w) for n, w in tested.weights().items())
