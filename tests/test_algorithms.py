"""What each algorithm asks of its roles, against numbers worked out by hand; and inputs that none of them may take."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest
from algorithm_batches import RecordedCritic, RecordedPolicy, group

from headrace.actors.algorithms import Algorithm, Batch, Objective, gather
from headrace.actors.algorithms.dapo import Dapo
from headrace.actors.algorithms.grpo import Grpo
from headrace.actors.algorithms.load import BUILT_IN, load_algorithm, needs_critic, roles_of
from headrace.actors.algorithms.ppo import Ppo
from headrace.actors.algorithms.vapo import Vapo
from headrace.actors.trainer.settings import CriticSettings, RlSettings
from headrace.actors.types import Verdict


def a_batch() -> Batch:
    """Three tokens that earn 1, two that earn -1."""
    return Batch([group([1, -1], lengths=[3, 2])])


VALUES = [np.array([0.2, 0.4, 0.9], np.float32), np.array([0.1, -0.5], np.float32)]


async def test_dapo_gives_every_token_the_standard_score_of_its_response() -> None:
    policy = RecordedPolicy()
    assert await Dapo(dual_clip=10).step(a_batch(), policy=policy) == {"loss": 0.5}
    assert [row.tolist() for row in policy.advantages if row is not None] == [[1, 1, 1], [-1, -1]]
    assert policy.objective == Objective(clip_low=0.2, clip_high=0.28, dual_clip=10, mean="token")


async def test_dapo_leaves_truncated_responses_out_of_the_loss_but_not_of_the_mean() -> None:
    whole, cut = group([1, -1, -1, -1]), group([1, -1], ordinal=1)
    whole.trajectories[2].finish = cut.trajectories[0].finish = "length"
    policy = RecordedPolicy()
    await Dapo(overlong_filtering=True).step(Batch([whole, cut]), policy=policy)
    firsts = [None if row is None else round(float(row[0]), 4) for row in policy.advantages]
    assert firsts == [1.7321, -0.5774, None, -0.5774, None, -1.0]


async def test_a_batch_of_truncated_responses_alone_is_refused() -> None:
    with pytest.raises(ValueError, match="no response of the batch takes part"):
        await Dapo(overlong_filtering=True).step(Batch([group([1, -1], finish="length")]), policy=RecordedPolicy())


def test_dynamic_sampling_keeps_what_is_neither_all_right_nor_all_wrong() -> None:
    for rewards, kept in (([1, -1], True), ([1, 1], False), ([-1, -1], False)):
        assert Dapo().keeps(group(rewards)) is kept
        assert all(algorithm.keeps(group(rewards)) for algorithm in (Dapo(dynamic_sampling=False), Grpo(), Vapo()))


async def test_grpo_weighs_responses_alike_and_clips_symmetrically() -> None:
    policy = RecordedPolicy()
    await Grpo().step(a_batch(), policy=policy)
    assert policy.objective == Objective(clip_low=0.2, clip_high=0.2, mean="response")
    assert [row.tolist() for row in policy.advantages if row is not None] == [[1, 1, 1], [-1, -1]]


async def test_ppo_by_hand() -> None:
    policy, critic = RecordedPolicy(), RecordedCritic(VALUES)
    metrics = await Ppo(gae_lambda=0.5).step(a_batch(), policy=policy, critic=critic)
    assert metrics == {"loss": 0.5, "value_loss": 0.25}
    # deltas: 0.2, 0.5, 0.1 and -0.6, -0.5
    expected = [[0.2 + 0.5 * 0.55, 0.5 + 0.5 * 0.1, 0.1], [-0.6 - 0.5 * 0.5, -0.5]]
    flat = np.concatenate(expected)
    for row, want in zip(policy.advantages, expected, strict=True):
        assert row is not None
        np.testing.assert_allclose(row, (np.array(want) - flat.mean()) / flat.std(), atol=1e-5)
    for row, want, values in zip(critic.returns, expected, VALUES, strict=True):
        np.testing.assert_allclose(row, np.array(want) + values, atol=1e-6)
    assert policy.objective == Objective(clip_low=0.2, clip_high=0.2, mean="response")


async def test_vapo_looks_ahead_by_length_and_regresses_on_the_outcome() -> None:
    policy, critic = RecordedPolicy(), RecordedCritic(VALUES)
    await Vapo(adaptive_alpha=0.5, whitening=False).step(a_batch(), policy=policy, critic=critic)
    third = 1 / 3  # of three tokens: 1 - 1 / (0.5 * 3); of two: 0
    expected = [[0.2 + third * (0.5 + third * 0.1), 0.5 + third * 0.1, 0.1], [-0.6, -0.5]]
    for row, want in zip(policy.advantages, expected, strict=True):
        assert row is not None
        np.testing.assert_allclose(row, want, atol=1e-6)
    assert [row.round(5).tolist() for row in critic.returns] == [[1, 1, 1], [-1, -1]]
    assert policy.objective == Objective(clip_low=0.2, clip_high=0.28, mean="token", imitation=0.1)


async def test_vapo_without_adapting_takes_one_lambda_and_may_share_it_with_the_critic() -> None:
    policy, critic = RecordedPolicy(), RecordedCritic(VALUES)
    algorithm = Vapo(adaptive_alpha=0, lambda_policy=0.5, lambda_value=0.5, whitening=False)
    await algorithm.step(a_batch(), policy=policy, critic=critic)
    for row, returns, values in zip(policy.advantages, critic.returns, VALUES, strict=True):
        assert row is not None
        np.testing.assert_allclose(row, returns - values, atol=1e-6)


async def test_value_pretraining_regresses_on_monte_carlo_returns() -> None:
    critic = RecordedCritic(VALUES)
    assert await Vapo().pretrain(a_batch(), critic=critic) == {"value_loss": 0.25}
    assert [row.tolist() for row in critic.returns] == [[1, 1, 1], [-1, -1]]
    assert Vapo().value_steps == 50 and Ppo().value_steps == 0


def test_the_defaults_are_those_of_the_papers() -> None:
    rl, critic = RlSettings(), CriticSettings()
    assert (rl.groups_per_step, rl.group_size, rl.mini_batches, rl.max_new_tokens) == (512, 16, 16, 20480)
    assert (rl.learning_rate, rl.warmup_steps, rl.weight_decay, rl.clip_norm, rl.decay_ratio) == (1e-6, 20, 0.1, 1, 0)
    assert critic.learning_rate == 2e-6
    assert (Dapo().clip_low, Dapo().clip_high) == (0.2, 0.28)
    vapo = Vapo()
    assert (vapo.adaptive_alpha, vapo.lambda_value, vapo.imitation, vapo.clip_high) == (0.05, 1.0, 0.1, 0.28)


def test_the_built_in_ones_are_found_with_their_roles() -> None:
    assert {name: roles_of(cls.step) for name, cls in BUILT_IN.items()} == {
        "dapo": ["policy"], "grpo": ["policy"], "vapo": ["policy", "critic"], "ppo": ["policy", "critic"],
    }  # fmt: skip
    assert {name for name, cls in BUILT_IN.items() if needs_critic(cls())} == {"vapo", "ppo"}
    assert all(load_algorithm(name) is cls for name, cls in BUILT_IN.items())


async def test_an_update_that_fails_ends_the_others_first() -> None:
    ended = []

    async def update(name: str, fails: bool) -> str:
        try:
            await asyncio.sleep(0 if fails else 60)
            if fails:
                raise ValueError("prompt 3, member 1 is too long")
        finally:
            ended.append(name)
        return name

    with pytest.raises(ValueError, match="prompt 3, member 1"):
        await gather(update("policy", True), update("critic", False))
    assert sorted(ended) == ["critic", "policy"]
    assert await gather(asyncio.sleep(0, 1), asyncio.sleep(0, 2)) == [1, 2]


# Bad input ----------------------------------------------------------------------------------------------------


def test_an_empty_batch_is_refused() -> None:
    broken = group([1, -1])
    for trajectory in broken.trajectories:
        trajectory.verdict = Verdict(correct=False, error="the sandbox is gone")
    for groups in ([], [broken]):
        with pytest.raises(ValueError, match=rf"the batch of {len(groups)} groups is empty: no response has a verdict"):
            Batch(groups)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_name_their_sample(number: float) -> None:
    broken = group([1, -1], ordinal=12)
    broken.trajectories[1].reward = number
    with pytest.raises(ValueError, match=rf"prompt 12, member 1 has reward {number}"):
        Batch([group([1, -1]), broken])
    broken.trajectories[1].reward = -1.0
    broken.trajectories[0].segments[0].logprobs[0] = number
    with pytest.raises(ValueError, match="prompt 12, member 0 has a behaviour log-probability that is not finite"):
        Batch([group([1, -1]), broken])


async def test_advantages_that_are_not_finite_name_their_sample_and_token() -> None:
    values = [VALUES[0], np.array([0.1, float("nan")], np.float32)]
    with pytest.raises(ValueError, match="advantages of prompt 0, member 1 are nan at token 0"):
        await Vapo(whitening=False).step(a_batch(), policy=RecordedPolicy(), critic=RecordedCritic(values))


def test_advantages_that_do_not_fit_the_batch_are_refused() -> None:
    batch = a_batch()
    with pytest.raises(ValueError, match="there must be advantages for 2 responses, got 1"):
        batch.check([np.zeros(3, np.float32)], "advantages")
    with pytest.raises(ValueError, match=r"advantages of prompt 0, member 1 must have shape \(2,\), .* got \(3,\)"):
        batch.check([np.zeros(3, np.float32)] * 2, "advantages")


def refusal(name: str) -> str:
    with pytest.raises(ValueError) as caught:
        load_algorithm(name)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("dappo", 'got "dappo"; did you mean "dapo"?'),
        ("reinforce", 'got "reinforce"; built in are dapo, vapo, ppo, grpo'),
        ("no_such_module:Mine", "there is no module no_such_module; is its folder on PYTHONPATH?"),
        ("algorithm_mistakes:Minee", 'algorithm_mistakes has no Minee; did you mean "Mine"?'),
        ("algorithm_mistakes:NoAlgorithm", "must be a class derived from headrace.actors.algorithms.Algorithm"),
        ("algorithm_mistakes:NoDataclass", "marked @dataclass(frozen=True, kw_only=True)"),
        ("algorithm_mistakes:NoStep", "step is missing; it must be `async def` and take (batch, *, policy)"),
        ("algorithm_mistakes:PlainStep", "step must be `async def` and take (batch, *, policy), got a plain function"),
        ("algorithm_mistakes:OtherRole", "roles are policy and critic; got (batch: 'Batch', *, actor: 'Any')"),
        ("algorithm_mistakes:NoPolicy", "take (batch, *, policy), got (batch: 'Batch', *, critic: 'Any') -> 'Metrics'"),
        ("algorithm_mistakes:NoPretrain", "pretrain is missing; it must be `async def` and take (batch, *, critic)"),
        ("algorithm_mistakes:plain", "plain: step must be `async def` and take (batch, *, policy), got a plain"),
        ("algorithm_mistakes:no_policy", "step must be `async def` and take (batch, *, policy), got (batch: 'Batch')"),
    ],
)
def test_each_mistake_of_a_users_algorithm_gets_one_message(name: str, expected: str) -> None:
    text = refusal(name)
    assert expected in text
    assert "\n" not in text


def test_a_module_that_can_not_be_imported_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_algorithm.py").write_text("1 / 0\n")
    (tmp_path / "needy_algorithm.py").write_text("import no_such_thing\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert refusal("broken_algorithm:X") == "broken_algorithm can't be imported: ZeroDivisionError: division by zero"
    assert refusal("needy_algorithm:X") == "needy_algorithm needs 'no_such_thing', which is not installed"


def test_a_coroutine_is_an_algorithm_without_settings() -> None:
    cls = load_algorithm("algorithm_mistakes:sound")
    assert issubclass(cls, Algorithm) and roles_of(cls().step) == ["policy"]
    assert cls() == load_algorithm("algorithm_mistakes:sound")()
