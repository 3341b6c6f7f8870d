"""The learner: its gradient against a plain loop, packing without effect, resuming to the bit, bad numbers refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from headrace.actors.algorithms import Batch, Objective, group_advantages
from headrace.actors.algorithms.dapo import Dapo
from headrace.actors.algorithms.updates import PolicyUpdate
from headrace.actors.model.config import ModelConfig
from headrace.actors.model.decode import Decoder, KvCache
from headrace.actors.model.qwen3_moe import Qwen3Moe
from headrace.actors.report import METRICS
from headrace.actors.trainer.learner import Learner
from headrace.actors.trainer.settings import RlSettings, SftSettings
from headrace.actors.types import Group, Prompt, Segment, Trajectory, Verdict

CONFIG = ModelConfig(
    vocab_size=11, hidden_size=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, num_experts=4,
    moe_intermediate_size=12, max_positions=64, initializer_range=0.2,
)  # fmt: skip
SFT = SftSettings(steps=20, warmup_steps=0, decay_ratio=0.0, learning_rate=4e-3, muon_learning_rate=0.02)
RL = RlSettings(
    steps=20, warmup_steps=0, decay_ratio=0.0, mini_batches=2, groups_per_step=4, aux_weight=0.0, learning_rate=5e-4,
    weight_decay=0.0,
)  # fmt: skip

Arrays = dict[str, np.ndarray]


def examples(count: int, seed: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    """Counting up from the last token of the prompt."""
    random = np.random.default_rng(seed)
    result = []
    for _ in range(count):
        prompt = random.integers(0, 11, random.integers(1, 6))
        response = (prompt[-1] + 1 + np.arange(random.integers(1, 20))) % 11
        result.append((prompt.astype(np.int32), response.astype(np.int32)))
    return result


def groups(count: int, *, size: int = 4, seed: int = 0, reward: float | None = None) -> list[Group]:
    random = np.random.default_rng(seed)
    made = []
    for ordinal in range(count):
        trajectories = []
        for member in range(size):
            segments = [
                Segment(
                    version=version,
                    tokens=random.integers(0, 11, n).astype(np.int32),
                    logprobs=random.uniform(-3, -1.5, n).astype(np.float32),
                )
                for version, n in enumerate(random.integers(1, 8, 2))
            ]
            correct = bool(member % 2)
            trajectories.append(
                Trajectory(
                    member=member,
                    segments=segments,
                    finish="stop",
                    verdict=Verdict(correct=correct),
                    reward=float(correct) if reward is None else reward,
                )
            )
        prompt = Prompt(ordinal=ordinal, tokens=random.integers(0, 11, 3).astype(np.int32), answer="", size=2)
        made.append(Group(prompt=prompt, trajectories=trajectories))
    return made


def dapo_update(batch: list[Group]) -> PolicyUpdate:
    whole = Batch(batch)
    advantages = whole.spread(group_advantages(whole))
    return PolicyUpdate(groups=batch, advantages=[*advantages], objective=Objective())


def copied(arrays: Arrays) -> Arrays:
    return {name: array.copy() for name, array in arrays.items()}


def assert_equal(a: Arrays, b: Arrays) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert np.array_equal(a[name], b[name]), name


def test_sft_learns_to_count() -> None:
    learner = Learner(CONFIG, SFT, RL, seed=0)
    first = learner.sft_step(examples(32, seed=0))
    for step in range(1, 20):
        last = learner.sft_step(examples(32, seed=step))
    assert first["loss"] > 2 and last["loss"] < 0.7
    assert last["accuracy_ratio"] > 0.8 > first["accuracy_ratio"]
    assert (learner.stage, learner.step) == ("sft", 20)


def test_rl_makes_rewarded_answers_likelier() -> None:
    learner = Learner(CONFIG, SFT, replace(RL, learning_rate=1e-2), seed=0)
    batch = groups(4)

    def logprob(correct: bool) -> float:
        model = Qwen3Moe(CONFIG)
        model.load_state_dict({name: torch.tensor(w) for name, w in learner.weights().items()})
        total = 0.0
        for group in batch:
            for t in group.trajectories:
                if t.verdict is not None and t.verdict.correct == correct:
                    total += response_logprobs(model, group.prompt.tokens, t.tokens()).mean().item()
        return total / 8

    before = logprob(True) - logprob(False)
    for _ in range(5):
        learner.rl_step(dapo_update(batch))
    assert logprob(True) - logprob(False) > before + 0.2


def response_logprobs(model: Qwen3Moe, prompt: np.ndarray, response: np.ndarray) -> torch.Tensor:
    """One sequence at a time, with nothing packed: float32 [n]."""
    tokens = torch.from_numpy(np.concatenate((prompt, response)).astype(np.int64))
    out = model(tokens, torch.arange(len(tokens)), [len(tokens)])
    log_softmax = model.logits(out.hidden).log_softmax(-1)
    return log_softmax[len(prompt) - 1 : -1].gather(1, tokens[len(prompt) :, None])[:, 0]


def test_one_rl_update_equals_a_plain_loop() -> None:
    """Every response alone, the loss from the formula, torch's AdamW."""
    settings = replace(RL, mini_batches=1, weight_decay=0.1, clip_norm=0.1, temperature=1.0)
    learner = Learner(CONFIG, SFT, settings, seed=3)
    model = Qwen3Moe(CONFIG, seed=3)
    batch = groups(3)
    metrics = learner.rl_step(dapo_update(batch))

    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    num_tokens = sum(t.num_tokens for group in batch for t in group.trajectories)
    loss = torch.zeros(())
    for group in batch:
        rewards = np.array([t.reward for t in group.trajectories])
        for t in group.trajectories:
            advantage = float((t.reward - rewards.mean()) / rewards.std())
            ratio = (response_logprobs(model, group.prompt.tokens, t.tokens()) - torch.from_numpy(t.logprobs())).exp()
            loss = loss - torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.28) * advantage).sum() / num_tokens
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()

    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-4, abs=1e-6)
    assert metrics["grad_norm"] == pytest.approx(float(norm), rel=1e-3)
    assert metrics["trained_tokens"] == num_tokens
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            torch.from_numpy(learner.weights()[name]), parameter.detach(), atol=1e-5, rtol=1e-4, msg=name
        )


