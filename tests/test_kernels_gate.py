"""The gate's kernels on the CPU shim against plain torch, and the plain torch against finite differences."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from planted import plant
from shim import ShimBackend, needs_shim
from torch import Tensor

from headrace.kernels import gate, launch, reference
from headrace.kernels.gate import topk_gate

NAN, INF = math.nan, math.inf


class Case(NamedTuple):
    """A gate's input, drawn from a seed."""

    seed: int
    num_tokens: int
    num_experts: int
    k: int
    score: str
    biased: bool
    groups: int
    top_groups: int
    renormalize: bool
    scale: float
    half: bool
    values: str

    def logits(self) -> Tensor:
        random = torch.Generator().manual_seed(self.seed)
        shape = self.num_tokens, self.num_experts
        if self.values == "normal":
            logits = torch.randn(shape, generator=random)
        elif self.values == "steps":  # many are equal
            logits = torch.randint(-6, 7, shape, generator=random) / 2
        else:
            odd = torch.tensor([0.0, -0.0, 1.0, 1.0, INF, -INF, NAN, 1e38, -1e38])
            logits = odd[torch.randint(0, len(odd), shape, generator=random)]
        return logits.bfloat16() if self.half else logits

    def options(self) -> dict[str, Any]:
        random = torch.Generator().manual_seed(self.seed + 1)
        bias = torch.randint(-4, 5, (self.num_experts,), generator=random) / 4 if self.biased else None
        return {
            "renormalize": self.renormalize,
            "score": self.score,
            "bias_E": bias,
            "groups": self.groups,
            "top_groups": self.top_groups,
            "scale": self.scale,
        }

    def is_clear(self) -> bool:
        """Whether no choice hangs on the rounding of a sigmoid: what differs at all differs visibly."""
        if self.score == "softmax":
            return True
        options = self.options()
        choice = self.logits().double().sigmoid() + (0 if options["bias_E"] is None else options["bias_E"].double())
        size = self.num_experts // self.groups
        best = choice.reshape(self.num_tokens, self.groups, size).sort(-1, descending=True).values[:, :, :2].sum(-1)
        return all(_is_apart(scores) for scores in (choice, best))


def _is_apart(scores: Tensor) -> bool:
    gaps = scores.sort(-1).values.diff()
    return not bool(((gaps > 1e-12) & (gaps < 1e-5)).any())


