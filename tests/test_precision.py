"""The precision schedule: settings, falling back and coming back; the watch; a runner in two forms."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headrace.actors.job import load_job
from headrace.actors.model.config import ModelConfig
from headrace.actors.model.qwen3_moe import Qwen3Moe
from headrace.actors.rollout import Rollout
from headrace.actors.rollout.precision import Kind, Precision, Schedule, Watch
from headrace.actors.rollout.requests import Chunk, Request
from headrace.actors.rollout.runner import Batch
from headrace.actors.rollout.scheduled import ScheduledRunner
from headrace.runtime.toml import ConfigError

ROOT = Path(__file__).parents[1]
CONFIG = ModelConfig(
    vocab_size=11, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, num_experts=4,
    moe_intermediate_size=16, max_positions=64, initializer_range=0.2,
)  # fmt: skip
FP8 = Precision(prefill="fp8", decode="fp8", kl_bound=0.01, recover=2, sample=2)


def weights(seed: int) -> dict[str, np.ndarray]:
    return {name: p.detach().numpy() for name, p in Qwen3Moe(CONFIG, seed=seed).named_parameters()}


def runner(settings: Precision = FP8) -> tuple[ScheduledRunner, Schedule]:
    schedule = Schedule(settings)
    made = ScheduledRunner(CONFIG, schedule, num_pages=8, page_tokens=16)
    made.load(made.prepare(weights(3)))
    return made, schedule


def one(tokens: list[int], *, decode: bool) -> Batch:
    """The next token of a sequence in page 0, or the beginning of it."""
    first = len(tokens) - 1 if decode else 0
    return Batch(
        tokens=np.array(tokens[first:], np.int64), positions=np.arange(first, len(tokens)),
        counts=np.array([len(tokens) - first]), tables=np.zeros((1, 1), np.int32), num_decode=int(decode),
        wanted=np.array([0]),
    )  # fmt: skip


def request(key: int, members: int = 2, **settings: Any) -> Request:
    prompt = np.array([1, 2, 3], np.int32)
    return Request(key=key, ordinal=key, prompt=prompt, members=list(range(members)), max_new_tokens=9, **settings)


def chunk(key: int, member: int, tokens: list[int], finish: Any = "") -> Chunk:
    return Chunk(
        key=key, member=member, version=1, tokens=np.array(tokens, np.int32),
        logprobs=np.zeros(len(tokens), np.float32), finish=finish,
    )  # fmt: skip


def test_all_phases_are_in_full_precision_unless_told() -> None:
    schedule = Schedule(Precision())
    assert schedule.describe() == "full" and schedule.mixes and not schedule.settings.uses_fp8


def test_it_falls_back_at_once_and_comes_back_after_versions_that_pass() -> None:
    schedule = Schedule(FP8)
    assert schedule.measured(1, 0.01) is None and schedule.of("decode") == "fp8"
    told = schedule.measured(2, 0.02)
    assert told == {"version": 2, "token_kl": 0.02, "bound": 0.01, "now": "full"}
    assert schedule.of("decode") == schedule.of("prefill") == "full"
    assert schedule.stats()["precision_bits/decode"] == 32 and schedule.stats()["fp8_token_kl_nats"] == 0.02
    assert schedule.measured(3, 0.001) is None
    assert schedule.measured(4, 0.5) is None
    assert schedule.measured(5, 0.001) is None and schedule.fallen
    told = schedule.measured(6, 0.001)
    assert told is not None and told["now"] == "prefill fp8, decode fp8, score full" and not schedule.fallen
    assert schedule.falls == 1 and schedule.stats()["precision_bits/decode"] == 8


@given(st.lists(st.sampled_from([0.0, 0.009, 0.011, float("nan"), float("inf")])), st.integers(1, 4))
def test_it_is_fallen_exactly_if_one_failed_and_not_enough_passed_since(found: list[float], recover: int) -> None:
    schedule = Schedule(Precision(decode="fp8", kl_bound=0.01, recover=recover))
    for version, token_kl in enumerate(found):
        schedule.measured(version, token_kl)
    wrong = [i for i, kl in enumerate(found) if not kl <= 0.01]
    assert schedule.fallen == (bool(wrong) and len(found) - 1 - wrong[-1] < recover)


def test_prefill_and_decode_share_a_pass_while_they_are_the_same() -> None:
    made, schedule = runner(Precision(decode="fp8", kl_bound=0.01))
    assert not made.mixes
    schedule.measured(1, 1.0)
    assert made.mixes


def test_each_phase_computes_in_its_own_precision() -> None:
    """The next token after three, by the runner's pages and by reading them anew."""
    text = [5, 1, 7, 2]
    for settings in (Precision(decode="fp8"), Precision(prefill="fp8"), FP8):
        made, _ = runner(settings)
        for tokens, decode, phase in ((text[:3], False, settings.prefill), (text, True, settings.decode)):
            found = made.run(one(tokens, decode=decode)).logits[0]
            if not decode or settings is FP8:  # else the keys before it are of the other precision
                torch.testing.assert_close(found, made.read([np.array(tokens)], phase)[-1], atol=1e-4, rtol=1e-4)
            other: Kind = "full" if phase == "fp8" else "fp8"
            assert float((found - made.read([np.array(tokens)], other)[-1]).abs().max()) > 1e-3
    made, schedule = runner()
    made.run(one(text[:3], decode=False))
    schedule.measured(1, 1.0)
    made.run(one(text[:3], decode=False))
    torch.testing.assert_close(made.run(one(text, decode=True)).logits[0], made.read([np.array(text)], "full")[-1])