def test_mini_batches_are_updates_in_the_order_of_the_groups() -> None:
    batch = groups(4)
    once = Learner(CONFIG, SFT, replace(RL, mini_batches=2), seed=0)
    once.rl_step(dapo_update(batch))
    twice = Learner(CONFIG, SFT, replace(RL, mini_batches=1), seed=0)
    twice.rl_step(dapo_update(batch[:2]))
    twice.rl_step(dapo_update(batch[2:]))
    assert_equal(once.weights(), twice.weights())


@pytest.mark.parametrize("micro_batch_tokens", [1, 40, 100])
def test_packing_changes_nothing_but_rounding(micro_batch_tokens: int) -> None:
    def steps(budget: int) -> tuple[dict[str, float], dict[str, float]]:
        sft = replace(SFT, micro_batch_tokens=budget, aux_weight=0.0)
        learner = Learner(CONFIG, sft, replace(RL, micro_batch_tokens=budget, mini_batches=1), seed=0)
        return learner.sft_step(examples(16)), learner.rl_step(dapo_update(groups(4)))

    (sft, rl), (sft_whole, rl_whole) = steps(micro_batch_tokens), steps(10_000)
    for name in ("loss", "grad_norm", "accuracy_ratio"):
        assert sft[name] == pytest.approx(sft_whole[name], abs=1e-5)
    for name in ("loss", "grad_norm", "entropy_nats", "clip_ratio", "behaviour_kl_nats", "ratio_max"):
        assert rl[name] == pytest.approx(rl_whole[name], rel=1e-4, abs=1e-5)


def test_the_ratio_of_the_sampling_policy_is_one() -> None:
    """Log-probabilities of the decoder, at a temperature, against those of the training pass."""
    rl = replace(RL, temperature=0.7, mini_batches=1)
    learner = Learner(CONFIG, SFT, rl, seed=0)
    batch = groups(2)
    decoder, cache = Decoder(CONFIG, learner.weights()), KvCache(CONFIG, num_slots=1, max_len=64)
    for group in batch:
        for t in group.trajectories:
            logits = decoder.prefill(
                cache, torch.from_numpy(group.prompt.tokens.astype(np.int64)), [3], torch.zeros(1, dtype=torch.int64)
            )
            position = 3
            for segment in t.segments:
                for i, token in enumerate(segment.tokens):
                    segment.logprobs[i] = float((logits[0] / 0.7).log_softmax(-1)[int(token)])
                    logits = decoder.step(cache, torch.tensor([int(token)]), torch.tensor([position]))
                    position += 1
    metrics = learner.rl_step(dapo_update(batch))
    assert metrics["ratio_max"] == pytest.approx(1, abs=1e-4)
    assert metrics["behaviour_kl_nats"] == pytest.approx(0, abs=1e-6)
    assert metrics["clip_ratio"] == 0


@pytest.mark.parametrize("muon_learning_rate", [0.0, 0.01])
def test_resuming_is_exact_to_the_bit(muon_learning_rate: float) -> None:
    rl = replace(RL, muon_learning_rate=muon_learning_rate, aux_weight=0.01)
    straight = Learner(CONFIG, SFT, rl, seed=0)
    stopped = Learner(CONFIG, SFT, rl, seed=0)
    for step in range(8):
        for learner in (straight, stopped):
            if step < 4:
                learner.sft_step(examples(8, seed=step))
            else:
                learner.rl_step(dapo_update(groups(4, seed=step)))
        arrays, info = stopped.state()
        stopped = Learner(CONFIG, SFT, rl, seed=99)
        stopped.load_state(copied(arrays), dict(info))
        assert (stopped.stage, stopped.step) == (straight.stage, straight.step)
    assert_equal(straight.state()[0], stopped.state()[0])