@st.composite
def cases(draw: st.DrawFn, *, values: tuple[str, ...] = ("normal", "steps", "odd")) -> Case:
    num_experts = draw(st.one_of(st.integers(1, 40), st.sampled_from([60, 64, 100, 128]), st.integers(129, 512)))
    groups = draw(st.sampled_from([g for g in range(1, 33) if num_experts % g == 0]))
    top_groups = draw(st.integers(1, groups))
    k = draw(st.integers(1, min(32, num_experts // groups * top_groups)))
    score = draw(st.sampled_from(["softmax", "sigmoid"]))
    return Case(
        seed=draw(st.integers(0, 10**6)),
        num_tokens=draw(st.integers(0, 9)),
        num_experts=num_experts,
        k=k,
        score=score,
        biased=score == "sigmoid" and draw(st.booleans()),
        groups=groups,
        top_groups=top_groups,
        renormalize=draw(st.booleans()),
        scale=draw(st.sampled_from([1.0, 2.5])),
        half=draw(st.booleans()),
        values=draw(st.sampled_from(values)),
    )


def check(case: Case, schedule: int) -> None:
    logits, options = case.logits(), case.options()
    expected = reference.topk_gate(logits, case.k, **options)
    with launch.backend(ShimBackend(schedule)):
        got = topk_gate(logits, case.k, **options)
    assert torch.equal(got.ids_TK, expected.ids_TK)
    torch.testing.assert_close(got.weights_TK, expected.weights_TK, equal_nan=True)
    torch.testing.assert_close(got.probs_TE, expected.probs_TE, equal_nan=True)


@needs_shim
@pytest.mark.slow
@pytest.mark.timeout(400)  # on a machine that is busy with other things
@settings(max_examples=1000)
@given(cases(), st.integers(0, 99))
def test_kernel_is_the_reference(case: Case, schedule: int):
    assume(case.is_clear())
    check(case, schedule)


@needs_shim
@settings(max_examples=40)
@given(cases(), st.integers(0, 99))
@example(Case(0, 5, 128, 8, "softmax", False, 1, 1, True, 1.0, False, "steps"), 1)
@example(Case(0, 5, 256, 8, "sigmoid", True, 8, 4, True, 2.5, False, "steps"), 1)
@example(Case(0, 33, 128, 32, "softmax", False, 1, 1, True, 1.0, True, "odd"), 2)
@example(Case(0, 3, 512, 32, "softmax", False, 32, 2, False, 1.0, False, "odd"), 3)
@example(Case(0, 3, 1, 1, "softmax", False, 1, 1, True, 1.0, False, "normal"), 0)
def test_kernel_is_the_reference_in_some_cases(case: Case, schedule: int):
    assume(case.is_clear())
    for seed in range(schedule, schedule + 3):
        check(case, seed)


@needs_shim
@pytest.mark.slow
@pytest.mark.timeout(400)  # on a machine that is busy with other things
@settings(max_examples=1000)
@given(cases(values=("normal", "steps")), st.integers(0, 99), st.booleans())
def test_gradient_is_that_of_the_reference(case: Case, schedule: int, replay: bool):
    assume(case.is_clear())
    logits, options = case.logits().float().requires_grad_(), case.options()
    if replay:
        random = torch.Generator().manual_seed(case.seed)
        options["ids_TK"] = torch.randint(0, case.num_experts, (case.num_tokens, case.k), generator=random)
    expected = reference.topk_gate(logits, case.k, **options)
    along = torch.randn_like(expected.weights_TK), torch.randn_like(expected.probs_TE)
    (wanted,) = torch.autograd.grad((expected.weights_TK, expected.probs_TE), logits, along)
    with launch.backend(ShimBackend(schedule)):
        given_logits = logits.detach().to(torch.bfloat16 if case.half else torch.float32).requires_grad_()
        got = topk_gate(given_logits, case.k, **options)
        (grad,) = torch.autograd.grad((got.weights_TK, got.probs_TE), given_logits, along)
    if case.half:
        torch.testing.assert_close(grad, wanted.bfloat16(), atol=1e-2, rtol=2e-2)
    else:
        torch.testing.assert_close(grad, wanted, atol=2e-5, rtol=1e-4)


def some(num_tokens: int = 20, num_experts: int = 100) -> Tensor:
    return torch.randn(num_tokens, num_experts, generator=torch.Generator().manual_seed(5))


@needs_shim
def test_every_schedule_and_configuration_gives_the_same_bits():
    logits = some().requires_grad_()
    along = some(20, 8)

    def result(schedule: int, config: int) -> list[Tensor]:
        with (
            launch.backend(ShimBackend(schedule)),
            launch.picking(lambda spec, situation: spec.configs[config % len(spec.configs)]),
        ):
            chosen = topk_gate(logits, 8, renormalize=True)
            return [*chosen, *torch.autograd.grad(chosen.weights_TK, logits, along)]

    first = result(0, 0)
    for schedule in range(1, 100):
        assert all(torch.equal(a, b) for a, b in zip(first, result(schedule, schedule), strict=True))


@needs_shim
def test_planted_a_tie_that_goes_to_the_higher_id_is_seen(tmp_path, monkeypatch):
    case = Case(0, 5, 128, 8, "softmax", False, 1, 1, True, 1.0, False, "steps")
    check(case, 0)
    plant(monkeypatch, tmp_path, gate, "topk_gate.cu", "their_id < id", "their_id > id")
    with pytest.raises(AssertionError):
        check(case, 0)


@needs_shim
def test_planted_missing_barrier_is_seen(tmp_path, monkeypatch):
    case = Case(0, 5, 128, 8, "softmax", False, 1, 1, True, 1.0, False, "normal")
    plant(monkeypatch, tmp_path, gate, "topk_gate.cu", "__syncwarp(row.mask);", "")
    wrong = 0
    for schedule in range(1, 13):
        try:
            check(case, schedule)
        except AssertionError:
            wrong += 1
    assert wrong >= 6


@needs_shim
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_replay_repeats_a_choice(score: Any):
    logits = some()
    ids = torch.flip(topk_gate(logits, 4, renormalize=True, score=score).ids_TK, dims=[1])
    expected = reference.topk_gate(logits, 4, renormalize=True, score=score, ids_TK=ids)
    with launch.backend(ShimBackend(1)):
        got = topk_gate(logits, 4, renormalize=True, score=score, ids_TK=ids)
    assert torch.equal(got.ids_TK, ids)
    torch.testing.assert_close(got.weights_TK, expected.weights_TK)


@needs_shim
def test_without_probs_the_scores_are_not_written():
    logits = some().requires_grad_()
    full = topk_gate(logits, 4, renormalize=True)
    (wanted,) = torch.autograd.grad(full.weights_TK.square().sum(), logits)
    assert topk_gate(logits, 4, renormalize=True, probs=False).probs_TE.shape == (20, 0)
    with launch.backend(ShimBackend(1)):
        got = topk_gate(logits, 4, renormalize=True, probs=False)
        (grad,) = torch.autograd.grad(got.weights_TK.square().sum(), logits)
    assert got.probs_TE.shape == (20, 0)
    torch.testing.assert_close(grad, wanted)


def test_on_a_cpu_the_gate_is_the_reference_bit_by_bit():
    logits = some()
    for a, b in zip(
        topk_gate(logits, 8, renormalize=True), reference.topk_gate(logits, 8, renormalize=True), strict=True
    ):
        assert torch.equal(a, b)


def test_the_bias_moves_the_choice_and_not_the_weight():
    logits = torch.tensor([[2.0, 1.0, 0.0]])
    chosen = topk_gate(logits, 1, renormalize=False, score="sigmoid", bias_E=torch.tensor([0.0, 0.0, 5.0]))
    assert chosen.ids_TK.tolist() == [[2]]
    assert chosen.weights_TK.item() == 0.5


def test_groups_are_ranked_by_their_best_or_best_two():
    logits = torch.tensor([[3.0, -9.0, 2.0, 2.0, 1.0, 1.0]])
    best = topk_gate(logits, 2, renormalize=False, groups=3, top_groups=1)
    assert best.ids_TK.tolist() == [[0, 1]]
    best_two = topk_gate(logits, 2, renormalize=False, score="sigmoid", groups=3, top_groups=1)
    assert best_two.ids_TK.tolist() == [[2, 3]]


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("renormalize", [True, False])
def test_reference_gradient_is_that_of_finite_differences(score: Any, renormalize: bool):
    logits = some(4, 12).double().requires_grad_()

    def weights(logits: Tensor) -> tuple[Tensor, Tensor]:
        chosen = topk_gate(logits, 3, renormalize=renormalize, score=score, groups=4, top_groups=2, scale=1.5)
        return chosen.weights_TK, chosen.probs_TE

    assert torch.autograd.gradcheck(weights, logits)


LOGITS = some(3, 16)
IDS = torch.zeros(3, 2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("logits", "options", "message"),
    [
        (torch.zeros(3, 16, dtype=torch.int64), {}, "floating-point"),
        (LOGITS[0], {}, "shape"),
        (torch.zeros(3, 0), {}, "number of experts must be from 1 to 512, not 0"),
        (torch.zeros(3, 513), {}, "number of experts must be from 1 to 512, not 513"),
        (LOGITS, {"k": 0}, "k must be from 1 to 16, not 0"),
        (LOGITS, {"k": 17}, "k must be from 1 to 16, not 17"),
        (torch.zeros(3, 64), {"k": 33}, "k must be from 1 to 32, not 33"),
        (LOGITS, {"score": "tanh"}, "score"),
        (LOGITS, {"groups": 3}, "3 equal groups"),
        (LOGITS, {"groups": 4, "top_groups": 5}, "top_groups must be from 1 to 4"),
        (LOGITS, {"groups": 8, "top_groups": 1, "k": 3}, "only 2 experts"),
        (LOGITS.t().contiguous().t(), {}, "contiguous"),
        (LOGITS, {"bias_E": torch.zeros(16)}, "score='sigmoid'"),
        (LOGITS, {"score": "sigmoid", "bias_E": torch.zeros(15)}, "shape"),
        (LOGITS, {"score": "sigmoid", "bias_E": torch.zeros(16, dtype=torch.float64)}, "float32"),
        (LOGITS, {"score": "sigmoid", "bias_E": torch.zeros(16, device="meta")}, "meta"),
        (LOGITS, {"ids_TK": IDS.int()}, "int64"),
        (LOGITS, {"ids_TK": IDS[:2]}, "shape"),
        (LOGITS, {"ids_TK": IDS + 16}, r"ids_TK must be in \[0, 16\), not 16 to 16"),
        (LOGITS, {"ids_TK": IDS - 1}, r"ids_TK must be in \[0, 16\), not -1 to -1"),
    ],
)
def test_bad_input_is_refused_before_any_launch(logits: Tensor, options: dict[str, Any], message: str):
    shim = ShimBackend()
    with launch.backend(shim), pytest.raises(ValueError, match=message) as error:
        topk_gate(logits, **{"k": 2, "renormalize": True, **options})
    assert str(error.value).startswith("topk_gate: ") and not shim.launches


@needs_shim
def test_kernels_take_single_and_bfloat16_only():
    with launch.backend(ShimBackend()), pytest.raises(ValueError, match="logits_TE must be float32 or bfloat16"):
        topk_gate(LOGITS.half(), 2, renormalize=True)