def test_reading_is_what_the_training_model_says() -> None:
    made, _ = runner()
    model, sequences = Qwen3Moe(CONFIG, seed=3), [np.array([4, 4, 1]), np.array([9]), np.array([2, 0, 3, 3, 8])]
    with torch.no_grad():
        for sequence, rows in zip(sequences, made.read(sequences).split([3, 1, 5]), strict=True):
            tokens = torch.from_numpy(sequence)
            wanted = model.logits(model(tokens, torch.arange(len(tokens)), [len(tokens)]).hidden)
            torch.testing.assert_close(rows, wanted, atol=1e-4, rtol=1e-4)


def test_the_watch_measures_the_answers_that_began_first_when_all_have_ended() -> None:
    made, schedule = runner()
    watch = Watch(schedule, made.read)
    watch.begin([request(0), request(1)], version=1)
    watch.take([chunk(0, 1, [4, 5], "stop"), chunk(1, 0, [9, 9], "stop"), chunk(0, 0, [6])])
    assert watch.look(1) is None and schedule.token_kl is None
    watch.take([chunk(0, 0, [7, 8], "length")])
    watch.look(1)
    answers = [np.array([1, 2, 3, 4, 5]), np.array([1, 2, 3, 6, 7, 8])]
    total = 0.0
    for answer in answers:
        fp8, full = (made.read([answer], kind)[2:-1].double().softmax(-1) for kind in ("fp8", "full"))
        total += float((fp8 * (fp8 / full).log()).sum())
    assert schedule.token_kl == pytest.approx(total / 5, rel=1e-6) and total > 0
    watch.begin([request(2)], version=1)
    watch.take([chunk(2, 0, [1], "stop"), chunk(2, 1, [1], "stop")])
    schedule.token_kl = None
    assert watch.look(1) is None and schedule.token_kl is None  # once per version
    watch.begin([request(3)], version=2)
    watch.take([chunk(3, 0, [1], "stop"), chunk(3, 1, [1], "stop")])
    watch.look(2)
    assert schedule.token_kl is not None


def test_the_watch_waits_for_nothing_that_was_cancelled_and_counts_what_was_continued() -> None:
    made, schedule = runner()
    watch = Watch(schedule, made.read)
    watch.begin([request(0, 1, prefixes=[np.array([7, 7], np.int32)]), request(1, 1)], version=1)
    watch.cancel(1)
    watch.take([chunk(0, 0, [5], "stop")])
    watch.look(1)
    fp8, full = (made.read([np.array([1, 2, 3, 7, 7, 5])], k)[2:5].double().log_softmax(-1) for k in ("fp8", "full"))
    assert schedule.token_kl == pytest.approx(float((fp8.exp() * (fp8 - full)).sum(-1).mean()), rel=1e-6)


def test_weights_far_from_their_fp8_make_it_fall_back() -> None:
    """A bound below what rounding costs."""
    made, schedule = runner(Precision(prefill="fp8", decode="fp8", kl_bound=1e-9, sample=1))
    watch = Watch(schedule, made.read)
    watch.begin([request(0, 1)], version=4)
    watch.take([chunk(0, 0, [5, 6, 7], "length")])
    told = watch.look(4)
    assert told is not None and told["now"] == "full" and told["token_kl"] > 1e-9 and schedule.fallen


def test_the_fp8_job_is_the_default_one_but_for_what_it_says() -> None:
    default, fp8 = (load_job(ROOT / path) for path in ("cluster.toml", "bin/clusters/fp8.toml"))
    rl = replace(default.rl, correction="tis", truncation=2.0, max_staleness=1)
    assert (fp8.rl, fp8.model, fp8.task, fp8.sft) == (rl, default.model, default.task, default.sft)
    assert (fp8.algorithm, fp8.evaluation) == (default.algorithm, default.evaluation)
    mine, theirs = (job.cluster.actors["rollout"].instance for job in (fp8, default))
    assert isinstance(mine, Rollout) and isinstance(theirs, Rollout)
    assert mine.precision == Precision(prefill="fp8", decode="fp8", activations="fp8", kl_bound=1e-2)
    assert mine.num_slots == theirs.num_slots


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            'activations="fp8"',
            'activations: are "fp8", but no phase has FP8 weights to multiply them with; set prefill',
        ),
        ("kl_bound=0", "kl_bound: must be greater than 0, got 0"),
        ('decode="fp16"', "decode: must be 'full' or 'fp8', got \"fp16\""),
        ('decod="fp8"', 'decod: unknown key; did you mean "decode"?'),
    ],
)
def test_a_wrong_setting_is_one_clear_error(setting: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_job(ROOT / "cluster.toml", [f"actors.rollout.precision.{setting}"])
    assert message in str(caught.value) and "actors.rollout.precision" in str(caught.value)


def test_a_server_is_not_told_our_precision() -> None:
    settings = ['engine="openai"', 'base_url="http://127.0.0.1:1"', 'precision.decode="fp8"']
    with pytest.raises(ConfigError, match="precision is of our own engine; leave it out"):
        load_job(ROOT / "cluster.toml", [f"actors.rollout.{setting}" for setting in settings])