def test_state_is_a_copy_and_weights_are_views() -> None:
    learner = Learner(CONFIG, SFT, RL, seed=0)
    (arrays, _), weights = learner.state(), learner.weights()
    before = copied(arrays)
    learner.sft_step(examples(4))
    assert_equal(arrays, before)
    assert not np.array_equal(weights["lm_head.weight"], before["weights/lm_head.weight"])


def test_weights_of_another_model_are_refused() -> None:
    learner = Learner(CONFIG, SFT, RL, seed=0)
    with pytest.raises(ValueError, match=r"of another model: .*\(\d+ tensors differ\); check the \[model\] table"):
        learner.load_weights(Learner(replace(CONFIG, hidden_size=8), SFT, RL, seed=0).weights())
    tensors = copied(learner.weights())
    del tensors["model.norm.weight"]
    with pytest.raises(ValueError, match=r"model\.norm\.weight has shape None, expected \(16,\)"):
        learner.load_weights(tensors)


def test_updates_without_a_finite_gradient_are_skipped_counted_and_stopped() -> None:
    learner = Learner(CONFIG, SFT, replace(RL, max_skipped=3), seed=0)
    learner.rl_step(dapo_update(groups(4, seed=1)))
    sound = learner.weights()["lm_head.weight"][0, 0].copy()
    learner.weights()["lm_head.weight"][0, 0] = float("inf")
    before, _ = learner.state()
    assert learner.rl_step(dapo_update(groups(4, seed=2)))["skipped_updates"] == 2
    after, info = learner.state()
    assert_equal(before, after)
    assert info["skipped_in_row"] == 2 and info["step"] == 2

    again = Learner(CONFIG, SFT, replace(RL, max_skipped=3), seed=9)
    again.load_state(copied(after), info)
    with pytest.raises(FloatingPointError, match=r"4 updates in a row had no finite gradient, the last at step 3 with"):
        again.rl_step(dapo_update(groups(4, seed=3)))

    learner.weights()["lm_head.weight"][0, 0] = sound
    assert learner.rl_step(dapo_update(groups(4, seed=3)))["skipped_updates"] == 0
    assert learner.state()[1]["skipped_in_row"] == 0


def test_a_sample_that_is_longer_than_the_positions_is_refused_by_name() -> None:
    learner = Learner(replace(CONFIG, max_positions=14), SFT, RL, seed=0)
    batch = groups(4)
    arrays, info = learner.state()
    longest = {(g.prompt.ordinal, t.member): 3 + t.num_tokens for g in batch for t in g.trajectories}
    (ordinal, member), num_tokens = next((key, n) for key, n in longest.items() if n > 14)
    with pytest.raises(
        ValueError, match=rf"prompt {ordinal}, member {member} has {num_tokens} tokens .* model has 14 pos"
    ):
        learner.rl_step(dapo_update(batch))
    assert_equal(arrays, learner.state()[0])
    assert learner.state()[1] == info


def test_responses_without_a_verdict_take_no_part() -> None:
    whole, less = Learner(CONFIG, SFT, RL, seed=0), Learner(CONFIG, SFT, RL, seed=0)
    batch = groups(4, size=5)
    for group in batch:
        group.trajectories[4].verdict = Verdict(correct=False, error="sandbox died")
        group.trajectories[4].reward = 7.0
    metrics = whole.rl_step(dapo_update(batch))
    for group in batch:
        del group.trajectories[4]
    less.rl_step(dapo_update(batch))
    assert_equal(whole.weights(), less.weights())
    assert metrics["responses"] == 16


def test_the_balancing_loss_evens_the_experts() -> None:
    learner = Learner(CONFIG, replace(SFT, aux_weight=10.0, clip_norm=1e9), RL, seed=1)
    loads = [learner.sft_step(examples(32, seed=step))["expert_load"] for step in range(20)]
    assert loads[-1] < loads[0]
    assert 1 <= loads[-1] < 1.3


def test_metrics_are_those_that_a_run_writes() -> None:
    learner = Learner(CONFIG, SFT, RL, seed=0)
    sft = learner.sft_step(examples(8))
    batch = groups(4)
    rl = learner.rl_step(dapo_update(batch))
    assert sft.keys() | rl.keys() <= METRICS.keys()
    assert all(np.isfinite(value) for value in (sft | rl).values())
    lengths = [t.num_tokens for group in batch for t in group.trajectories]
    assert rl["trained_tokens"] == sum(lengths)
    assert rl["response_tokens_mean"] == pytest.approx(np.mean(lengths))
    assert rl["response_tokens_max"] == max(lengths)
    assert (rl["groups"], rl["responses"], rl["reward_mean"], rl["prompt_size_mean"]) == (4, 16, 0.5, 2)
    assert 0 < rl["entropy_nats"] <= np.log(11) and 1 <= rl["expert_load"] <= 4


def test_contradictory_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="mini_batches must be at most groups_per_step"):
        RlSettings(groups_per_step=16, mini_batches=17)
    with pytest.raises(ValueError, match=r"dual_clip must be 0 or above 1 \+ clip_high \(1\.28\), got 1\.2; try 10"):
        Dapo(dual_clip=1.2)
