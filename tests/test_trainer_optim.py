"""Muon's orthogonality, AdamW against its formula, schedules, and that bad gradients change nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from headrace.actors.model.config import ModelConfig
from headrace.actors.model.qwen3_moe import Qwen3Moe
from headrace.actors.trainer.optim import Optimizer, Schedule, is_hidden_matrix, orthogonalize

SETTINGS = {"learning_rate": 0.01, "muon_learning_rate": 0.02, "weight_decay": 0.1, "clip_norm": 1e9}


@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 3), st.integers(0, 99))
def test_orthogonalized_matrices_have_singular_values_near_one(rows: int, columns: int, num: int, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    rank = min(rows, columns)
    left = torch.linalg.qr(torch.randn(num, rows, rank, generator=random)).Q
    right = torch.linalg.qr(torch.randn(num, columns, rank, generator=random)).Q
    values = 0.1 + 5 * torch.rand(num, 1, rank, generator=random)
    result = orthogonalize(left * values @ right.mT)
    torch.testing.assert_close(torch.linalg.svdvals(result), torch.ones(num, rank), atol=0.35, rtol=0)
    core = left.mT @ result @ right  # the singular vectors stay
    torch.testing.assert_close(core, core.diagonal(dim1=-2, dim2=-1).diag_embed(), atol=1e-3, rtol=0)


def test_each_matrix_of_a_stack_is_orthogonalized_alone_and_zero_stays_zero() -> None:
    stack = torch.randn(4, 6, 3, generator=torch.Generator().manual_seed(0))
    stack[1] = 0
    result = orthogonalize(stack)
    assert result[1].abs().max() == 0
    for matrix, expected in zip(stack, result, strict=True):
        torch.testing.assert_close(orthogonalize(matrix), expected)
    torch.testing.assert_close(orthogonalize(stack * 1e-6), result, atol=1e-4, rtol=0)


def test_muon_takes_hidden_matrices_and_adamw_the_rest() -> None:
    model = Qwen3Moe(ModelConfig(hidden_size=16, head_dim=8, moe_intermediate_size=8, num_layers=1))
    hidden = {name for name, p in model.named_parameters() if is_hidden_matrix(name, p)}
    prefix = "model.layers.0."
    assert hidden == {
        *(f"{prefix}self_attn.{name}_proj.weight" for name in "qkvo"),
        f"{prefix}mlp.experts.gate_up_proj",
        f"{prefix}mlp.experts.down_proj",
    }


def test_two_steps_equal_the_formulas() -> None:
    random = torch.Generator().manual_seed(0)
    matrix = nn.Parameter(torch.randn(2, 8, 4, generator=random))
    norm = nn.Parameter(torch.randn(5, generator=random))
    optimizer = Optimizer({"experts.up": matrix, "norm": norm}.items(), **SETTINGS)
    expected_matrix, expected_norm = matrix.detach().clone(), norm.detach().clone()
    momentum, first, second = torch.zeros(2, 8, 4), torch.zeros(5), torch.zeros(5)
    for step, scale in enumerate((0.5, 1.0), start=1):
        g, h = torch.randn(2, 8, 4, generator=random), torch.randn(5, generator=random)
        matrix.grad, norm.grad = g.clone(), h.clone()
        total = optimizer.step(scale)
        assert total == pytest.approx(float((g.square().sum() + h.square().sum()).sqrt()))
        momentum = 0.95 * momentum + 0.05 * g
        expected_matrix *= 1 - 0.02 * scale * 0.1
        expected_matrix -= 0.02 * scale * 2**0.5 * orthogonalize(0.05 * g + 0.95 * momentum)
        first, second = 0.9 * first + 0.1 * h, 0.95 * second + 0.05 * h.square()
        expected_norm *= 1 - 0.01 * scale * 0.1
        expected_norm -= 0.01 * scale * first / (1 - 0.9**step) / ((second / (1 - 0.95**step)).sqrt() + 1e-8)
        torch.testing.assert_close(matrix.detach(), expected_matrix)
        torch.testing.assert_close(norm.detach(), expected_norm)
        assert matrix.grad is None and norm.grad is None


def test_long_gradients_are_scaled_down_to_the_clip_norm() -> None:
    def move(size: float, clip: float) -> torch.Tensor:
        weight = nn.Parameter(torch.zeros(3))
        optimizer = Optimizer([("norm", weight)], **(SETTINGS | {"clip_norm": clip, "weight_decay": 0.0}))
        for gradient in ([1.0, 2.0, 2.0], [2.0, 1.0, -2.0]):
            weight.grad = size * torch.tensor(gradient)
            assert optimizer.step(1.0) == pytest.approx(3 * size)
        return weight.detach()

    torch.testing.assert_close(move(1.0, 1.0), move(50.0, 1.0))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(bad: float) -> None:
    matrix, norm = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))
    optimizer = Optimizer({"up": matrix, "norm": norm}.items(), **SETTINGS)
    matrix.grad, norm.grad = torch.ones(2, 2), torch.ones(2)
    optimizer.step(1.0)
    before, weights = optimizer.state(), (matrix.detach().clone(), norm.detach().clone())
    matrix.grad, norm.grad = torch.ones(2, 2), torch.tensor([1.0, bad])
    with pytest.raises(FloatingPointError, match="no weight was changed"):
        optimizer.step(1.0)
    assert torch.equal(matrix, weights[0]) and torch.equal(norm, weights[1])
    after = optimizer.state()
    assert all(np.array_equal(before[key], after[key]) for key in before)
    assert matrix.grad is None and norm.grad is None


def test_state_of_other_settings_is_refused() -> None:
    def optimizer(size: int, muon: float) -> Optimizer:
        weight, norm = nn.Parameter(torch.ones(size, 2)), nn.Parameter(torch.ones(2))
        made = Optimizer({"up": weight, "norm": norm}.items(), **(SETTINGS | {"muon_learning_rate": muon}))
        weight.grad, norm.grad = torch.ones(size, 2), torch.ones(2)
        made.step(1.0)
        return made

    with pytest.raises(ValueError, match="other settings"):
        optimizer(2, 0.0).load_state(optimizer(2, 0.1).state())
    with pytest.raises(ValueError, match="other settings"):
        optimizer(2, 0.1).load_state(optimizer(2, 0.0).state())
    with pytest.raises(ValueError, match="another model"):
        optimizer(2, 0.1).load_state(optimizer(3, 0.1).state())


def test_schedule_rises_stays_and_falls() -> None:
    scale = Schedule(steps=100, warmup_steps=10, decay_ratio=0.4, final_ratio=0.1).scale
    assert [round(scale(step), 6) for step in (0, 4, 9, 10, 60, 80, 100, 500)] == [0.1, 0.5, 1, 1, 1, 0.55, 0.1, 0.1]
    constant = Schedule(steps=10, warmup_steps=0, decay_ratio=0.0, final_ratio=0.5).scale
    assert {constant(step) for step in range(12)} == {1.0}
