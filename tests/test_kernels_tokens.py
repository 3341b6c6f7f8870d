"""Log-probabilities and sampling on the CPU shim against float64, closed forms, published numbers and statistics."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import plant
from scipy import stats
from shim import KernelFault, ShimBackend, needs_shim
from torch import Tensor

from headrace.actors import philox as actors_philox
from headrace.kernels import launch, reference
from headrace.kernels import tokens as kernels
from headrace.kernels.reference.tokens import philox4x32
from headrace.kernels.tokens import sample_logprob, token_logprob

NAN, INF = math.nan, math.inf


@contextmanager
def shim(schedule: int, block: int = 128) -> Iterator[None]:
    with launch.backend(ShimBackend(schedule)), launch.picking(lambda spec, situation: {"BLOCK": block}):
        yield


class Case(NamedTuple):
    """Rows of logits within +-30, drawn from a seed; some tokens may be forbidden."""

    seed: int
    num_rows: int
    vocabulary: int
    temperature: float
    half: bool
    forbidden: bool
    spread: float

    def logits(self) -> Tensor:
        random = self.random()
        shape = self.num_rows, self.vocabulary
        logits = (torch.randn(shape, generator=random) * self.spread).clamp(-30, 30)
        if self.forbidden:
            barred = torch.rand(shape, generator=random) < 0.5
            barred[:, self.seed % self.vocabulary] = False
            logits[barred] = -INF
        return logits.bfloat16() if self.half else logits

    def tokens(self) -> Tensor:
        return torch.multinomial(self.logits().float().softmax(-1), 1, generator=self.random()).squeeze(1)

    def random(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)


case_strategy = st.builds(
    Case,
    seed=st.integers(0, 10**6),
    num_rows=st.sampled_from([1, 1, 1, 1, 1, 1, 1, 3]),
    vocabulary=st.one_of(st.integers(1, 70), st.integers(1, 70), st.integers(1, 600), st.sampled_from([1024, 4097])),
    temperature=st.sampled_from([1.0, 0.7, 2.0]),
    half=st.booleans(),
    forbidden=st.booleans(),
    spread=st.sampled_from([0.0, 1.0, 10.0]),
)


def check_logprob(case: Case, schedule: int) -> None:
    logits, tokens = case.logits().requires_grad_(), case.tokens()
    wide = logits.detach().double().requires_grad_()
    expected = reference.token_logprob(wide, tokens, temperature=case.temperature)
    along = torch.randn(2, case.num_rows, generator=case.random())
    (wanted,) = torch.autograd.grad(expected[:2], wide, tuple(along.double()))
    with shim(schedule):
        got = token_logprob(logits, tokens, temperature=case.temperature)
        (grad,) = torch.autograd.grad(got[:2], logits, tuple(along))
    torch.testing.assert_close(got.logprobs_N.double(), expected.logprobs_N, atol=1e-5, rtol=0)
    torch.testing.assert_close(got.entropies_N.double(), expected.entropies_N, atol=1e-5, rtol=0)
    assert (got.logprobs_N <= 0).all()
    best = logits.detach().float() * (1 / case.temperature)
    assert got.best_N.tolist() == [int((row == row.max()).nonzero()[0]) for row in best]
    torch.testing.assert_close(grad.double(), wanted, atol=1e-5, rtol=2.0**-7 if case.half else 1e-4)


@needs_shim
@pytest.mark.slow
@pytest.mark.timeout(400)  # on a machine that is busy with other things
@settings(max_examples=1000)
@given(case_strategy, st.integers(0, 99))
def test_logprob_entropy_and_gradient_are_those_of_float64(case: Case, schedule: int):
    check_logprob(case, schedule)


SOME = Case(3, 2, 1001, 0.7, False, False, 3.0)


@needs_shim
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("vocabulary", [1, 8, 1001, 4104])
def test_logprob_on_adversarial_schedules(half: bool, vocabulary: int):
    for schedule in range(1, 4):
        check_logprob(SOME._replace(half=half, vocabulary=vocabulary), schedule)


@needs_shim
@pytest.mark.slow
@pytest.mark.parametrize("vocabulary", [129_920, 151_936, 151_937])
@pytest.mark.parametrize("half", [False, True])
def test_real_vocabularies(vocabulary: int, half: bool):
    check_logprob(Case(1, 1, vocabulary, 1.0, half, False, 10.0), 1)


@needs_shim
def test_planted_tokens_of_padding_are_seen(tmp_path, monkeypatch):
    """The tail of the last chunk counted as logits of 0, as happened to others: probability for nobody."""
    case = SOME._replace(spread=0.0)
    check_logprob(case, 1)
    plant(monkeypatch, tmp_path, kernels, "online_softmax.cuh", "aligned, -infinity())", "aligned, 0.0f)")
    with pytest.raises(AssertionError):
        check_logprob(case, 1)


@needs_shim
@pytest.mark.parametrize("right", ["exp_below(distance);", "mass += weight;"])
def test_planted_positive_logprobs_are_seen(right: str, tmp_path, monkeypatch):
    check_logprob(SOME, 1)
    plant(
        monkeypatch,
        tmp_path,
        kernels,
        "online_softmax.cuh",
        right,
        right.replace("distance", "distance - 1").replace("weight", "weight / 2"),
    )
    with pytest.raises(AssertionError):
        check_logprob(SOME, 1)


@needs_shim
def test_planted_missing_barrier_is_seen(tmp_path, monkeypatch):
    plant(monkeypatch, tmp_path, kernels, "online_softmax.cuh", "__syncthreads();", "")
    wrong = 0
    for schedule in range(1, 13):
        try:
            check_logprob(SOME, schedule)
        except (AssertionError, KernelFault):
            wrong += 1
    assert wrong >= 6


def check_last_of_many_rows() -> None:
    """Its logits begin past 2**31 elements; only its block runs."""
    logits = torch.empty(2**31 // 2048 + 2, 2048, dtype=torch.bfloat16)
    logits[-1] = torch.arange(2048) % 7
    tokens = torch.full((len(logits),), 5)
    with launch.backend(ShimBackend(only_blocks=lambda blocks: [blocks - 1], limit_s=60)):
        got = token_logprob(logits, tokens)
    expected = reference.token_logprob(logits[-1:], tokens[-1:])
    torch.testing.assert_close(got.logprobs_N[-1:], expected.logprobs_N, atol=1e-5, rtol=0)


@needs_shim
def test_rows_have_offsets_of_64_bits():
    check_last_of_many_rows()


@needs_shim
def test_planted_offsets_of_32_bits_are_seen(tmp_path, monkeypatch):
    plant(monkeypatch, tmp_path, kernels, "token_logprob.cu", "logits + n * V", "logits + int(n) * int(V)")
    with pytest.raises(KernelFault, match="overflow"):
        check_last_of_many_rows()


@needs_shim
def test_every_schedule_block_and_batch_gives_the_same_bits():
    logits = SOME._replace(num_rows=3).logits().requires_grad_()
    tokens = torch.tensor([1, 2, 3])
    draw = {"seed": 5, "ordinals_N": torch.tensor([1, 2**40, -3]), "steps_N": torch.tensor([0, 9, 2])}
    temperatures = torch.tensor([1.0, 0.5, 2.0])

    def result(schedule: int, order: list[int]) -> list[Tensor]:
        x = logits[order].detach().requires_grad_()
        with shim(schedule, (128, 256, 512)[schedule % 3]):
            got = token_logprob(x, tokens[order], temperature=0.7)
            (grad,) = torch.autograd.grad(got[:2], x, (torch.ones(len(order)), torch.ones(len(order))))
            at = {"seed": 5, "ordinals_N": draw["ordinals_N"][order], "steps_N": draw["steps_N"][order]}
            return [*got, grad, *sample_logprob(logits[order].detach(), temperatures[order], **at)]

    first = result(0, [0, 1, 2])
    for schedule in range(1, 100):
        order = [[0, 1, 2], [2, 0], [1], [1, 1, 0, 2]][schedule % 4] if schedule % 10 == 0 else [schedule % 3]
        assert all(torch.equal(a[order], b) for a, b in zip(first, result(schedule, order), strict=True))


@needs_shim
def test_the_gradient_may_overwrite_the_logits_once():
    logits, tokens = SOME.logits(), SOME.tokens()
    leaf = logits.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(reference.token_logprob(leaf, tokens).logprobs_N.sum(), leaf)
    with shim(1):
        given = leaf * 1.0
        address = given.data_ptr()
        seen: list[int] = []
        given.register_hook(lambda grad: seen.append(grad.data_ptr()))
        loss = token_logprob(given, tokens, overwrite=True).logprobs_N.sum()
        (grad,) = torch.autograd.grad(loss, leaf, retain_graph=True)
        torch.testing.assert_close(grad, wanted, atol=1e-6, rtol=1e-4)
        assert seen == [address]
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(loss, leaf)


ODD_ROWS = torch.tensor([[0.0, NAN, 1.0], [0.0, INF, 1.0], [-INF, -INF, -INF], [-INF, 2.0, -INF], [3e38, -3e38, 0.0]])


@needs_shim
def test_what_is_not_a_number_gives_nan_and_what_is_forbidden_gives_nothing():
    tokens = torch.tensor([0, 1, 2, 1, 0])
    expected = reference.token_logprob(ODD_ROWS, tokens)
    with shim(1):
        got = token_logprob(ODD_ROWS, tokens)
        forbidden = token_logprob(ODD_ROWS[3:4], torch.tensor([0]))
    torch.testing.assert_close(got.logprobs_N, expected.logprobs_N, equal_nan=True)
    torch.testing.assert_close(got.entropies_N[3:], torch.zeros(2))
    assert got.logprobs_N.isnan().tolist() == [True, True, True, False, False]
    assert got.entropies_N[:3].isnan().all()
    assert ((0 <= got.best_N) & (got.best_N < 3)).all()
    assert forbidden.logprobs_N.item() == -INF


def test_entropy_of_equal_logits_is_the_log_of_their_number():
    got = token_logprob(torch.zeros(1, 1000), torch.tensor([7]))
    assert got.entropies_N.item() == pytest.approx(math.log(1000))
    assert got.logprobs_N.item() == pytest.approx(-math.log(1000))


def test_reference_gradient_is_that_of_finite_differences():
    logits = torch.randn(3, 9, dtype=torch.float64, generator=SOME.random()).requires_grad_()
    tokens = torch.tensor([0, 4, 8])
    assert torch.autograd.gradcheck(lambda x: token_logprob(x, tokens, temperature=0.7)[:2], logits)


# Sampling


def asked(num_rows: int, seed: int = 0) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    return {
        "ordinals_N": torch.randint(-(2**62), 2**62, (num_rows,), generator=random),
        "steps_N": torch.randint(0, 2**31, (num_rows,), generator=random),
    }


def check_sample(case: Case, schedule: int) -> None:
    logits, random = case.logits(), case.random()
    temperatures = torch.tensor([1.0, 0.0, 0.3, 4.0])[torch.randint(0, 4, (case.num_rows,), generator=random)]
    draw = dict(seed=case.seed, **asked(case.num_rows, case.seed))
    expected = reference.sample_logprob(logits, temperatures, **draw)
    with shim(schedule):
        got = sample_logprob(logits, temperatures, **draw)
    if not torch.equal(got.tokens_N, expected.tokens_N):
        # Rounding decided between two scores: a change of the temperature in its last bits must decide likewise.
        nearby = [
            reference.sample_logprob(logits, temperatures * (1 + sign * 2e-7), **draw).tokens_N for sign in range(-3, 4)
        ]
        assert all(any(token == near[n] for near in nearby) for n, token in enumerate(got.tokens_N))
    at = torch.where(temperatures == 0, 1.0, temperatures)
    distribution = (logits.double() / at.double().unsqueeze(1)).log_softmax(-1)
    exact = distribution.gather(1, got.tokens_N.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(got.logprobs_N.double(), exact, atol=2e-5, rtol=1e-6)
    assert (got.logprobs_N <= 0).all() and got.logprobs_N.isfinite().all()
    torch.testing.assert_close(got.entropies_N, expected.entropies_N, atol=2e-5, rtol=1e-5)


@needs_shim
@pytest.mark.slow
@pytest.mark.timeout(400)  # on a machine that is busy with other things
@settings(max_examples=1000)
@given(case_strategy, st.integers(0, 99))
def test_sample_is_the_reference(case: Case, schedule: int):
    check_sample(case, schedule)


@needs_shim
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("vocabulary", [1, 19, 4104, 9001])
def test_sample_on_adversarial_schedules(half: bool, vocabulary: int):
    for schedule in range(1, 4):
        check_sample(SOME._replace(half=half, vocabulary=vocabulary), schedule)


@needs_shim
@pytest.mark.slow
def test_sample_from_a_real_vocabulary():
    check_sample(Case(1, 1, 151_937, 1.0, True, False, 3.0), 1)


@needs_shim
def test_planted_use_of_the_row_instead_of_the_ordinal_is_seen(tmp_path, monkeypatch):
    plant(
        monkeypatch, tmp_path, kernels, "sample_logprob.cu", "(unsigned long long)ordinals[n]", "(unsigned long long)n"
    )
    with pytest.raises(AssertionError):
        test_every_schedule_block_and_batch_gives_the_same_bits()


@needs_shim
def test_a_row_that_has_no_distribution_gives_nan_and_a_token_of_the_vocabulary():
    temperatures = torch.tensor([1.0, 1.0, 1.0, 0.0, -1.0, NAN])
    logits = torch.cat((ODD_ROWS[:3], ODD_ROWS[:1], ODD_ROWS[4:], ODD_ROWS[4:]))
    with shim(1):
        got = sample_logprob(logits, temperatures, seed=1, **asked(6))
    plain = sample_logprob(logits, temperatures, seed=1, **asked(6))
    for sample in (got, plain):
        assert sample.logprobs_N.isnan().all()
        assert ((0 <= sample.tokens_N) & (sample.tokens_N < 3)).all()


def test_temperature_0_takes_the_likeliest_and_of_equals_the_lowest():
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0]])
    sample = sample_logprob(logits, torch.zeros(1), seed=1, **asked(1))
    assert sample.tokens_N.item() == 1
    assert sample.logprobs_N.item() == pytest.approx(float(logits.log_softmax(-1)[0, 1]))


@pytest.mark.parametrize("vocabulary", [7, 40, 5000])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_tokens_are_drawn_as_often_as_they_should(vocabulary: int, temperature: float):
    logits = torch.randn(vocabulary, generator=SOME.random()) * 2
    logits[::5] = -INF
    num = 6_000 if vocabulary < 100 else 3_000
    rows = logits.expand(num, -1).contiguous()
    draw = {"seed": 11, "ordinals_N": torch.arange(num) // 100, "steps_N": torch.arange(num) % 100}
    tokens = sample_logprob(rows, torch.full((num,), temperature), **draw).tokens_N
    expected = num * (logits / temperature).double().softmax(-1)
    order = expected.argsort(descending=True)
    common = order[expected[order] >= 5]
    seen = torch.bincount(tokens, minlength=vocabulary).double()
    rest = [float(x.sum() - x[common].sum()) for x in (seen, expected)]
    seen_all = np.array([*seen[common].tolist(), rest[0]])
    expected_all = np.array([*expected[common].tolist(), rest[1]])
    keep = expected_all > 1e-9
    assert seen[logits == -INF].sum() == 0
    assert stats.chisquare(seen_all[keep], expected_all[keep] * seen_all.sum() / expected_all.sum()).pvalue > 1e-4


def test_draws_of_other_steps_ordinals_and_seeds_are_others():
    logits = torch.zeros(1, 10_000)
    draws = [(1, 1, 1), (2, 1, 1), (1 + 2**32, 1, 1), (1, 2, 1), (1, 1 + 2**32, 1), (1, -1, 1), (1, 1, 2)]
    tokens = {
        int(
            sample_logprob(
                logits, torch.ones(1), seed=s, ordinals_N=torch.tensor([o]), steps_N=torch.tensor([t])
            ).tokens_N
        )
        for s, o, t in draws
    }
    assert len(tokens) == len(draws)


ONES = 0xFFFFFFFF
PI = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ONES, ONES, ONES, ONES), (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (PI, (0xA4093822, 0x299F31D0), (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ],
)
def test_philox_gives_the_answers_that_its_authors_published(counter, key, expected):
    words = philox4x32(tuple(torch.tensor([word]) for word in counter), key)
    assert tuple(int(word) for word in words) == expected


@given(st.lists(st.integers(0, ONES), min_size=4, max_size=4), st.integers(0, ONES), st.integers(0, ONES))
def test_philox_is_that_of_the_actors(counter: list[int], k0: int, k1: int):
    theirs = actors_philox.philox4x32(tuple(np.array([word], np.uint64) for word in counter), (k0, k1))
    ours = philox4x32(tuple(torch.tensor([word]) for word in counter), (k0, k1))
    assert [int(word) for word in ours] == [int(word[0]) for word in theirs]


LOGITS, TOKENS = torch.zeros(3, 8), torch.tensor([0, 1, 7])
DRAW = {"seed": 1, "ordinals_N": TOKENS, "steps_N": TOKENS}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: token_logprob(LOGITS.long(), TOKENS), "logits_NV must be floating-point"),
        (lambda: token_logprob(LOGITS[0], TOKENS), "logits_NV must have the shape"),
        (lambda: token_logprob(LOGITS[:, :0], TOKENS), "the vocabulary must be from 1"),
        (lambda: token_logprob(LOGITS[:, :5], TOKENS), "contiguous"),
        (lambda: token_logprob(LOGITS, TOKENS[:2]), "tokens_N must have the shape"),
        (lambda: token_logprob(LOGITS, TOKENS.int()), "tokens_N must be int64"),
        (lambda: token_logprob(LOGITS, TOKENS + 1), r"tokens_N must be in \[0, 8\), not 1 to 8"),
        (lambda: token_logprob(LOGITS, TOKENS - 1), r"tokens_N must be in \[0, 8\), not -1 to 6"),
        (lambda: token_logprob(LOGITS, TOKENS.to("meta")), "tokens_N is on meta"),
        (lambda: token_logprob(LOGITS, TOKENS, temperature=0.0), "temperature must be above 0, not 0.0"),
        (lambda: token_logprob(LOGITS, TOKENS, temperature=NAN), "temperature must be above 0, not nan"),
        (lambda: sample_logprob(LOGITS, torch.ones(2), **DRAW), "temperatures_N must have the shape"),
        (lambda: sample_logprob(LOGITS, torch.ones(3).double(), **DRAW), "temperatures_N must be float32"),
        (lambda: sample_logprob(LOGITS, torch.ones(3), **{**DRAW, "steps_N": TOKENS.int()}), "steps_N must be int64"),
        (lambda: sample_logprob(LOGITS, torch.ones(3), **{**DRAW, "ordinals_N": TOKENS[:1]}), "ordinals_N must have"),
    ],
)
def test_bad_input_is_refused_before_any_launch(call: Callable[[], object], message: str):
    backend = ShimBackend()
    with launch.backend(backend), pytest.raises(ValueError, match=message):
        call()
    assert not backend.launches


@needs_shim
def test_no_rows_and_other_formats():
    with launch.backend(ShimBackend()):
        assert token_logprob(LOGITS[:0], TOKENS[:0]).logprobs_N.shape == (0,)
        none = {name: value[:0] if isinstance(value, Tensor) else value for name, value in DRAW.items()}
        assert sample_logprob(LOGITS[:0], torch.ones(0), **none).tokens_N.shape == (0,)
        with pytest.raises(ValueError, match="logits_NV must be float32 or bfloat16"):
            token_logprob(LOGITS.half(), TOKENS)
