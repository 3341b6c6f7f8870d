"""FP8 weights by search and by error feedback: what they win on layers with outliers, and how bin/bench fp8 looks."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from headrace.actors.model.config import ModelConfig
from headrace.actors.model.qwen3_moe import Qwen3Moe
from headrace.kernels.feedback import error_feedback
from headrace.kernels.precision import range_search

sys.path.append(str(Path(__file__).parent / "bench"))
from _fp8_layers import FIXTURES, Fixture, error_ratio, make
from _fp8_model import (
    Moments,
    Policy,
    by_amax,
    by_feedback,
    by_search,
    divergence,
    router_agreement,
    run,
)


@pytest.mark.parametrize("fixture", FIXTURES, ids=lambda fixture: fixture.name)
def test_search_and_feedback_beat_row_amax_on_outliers(fixture: Fixture) -> None:
    layer = make(fixture, 11)
    plain = by_amax(layer.weight, layer.moments())
    searched, fed_back = (error_ratio(layer, quantizer, plain) for quantizer in (by_search, by_feedback))
    assert searched <= 0.85
    assert fed_back <= 0.75
    assert fed_back < searched


def test_feedback_is_what_gptq_does_column_by_column() -> None:
    """Against the update that GPTQ starts from: fix one column, spread its error over the rest by the inverse Hessian
    of what is left, go on."""
    random = torch.Generator().manual_seed(0)
    w = torch.randn(5, 140, generator=random)
    x = torch.randn(400, 140, generator=random) @ torch.randn(140, 140, generator=random)
    moments = x.t() @ x / len(x)
    found = error_feedback(w, moments, damping=0.01)
    hessian = moments.double() + 0.01 * moments.double().diagonal().mean() * torch.eye(140)
    left, codes = w.double(), torch.empty(5, 140, dtype=torch.float64)
    for column in range(140):
        scale = found.encode_R1.double()
        code = (left[:, :1] / scale).clamp(-448, 448).float().to(torch.float8_e4m3fn).double()
        codes[:, column : column + 1] = code
        inverse = torch.linalg.inv(hessian[column:, column:])
        left = (left - (left[:, :1] - code * scale) * inverse[:1] / inverse[0, 0])[:, 1:]
    assert (found.codes_RC.double() == codes).double().mean() > 0.99  # ties go either way


def test_feedback_without_correlation_is_plain_search() -> None:
    w = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    assert torch.equal(
        error_feedback(w, torch.eye(40)).codes_RC.view(torch.uint8), range_search(w).codes_RC.view(torch.uint8)
    )


def test_inputs_that_are_always_zero_leave_their_columns_alone() -> None:
    w = torch.randn(4, 20, generator=torch.Generator().manual_seed(0))
    moments = torch.eye(20)
    moments[7, 7] = 0.0
    found = error_feedback(w, moments)
    plain = range_search(w, moments.diagonal().contiguous())
    assert torch.equal(found.codes_RC.view(torch.uint8), plain.codes_RC.view(torch.uint8))
    assert error_feedback(w, torch.zeros(20, 20)).scales_R1.isfinite().all()


def test_feedback_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"moments_CC must be \[3, 3\] for weights \[2, 3\], got \[2, 2\]"):
        error_feedback(torch.ones(2, 3), torch.eye(2))
    with pytest.raises(ValueError, match="must be finite"):
        error_feedback(torch.ones(2, 3), torch.full((3, 3), torch.nan))


def test_the_benchmark_meets_every_product_of_the_model() -> None:
    config = ModelConfig(hidden_size=32, num_heads=2, num_kv_heads=1, head_dim=16, num_experts=4, vocab_size=20)
    model = Qwen3Moe(config, seed=3)
    random = torch.Generator().manual_seed(0)
    sequences = [torch.randint(0, 20, (n,), generator=random) for n in (5, 9, 3)]
    with torch.no_grad():
        positions = torch.cat([torch.arange(len(s)) for s in sequences])
        out = model(torch.cat(sequences), positions, [len(s) for s in sequences])
        plain = model.logits(out.hidden).log_softmax(-1)

    observed = Moments(config.num_layers)
    torch.testing.assert_close(run(model, sequences, observed), plain)
    moments = observed.means()
    assert moments["1.gate_up"].shape == (4, 32, 32) and moments["head"].shape == (1, 32, 32)

    exact = Policy(config.num_layers)
    wanted = run(model, sequences, exact)
    torch.testing.assert_close(wanted, plain, atol=0.02, rtol=0.02)
    touched = Policy(config.num_layers, lambda w, m: torch.zeros_like(w), moments)
    moved = run(model, sequences, touched)
    assert divergence(wanted, moved).max() > 1e-4
    searched = run(model, sequences, Policy(config.num_layers, by_search, moments, fp8_inputs=True))
    assert 0 < divergence(wanted, searched).mean() < divergence(wanted, moved).mean()
    assert router_agreement(exact.router, exact.router, 2) == 1.0
    one, other = [torch.tensor([[3.0, 2, 1, 0]])], [torch.tensor([[3.0, 0, 1, 2]])]
    assert router_agreement(one, other, 2) == 0.5
