"""Losses against the formulas of the papers, written out as loops; their gradients; how they add up."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headrace.actors.algorithms.advantages import standard_scores
from headrace.actors.algorithms.groups import has_signal, judged
from headrace.actors.algorithms.losses import imitation_loss, own_loss, policy_loss, value_loss
from headrace.actors.algorithms.updates import Objective
from headrace.actors.types import Group, Prompt, Segment, Trajectory, Verdict

CLIP = Objective(clip_low=0.2, clip_high=0.28)


def trajectory(correct: bool | None, *, error: str = "", reward: float = 0.0, num_tokens: int = 3) -> Trajectory:
    segments = [Segment(version=0, tokens=np.zeros(num_tokens, np.int32), logprobs=np.zeros(num_tokens, np.float32))]
    verdict = None if correct is None else Verdict(correct=correct, error=error)
    return Trajectory(member=0, segments=segments, verdict=verdict, reward=reward)


def group(*trajectories: Trajectory) -> Group:
    return Group(prompt=Prompt(ordinal=0, tokens=np.ones(1, np.int32), answer="", size=1), trajectories=[*trajectories])


@given(st.lists(st.sampled_from([0.0, 1.0, -0.5, 0.25]), min_size=1, max_size=16))
def test_advantages_are_standard_scores(rewards: list[float]) -> None:
    result = standard_scores(np.array(rewards, np.float32))
    mean = sum(rewards) / len(rewards)
    std = math.sqrt(sum((r - mean) ** 2 for r in rewards) / len(rewards))
    expected = [(r - mean) / std if std else 0.0 for r in rewards]
    np.testing.assert_allclose(result, expected, atol=1e-6)
    assert result.dtype == np.float32


def test_a_group_has_signal_if_some_but_not_all_are_correct() -> None:
    right, wrong = trajectory(True), trajectory(False)
    assert has_signal(group(right, wrong))
    assert not has_signal(group(right, right))
    assert not has_signal(group(wrong, wrong))
    assert not has_signal(group())


def test_shaped_rewards_are_no_signal() -> None:
    assert not has_signal(group(trajectory(True, reward=1.0), trajectory(True, reward=0.5)))


def test_errors_and_unjudged_responses_take_no_part() -> None:
    right, wrong = trajectory(True), trajectory(False)
    broken = trajectory(False, error="sandbox died")
    assert not has_signal(group(right, broken))
    assert not has_signal(group(right, trajectory(None)))
    assert judged(group(broken, right, trajectory(None), wrong, trajectory(True, num_tokens=0))) == [right, wrong]


def by_hand(
    logprobs: np.ndarray, behaviour: np.ndarray, advantage: np.ndarray, num_tokens: int, dual_clip: float
) -> tuple[float, int, float, float]:
    total, num_clipped, kl, largest = 0.0, 0, 0.0, 0.0
    for new, old, a in zip(logprobs, behaviour, advantage, strict=True):
        log_ratio = min(max(float(new) - float(old), -20.0), 20.0)
        r = math.exp(log_ratio)
        objective = min(r * a, min(max(r, 0.8), 1.28) * a)
        if dual_clip and a < 0:
            objective = max(objective, dual_clip * a)
        inside = r * a == objective
        num_clipped += not inside and a != 0
        total += objective
        kl += r - 1 - log_ratio
        largest = max(largest, r)
    return -total / num_tokens, num_clipped, kl, largest


@given(
    st.lists(
        st.tuples(
            st.floats(-5, 0, width=32), st.floats(-5, 0, width=32), st.sampled_from([-1.5, -0.25, 0.0, 0.5, 2.0])
        ),
        min_size=1,
        max_size=20,
    ),
    st.sampled_from([0.0, 3.0]),
)
def test_loss_equals_the_formula_token_by_token(tokens: list[tuple[float, float, float]], dual_clip: float) -> None:
    new, old, advantage = (torch.tensor(column, dtype=torch.float64) for column in zip(*tokens, strict=True))
    result = policy_loss(new, old, advantage, replace(CLIP, dual_clip=dual_clip), total=37)
    loss, num_clipped, kl, largest = by_hand(new.numpy(), old.numpy(), advantage.numpy(), 37, dual_clip)
    assert float(result.loss) == pytest.approx(loss, rel=1e-6, abs=1e-9)
    assert int(result.num_clipped) == num_clipped
    assert float(result.kl_sum) == pytest.approx(kl, rel=1e-6, abs=1e-9)
    assert float(result.ratio_max) == pytest.approx(largest, rel=1e-6)


def test_gradients_are_those_of_finite_differences_and_vanish_where_clipped() -> None:
    old = torch.full((6,), -1.0, dtype=torch.float64)
    new = old + torch.tensor([0.0, 0.5, -0.5, 0.5, -0.5, 3.0], dtype=torch.float64)
    advantage = torch.tensor([1.0, 1, 1, -1, -1, -1], dtype=torch.float64)
    new.requires_grad_()

    def loss(new: torch.Tensor) -> torch.Tensor:
        return policy_loss(new, old, advantage, replace(CLIP, dual_clip=10.0), total=6).loss

    assert torch.autograd.gradcheck(loss, (new,))
    (gradient,) = torch.autograd.grad(loss(new), new)
    assert (gradient != 0).tolist() == [True, False, True, True, False, False]
    assert gradient[0] == pytest.approx(-1 / 6)  # at ratio 1: minus the advantage, over the tokens


def test_the_parts_of_a_batch_add_up() -> None:
    random = torch.Generator().manual_seed(0)
    new, old, advantage = (torch.randn(50, generator=random, dtype=torch.float64) for _ in range(3))
    whole = policy_loss(new, old, advantage, CLIP, total=50).loss
    parts = [
        policy_loss(new[part], old[part], advantage[part], CLIP, total=50).loss
        for part in torch.arange(50).split([1, 19, 30])
    ]
    torch.testing.assert_close(sum(parts), whole)


def test_a_stray_token_cannot_overflow() -> None:
    result = policy_loss(torch.zeros(1), torch.tensor([-1e4]), torch.tensor([-1.0]), CLIP, total=1)
    assert result.loss.isfinite() and result.kl_sum.isfinite()


def test_the_mean_over_responses_weighs_each_response_alike() -> None:
    """A response of one token and one of three, at ratio 1: the mean of their advantages, not of their tokens'."""
    old = torch.zeros(4)
    advantage = torch.tensor([2.0, -1.0, -1.0, -1.0])
    weight = torch.tensor([1.0, 1 / 3, 1 / 3, 1 / 3])
    by_response = policy_loss(old, old, advantage, CLIP, total=2, weight=weight).loss
    by_token = policy_loss(old, old, advantage, CLIP, total=4).loss
    assert float(by_response) == pytest.approx(-(2 - 1) / 2) and float(by_token) == pytest.approx(-(2 - 3) / 4)


