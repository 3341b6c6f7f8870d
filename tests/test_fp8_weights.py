"""Weights held in FP8: against torch._scaled_mm and ml_dtypes, row by row; what is quantized and what is not."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.actors.model.block import fuse, to_fp8
from headrace.actors.model.config import ModelConfig
from headrace.actors.model.linear import FEW_ROWS, ROWS_AT_ONCE, Fp8Weight, grouped_linear, linear, quantize
from headrace.actors.model.qwen3_moe import Qwen3Moe
from headrace.kernels.precision import fp8_quant, range_search

CONFIG = ModelConfig(
    vocab_size=11, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, num_experts=4,
    moe_intermediate_size=16, max_positions=64, initializer_range=0.2,
)  # fmt: skip


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=random) * torch.rand(*shape[:-1], 1, generator=random)


@settings(max_examples=20)
@given(st.integers(1, 9), st.integers(1, 5), st.integers(1, 5), st.integers(0, 99))
def test_a_product_is_what_scaled_mm_computes(tokens: int, rows: int, columns: int, seed: int) -> None:
    """Fp32 sums of products of e4m3 numbers, times both scales; sizes are multiples of 16, as that function wants."""
    x, w = drawn(tokens, 16 * columns, seed=seed), drawn(16 * rows, 16 * columns, seed=seed + 1)
    held = quantize(w, fp8_inputs=True)
    seen = fp8_quant(x, "row")
    wanted = torch._scaled_mm(
        seen.codes_RC, held.codes.t(), seen.scales, held.scales.t().contiguous(), out_dtype=torch.float32
    )
    torch.testing.assert_close(linear(x, held), wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


def test_values_are_codes_of_another_library_times_scales() -> None:
    w = drawn(2, 5, 40)
    held = quantize(w)
    codes = held.codes.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    assert held.values is not None
    np.testing.assert_array_equal(held.values.numpy(), codes * held.scales.numpy())
    error = (held.values - w).abs() / w.abs().amax(-1, keepdim=True)
    assert 0 < float(error.max()) < 2**-4  # half a step of three bits of mantissa, at most


def test_long_matrices_are_searched_in_parts_to_the_same_bits() -> None:
    w = drawn(2 * ROWS_AT_ONCE + 3, 12)
    held, whole = quantize(w), range_search(w)
    assert torch.equal(held.codes.view(torch.uint8), whole.codes_RC.view(torch.uint8))
    assert torch.equal(held.scales, whole.scales_R1)


@pytest.mark.parametrize("fp8_inputs", [False, True])
def test_experts_are_each_their_own_matrix(fp8_inputs: bool) -> None:
    w, x, ends = drawn(3, 6, 8), drawn(7, 8, seed=1), torch.tensor([2, 2, 7], dtype=torch.int32)
    held = quantize(w, fp8_inputs=fp8_inputs)
    parts = [linear(rows, quantize(m, fp8_inputs=fp8_inputs)) for rows, m in ((x[:2], w[0]), (x[2:], w[2]))]
    torch.testing.assert_close(grouped_linear(x, held, ends), torch.cat(parts))
    picked = held.experts(torch.tensor([2, 0, 0]))
    torch.testing.assert_close(linear(x, quantize(w[2])), grouped_linear(x, quantize(w[2:3]), ends[2:]))
    assert torch.equal(picked.codes[1].view(torch.uint8), held.codes[0].view(torch.uint8))
    assert picked.values is not None and held.values is not None and torch.equal(picked.values[0], held.values[2])


def test_products_without_emulation_take_the_codes() -> None:
    """What runs on CUDA with full activations, here on a CPU."""
    held = quantize(drawn(6, 8))
    bare = Fp8Weight(held.codes, held.scales, None, False)
    x = drawn(3, 8, seed=1)
    torch.testing.assert_close(linear(x, bare), linear(x, held))
    experts = quantize(drawn(2, 6, 8))
    bare = Fp8Weight(experts.codes, experts.scales, None, False)
    for rows in (2 * FEW_ROWS, 2 * FEW_ROWS + 1):
        x, ends = drawn(rows, 8, seed=2), torch.tensor([1, rows], dtype=torch.int32)
        torch.testing.assert_close(grouped_linear(x, bare, ends), grouped_linear(x, experts, ends))


def test_on_an_accelerator_fp8_activations_go_to_scaled_mm() -> None:
    """The branch that CUDA takes: this torch has the function for CPUs, too."""
    held = quantize(drawn(16, 32), fp8_inputs=True)
    bare = Fp8Weight(held.codes, held.scales, None, True)
    x = drawn(5, 32, seed=1)
    torch.testing.assert_close(linear(x, bare), linear(x, held), rtol=2**-7, atol=2**-7)  # it answers in bfloat16


def test_router_and_norms_are_left_alone() -> None:
    model = Qwen3Moe(CONFIG, seed=1)
    with torch.no_grad():
        layer = fuse(CONFIG, lambda name: model.get_parameter(f"model.layers.0.{name}"))
        held = to_fp8(layer, fp8_inputs=False)
    assert held.gate is layer.gate and held.qk_norm is layer.qk_norm
    assert all(isinstance(w, Fp8Weight) for w in (held.qkv, held.out, held.gate_up, held.down))
    assert to_fp8(held, fp8_inputs=False).qkv is held.qkv


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_refused(wrong: float) -> None:
    w = drawn(4, 8)
    w[2, 3] = wrong
    with pytest.raises(FloatingPointError, match="not finite"):
        quantize(w)
