"""The critic's learner, and what holds of both learners: how an update is split changes nothing; resuming is exact."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from algorithm_batches import groups

from headrace.actors.algorithms import Batch, Objective, group_advantages, returns_to_go
from headrace.actors.algorithms.updates import PolicyUpdate, ValueUpdate
from headrace.actors.model.config import ModelConfig
from headrace.actors.model.qwen3_moe import Qwen3Moe
from headrace.actors.report import METRICS
from headrace.actors.trainer.batch import Totals, check_lengths, collate, rated
from headrace.actors.trainer.learner import Learner, _Surrogate
from headrace.actors.trainer.settings import CriticSettings, RlSettings, SftSettings
from headrace.actors.trainer.value_learner import HEAD, ValueLearner, _regression
from headrace.actors.types import Group

CONFIG = ModelConfig(
    vocab_size=11, hidden_size=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, num_experts=4,
    moe_intermediate_size=12, max_positions=64, initializer_range=0.2,
)  # fmt: skip
SETTINGS = CriticSettings(learning_rate=1e-2, weight_decay=0.0, warmup_steps=0, mini_batches=1, aux_weight=0.0)


def policy() -> dict[str, np.ndarray]:
    return {name: p.detach().numpy() for name, p in Qwen3Moe(CONFIG, seed=0).named_parameters()}


def critic(**settings: float) -> ValueLearner:
    return ValueLearner(CONFIG, replace(SETTINGS, **settings), policy())  # type: ignore[arg-type]


def update(batch: list[Group]) -> ValueUpdate:
    return ValueUpdate(groups=batch, returns=returns_to_go(Batch(batch).token_rewards()))


def plain_values(learner: ValueLearner, group: Group, member: int) -> torch.Tensor:
    """One sequence alone: after each prefix that ends before a token of the response, a number."""
    t = group.trajectories[member]
    tokens = torch.from_numpy(np.concatenate((group.prompt.tokens, t.tokens())).astype(np.int64))
    model = learner._updater.model
    hidden = model(tokens, torch.arange(len(tokens)), [len(tokens)]).hidden
    return model.logits(hidden)[len(group.prompt.tokens) - 1 : -1, 0]


def test_it_begins_as_the_policy_and_says_zero() -> None:
    learner = critic()
    batch = groups(3)
    assert all((row == 0).all() for row in learner.values(batch))
    weights = learner._updater.weights()
    assert weights[HEAD].shape == (1, CONFIG.hidden_size)
    for name, array in policy().items():
        assert name == HEAD or np.array_equal(weights[name], array)


@pytest.mark.parametrize("micro_batch_tokens", [1, 30, 10_000])
def test_values_are_those_of_the_states_before_each_token(micro_batch_tokens: int) -> None:
    learner = critic(micro_batch_tokens=micro_batch_tokens)
    batch = groups(3)
    learner.update(update(batch))
    said = iter(learner.values(batch))
    for group in batch:
        for member, trajectory in enumerate(group.trajectories):
            row = next(said)
            assert row.shape == (trajectory.num_tokens,) and row.dtype == np.float32
            np.testing.assert_allclose(row, plain_values(learner, group, member).detach().numpy(), atol=1e-5)


def test_one_update_equals_a_plain_loop() -> None:
    learner, batch = critic(clip_norm=0.1), groups(3)
    other = critic()
    model = other._updater.model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0)
    num_tokens = sum(t.num_tokens for group in batch for t in group.trajectories)
    loss = sum(
        (plain_values(other, group, m) - t.reward).square().sum() / (2 * num_tokens)
        for group in batch
        for m, t in enumerate(group.trajectories)
    )
    assert isinstance(loss, torch.Tensor)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()
    metrics = learner.update(update(batch))
    assert metrics["value_loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert metrics["critic_grad_norm"] == pytest.approx(float(norm), rel=1e-4)
    for name, parameter in model.named_parameters():
        np.testing.assert_allclose(learner._updater.weights()[name], parameter.detach().numpy(), atol=1e-5)


def test_it_learns_to_tell_the_outcome() -> None:
    learner, batch = critic(learning_rate=3e-3), groups(4)
    metrics = [learner.update(update(batch)) for _ in range(60)]
    assert metrics[0]["explained_variance"] == pytest.approx(0, abs=1e-6)
    assert metrics[-1]["explained_variance"] > 0.5 > metrics[0]["explained_variance"]
    assert metrics[-1]["value_loss"] < metrics[0]["value_loss"] / 2
    assert metrics[0]["return_mean"] == pytest.approx(np.concatenate(update(batch).returns).mean(), abs=1e-6)
    assert metrics[0].keys() <= METRICS.keys()


def test_explained_variance_is_one_less_the_share_of_the_variance_that_is_left() -> None:
    learner, batch = critic(learning_rate=3e-3), groups(4)
    for _ in range(8):
        said = np.concatenate(learner.values(batch)).astype(np.float64)
        metrics = learner.update(update(batch))
        returns = np.concatenate(update(batch).returns).astype(np.float64)
        assert metrics["explained_variance"] == pytest.approx(1 - (returns - said).var() / returns.var(), abs=1e-4)
        assert metrics["value_mean"] == pytest.approx(said.mean(), abs=1e-5)
    same = groups(2)
    for trajectory in (t for group in same for t in group.trajectories):
        trajectory.reward = 1.0
    assert learner.update(update(same))["explained_variance"] == 0, "all returns are the same"


def test_resuming_is_exact_to_the_bit() -> None:
    straight, stopped = critic(mini_batches=2), critic(mini_batches=2)
    for step in range(4):
        for learner in (straight, stopped):
            learner.update(update(groups(4, seed=step)))
        arrays, info = stopped.state()
        stopped = critic(mini_batches=2)
        stopped.load_state(arrays, info)
    one, other = straight.state(), stopped.state()
    assert one[1] == other[1] and one[1]["step"] == 4
    assert all(np.array_equal(array, other[0][name]) for name, array in one[0].items())


def test_a_sample_that_is_longer_than_the_positions_is_refused() -> None:
    learner = ValueLearner(replace(CONFIG, max_positions=6), SETTINGS, policy())
    with pytest.raises(ValueError, match=r"prompt \d, member \d has \d+ tokens with its prompt; the model has 6 posit"):
        learner.values(groups(4))
    with pytest.raises(ValueError, match="the model has 6 positions"):
        learner.update(update(groups(4)))


def gradients(model: Qwen3Moe) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("objective", [Objective(imitation=0.1), Objective(mean="response"), None])
@pytest.mark.parametrize("num_parts", [2, 3, 7])
def test_the_gradient_does_not_depend_on_how_an_update_is_split_over_ranks_and_micro_batches(
    objective: Objective | None, num_parts: int
) -> None:
    """Every part is computed alone, with the counts of the whole, as another rank would."""
    whole = Batch(groups(4, size=6))
    targets = whole.spread(group_advantages(whole))
    samples = [s for row in rated(whole.groups, targets) for s in row]
    totals, random = Totals.of(samples), np.random.default_rng(num_parts)
    assert 0 < totals.positive_tokens < totals.tokens and totals.responses == 24
    loss_of = _regression if objective is None else _Surrogate(objective, 1.0)
    results = []
    for parts in ([np.arange(24)], np.array_split(random.permutation(24), num_parts)):
        model = Qwen3Moe(CONFIG, seed=3, num_outputs=1 if objective is None else None)
        total = 0.0
        for part in parts:
            batch = collate([samples[i] for i in part])
            out = model(batch.tokens, batch.positions, batch.lengths)
            loss, _ = loss_of(model.logits(out.hidden[batch.rows]), batch, totals)
            loss.backward()
            total += loss.item()
        results.append((total, gradients(model)))
    assert results[1][0] == pytest.approx(results[0][0], abs=1e-5)
    assert float((results[1][1] - results[0][1]).norm() / results[0][1].norm()) < 1e-5


def test_responses_that_take_no_part_are_not_in_the_loss() -> None:
    batch = groups(4)
    whole = Batch(batch)
    advantages: list[np.ndarray | None] = [*whole.spread(group_advantages(whole))]
    some = [row if i % 4 != 2 else None for i, row in enumerate(advantages)]
    settings = RlSettings(groups_per_step=4, mini_batches=1, learning_rate=1e-3, weight_decay=0.0, aux_weight=0.0)
    masked, without = (Learner(CONFIG, SftSettings(), settings, seed=0) for _ in range(2))
    metrics = masked.rl_step(PolicyUpdate(groups=batch, advantages=some, objective=Objective()))
    for group in batch:
        del group.trajectories[2]
    left = [row for row in some if row is not None]
    without.rl_step(PolicyUpdate(groups=batch, advantages=[*left], objective=Objective()))
    assert metrics["trained_tokens"] == sum(len(row) for row in left)
    assert all(np.array_equal(array, without.weights()[name]) for name, array in masked.weights().items())


def test_lengths_within_the_positions_pass() -> None:
    check_lengths(groups(4), 64)