@pytest.mark.parametrize("dual_clip", [0.0, 3.0])
def test_the_gradient_of_the_mean_over_responses_is_that_of_finite_differences(dual_clip: float) -> None:
    random = torch.Generator().manual_seed(1)
    old = torch.randn(12, generator=random, dtype=torch.float64)
    new = (old + 0.7 * torch.randn(12, generator=random, dtype=torch.float64)).requires_grad_()
    advantage = torch.randn(12, generator=random, dtype=torch.float64)
    weight = torch.rand(12, generator=random, dtype=torch.float64)
    objective = replace(CLIP, dual_clip=dual_clip)
    assert torch.autograd.gradcheck(
        lambda x: policy_loss(x, old, advantage, objective, total=3, weight=weight).loss, (new,)
    )


def test_tokens_of_weight_zero_have_no_gradient() -> None:
    new = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True)
    loss = policy_loss(new, torch.zeros(3) - 2, torch.ones(3), CLIP, total=2, weight=torch.tensor([1.0, 0, 1])).loss
    (gradient,) = torch.autograd.grad(loss, new)
    assert gradient[1] == 0 and gradient[2] != 0


def test_imitation_is_of_the_correct_responses_alone() -> None:
    logprobs = torch.tensor([-1.0, -2.0, -4.0], dtype=torch.float64, requires_grad=True)
    positive = torch.tensor([True, False, True])
    loss = imitation_loss(logprobs, positive, num_positive=10)
    assert loss.item() == pytest.approx(0.5)
    (gradient,) = torch.autograd.grad(loss, logprobs)
    assert gradient.tolist() == [-0.1, 0, -0.1]
    assert torch.autograd.gradcheck(lambda x: imitation_loss(x, positive, num_positive=10), (logprobs,))
    assert imitation_loss(logprobs, torch.zeros(3, dtype=torch.bool), num_positive=0).item() == 0


def test_the_value_loss_is_half_the_squared_error_over_all_tokens() -> None:
    values = torch.tensor([0.0, 1.0, -2.0], dtype=torch.float64, requires_grad=True)
    returns = torch.tensor([1.0, 1.0, 1.0], dtype=torch.float64)
    assert value_loss(values, returns, num_tokens=5).item() == pytest.approx((1 + 0 + 9) / 2 / 5)
    assert torch.autograd.gradcheck(lambda x: value_loss(x, returns, num_tokens=5), (values,))


def test_a_loss_of_the_users_own_is_found_or_refused() -> None:
    assert own_loss("math:fsum") is math.fsum
    for path, why in (("math:fsun", "has no attribute"), ("no_such_module:f", "No module named"), ("math", "Empty")):
        with pytest.raises(ValueError, match=f'the loss "{path}" can.t be loaded: .*{why}|the loss "{path}" can'):
            own_loss(path)
    with pytest.raises(ValueError, match="the loss math:pi is a float, must be a function"):
        own_loss("math:pi")
