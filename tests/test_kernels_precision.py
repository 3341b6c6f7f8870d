"""FP8 quantization: against ml_dtypes and plain float64, and its kernels, on the CPU shim, against plain torch."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import plant
from shim import KernelFault, ShimBackend, needs_shim
from torch import Tensor

from headrace.kernels import launch, precision, reference
from headrace.kernels.precision import BLOCKS, amax_scales, fp8_dequant, fp8_quant, range_search
from headrace.kernels.reference.precision import NUM_CANDIDATES, Block

F32, BF16 = torch.float32, torch.bfloat16
STRANGE = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-38, -1e-44, 3e38, 448.1, 1000.0])


class Matrix(NamedTuple):
    """Some numbers, drawn from a seed."""

    seed: int
    rows: int
    columns: int
    spread: float
    """Of the exponents."""
    strange: int
    """Numbers replaced by some of STRANGE."""
    dtype: torch.dtype

    def make(self) -> Tensor:
        random = torch.Generator().manual_seed(self.seed)
        shape = (self.rows, self.columns)
        x = torch.randn(shape, generator=random) * torch.exp(self.spread * torch.randn(shape, generator=random))
        for _ in range(self.strange if self.rows else 0):
            row, column, which = (int(torch.randint(0, n, (), generator=random)) for n in (*shape, len(STRANGE)))
            x[row, column] = STRANGE[which]
        return x.to(self.dtype)


def matrices(max_rows: int) -> st.SearchStrategy[Matrix]:
    return st.builds(
        Matrix,
        seed=st.integers(0, 10**6),
        rows=st.integers(0, max_rows),
        columns=st.one_of(st.integers(1, 40), st.sampled_from([127, 128, 129, 256, 260])),
        spread=st.sampled_from([0.0, 1.0, 8.0]),
        strange=st.sampled_from([0, 0, 1, 5]),
        dtype=st.sampled_from([F32, BF16]),
    )


def assert_same_bits(mine: tuple[Tensor, ...], right: tuple[Tensor, ...]) -> None:
    for a, b in zip(mine, right, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert torch.equal(*(x.contiguous().flatten().view(torch.uint8) for x in (a, b)))


def every_bf16() -> Tensor:
    return torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(BF16).reshape(512, 128)


# What the operations mean -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", [False, pytest.param(True, marks=needs_shim)])
@pytest.mark.parametrize("block", BLOCKS)
def test_every_bf16_number_is_cast_as_ml_dtypes_casts_it(block: Block, kernel: bool) -> None:
    x = every_bf16()
    ones = torch.ones(4 if block == "128x128" else 512, 1)
    if kernel:
        with launch.backend(ShimBackend(1)):
            codes = fp8_quant(x, block, scales=ones).codes_RC
    else:
        codes = fp8_quant(x, block, scales=ones).codes_RC
    clamped = np.clip(x.float().numpy(), -448, 448)
    wanted = np.nan_to_num(clamped).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    wanted = np.where(np.isnan(clamped), 0x7F, wanted)
    np.testing.assert_array_equal(codes.view(torch.uint8).numpy(), wanted)


def test_what_is_not_finite_or_too_large_has_a_defined_code() -> None:
    x = torch.tensor([[1000.0, 448.1, torch.inf, -torch.inf, torch.nan, -0.0]])
    codes, _, amax = fp8_quant(x, "row", scales=torch.ones(1, 1))
    assert codes.view(torch.uint8).tolist() == [[0x7E, 0x7E, 0x7E, 0xFE, 0x7F, 0x80]]
    assert amax.item() == 1000.0


@given(matrices(5), st.sampled_from(BLOCKS), st.booleans())
def test_each_block_is_scaled_by_its_amax(matrix: Matrix, block: Block, pow2: bool) -> None:
    x = matrix.make()
    quantized = fp8_quant(x, block, pow2=pow2)
    values = x.double().numpy()
    tall, wide = {"row": (1, matrix.columns), "1x128": (1, 128), "128x128": (128, 128)}[block]
    for i in range(quantized.scales.shape[0]):
        for j in range(quantized.scales.shape[1]):
            part = np.s_[i * tall : (i + 1) * tall, j * wide : (j + 1) * wide]
            known = values[part][np.isfinite(values[part])]
            amax, scale = float(np.abs(known).max(initial=0.0)), quantized.scales[i, j].item()
            assert quantized.amax[i, j].item() == amax
            if pow2:
                assert np.frexp(scale)[0] == 0.5 and amax / scale <= 448
                assert amax < 2.0**-100 or amax / scale > 224
            else:
                assert scale == np.float32(max(amax, 2.0**-100)) / np.float32(448)
            scaled = np.clip(values[part] / scale, -448, 448)
            codes = quantized.codes_RC[part].float().numpy()
            assert np.isnan(codes[np.isnan(scaled)]).all()
            fine = ~np.isnan(scaled)
            step = np.maximum(2.0 ** np.floor(np.log2(np.maximum(np.abs(scaled[fine]), 2.0**-6))), 2.0**-6) / 8
            assert (np.abs(codes[fine] - scaled[fine]) <= 0.5 * step * (1 + 1e-5)).all()
    assert torch.equal(
        fp8_dequant(quantized.codes_RC, quantized.scales, block).isnan(), x.isnan()
    )  # an infinity came back as the block's amax


@given(matrices(4), st.booleans())
def test_the_search_finds_the_best_of_its_scales_and_fits_it(matrix: Matrix, weighted: bool) -> None:
    w = matrix._replace(strange=0, spread=min(matrix.spread, 1.0)).make()
    random = torch.Generator().manual_seed(matrix.seed)
    moment = torch.rand(matrix.columns, generator=random).exp() if weighted else None
    found = range_search(w, moment)
    values = w.double()
    m = torch.ones(matrix.columns).double() if moment is None else moment.double()

    def error(codes: Tensor, scale: Tensor) -> Tensor:
        return (m * (values - codes.double() * scale.double()) ** 2).sum(1, keepdim=True)

    rounding = 1e-12 * (m * values**2).sum(1, keepdim=True) + 1e-60
    widest = w.float().abs().amax(1, keepdim=True).clamp(min=2.0**-100) / 448
    tried = []
    for i in range(NUM_CANDIDATES):
        scale = widest * (1 - i / 64)
        codes = (w.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
        tried.append(error(codes, scale))
    least = torch.cat(tried, 1).amin(1, keepdim=True)
    chosen = error(found.codes_RC, found.encode_R1)
    assert (chosen <= least * (1 + 1e-4) + rounding).all()
    torch.testing.assert_close(found.encode_R1, widest * (1 - found.choice_R.unsqueeze(1) / 64))
    fitted = error(found.codes_RC, found.scales_R1)
    assert (fitted <= chosen * (1 + 1e-4) + rounding).all()
    for factor in (0.999, 1.001):
        assert (fitted <= error(found.codes_RC, found.scales_R1 * factor) + rounding).all()


def test_strange_weights_take_no_part_in_the_search() -> None:
    w = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    plain = range_search(w)
    w_with = torch.cat([w, torch.tensor([[torch.nan], [torch.inf], [-torch.inf]])], 1)
    found = range_search(w_with, torch.ones(51))
    assert_same_bits(found[1:], plain[1:])
    assert found.codes_RC[:, 50].view(torch.uint8).tolist() == [0x7F, 0x7E, 0xFE]
    moment = torch.ones(50)
    moment[7] = -1.0
    moment[8] = torch.nan
    ignored = torch.where(torch.isin(torch.arange(50), torch.tensor([7, 8])), 0.0, 1.0)
    assert_same_bits(range_search(w, moment), range_search(w, ignored))


def test_a_row_of_zeros() -> None:
    found = range_search(torch.zeros(2, 9))
    assert (found.codes_RC.float() == 0).all() and found.scales_R1.isfinite().all() and (found.scales_R1 > 0).all()


def test_delayed_scaling_fits_the_largest_amax_of_the_window() -> None:
    history = torch.zeros(3, 4)
    amax = [torch.rand(4, generator=torch.Generator().manual_seed(i)) + 0.1 for i in range(7)]
    for step, now in enumerate(amax):
        scales = amax_scales(history, now, step % 3)
        window = torch.stack(amax[max(0, step - 2) : step + 1])
        assert torch.equal(scales, window.amax(0) / 448)
    assert torch.equal(amax_scales(history.clone(), amax[0], 0, pow2=True).frexp()[0], torch.full((4,), 0.5))


# The kernels --------------------------------------------------------------------------------------------------


@needs_shim
@pytest.mark.slow
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("part", range(2))
def test_quantization_is_the_reference_to_the_bit(block: Block, part: int) -> None:
    @settings(max_examples=520, database=None)
    @given(matrices(3), st.booleans(), st.booleans(), st.integers(3 * part, 3 * part + 2), st.integers(0, 1))
    def check(matrix: Matrix, pow2: bool, given_scales: bool, schedule: int, config: int) -> None:
        x = matrix.make()
        scales = reference.fp8_quant(x, block).scales * 0.7 if given_scales else None
        with launch.backend(ShimBackend(schedule)), launch.picking(lambda spec, _: spec.configs[config]):
            found = fp8_quant(x, block, pow2=pow2, scales=scales)
        assert_same_bits(found, reference.fp8_quant(x, block, pow2=pow2, scales=scales))

    check()


@needs_shim
@pytest.mark.slow
@pytest.mark.parametrize("config", precision.SEARCH.configs)
def test_the_search_is_the_reference_to_the_bit(config: launch.Config) -> None:
    @settings(max_examples=350, database=None)
    @given(matrices(3), st.booleans(), st.integers(0, 5))
    def check(matrix: Matrix, weighted: bool, schedule: int) -> None:
        w, random = matrix.make(), torch.Generator().manual_seed(matrix.seed)
        moment = torch.randn(matrix.columns, generator=random) + 1 if weighted else None
        with launch.backend(ShimBackend(schedule)), launch.picking(lambda spec, _: config):
            found = range_search(w, moment)
        assert_same_bits(found, reference.range_search(w, moment))

    check()


@needs_shim
@settings(max_examples=1050)
@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(0, 300), st.booleans(), st.integers(0, 5))
def test_the_history_is_the_reference_to_the_bit(seed: int, slots: int, num: int, pow2: bool, schedule: int) -> None:
    random = torch.Generator().manual_seed(seed)
    history, amax = torch.rand(slots, num, generator=random), torch.rand(num, generator=random)
    same, slot = history.clone(), seed % slots
    with launch.backend(ShimBackend(schedule)):
        found = amax_scales(history, amax, slot, pow2=pow2)
    assert_same_bits((found, history), (reference.amax_scales(same, amax, slot, pow2=pow2), same))


@needs_shim
@pytest.mark.parametrize("block", BLOCKS)
def test_long_rows_and_every_configuration_give_the_same_bits(block: Block) -> None:
    for columns in (4096, 9001):
        x = Matrix(columns, 3, columns, 1.0, 2, BF16).make()
        wanted = reference.fp8_quant(x, block)
        spec = {"row": precision.ROW, "1x128": precision.GROUP, "128x128": precision.TILE}[block]
        for schedule, config in enumerate(spec.configs):
            with launch.backend(ShimBackend(schedule)), launch.picking(lambda spec, _, config=config: config):
                assert_same_bits(fp8_quant(x, block), wanted)


@needs_shim
def test_a_slice_that_is_not_aligned() -> None:
    flat = torch.randn(1 + 8 * 128, generator=torch.Generator().manual_seed(0)).to(BF16)
    x = flat[1:].view(8, 128)
    with launch.backend(ShimBackend(1)):
        assert_same_bits(fp8_quant(x, "row"), reference.fp8_quant(x, "row"))


@needs_shim
@pytest.mark.parametrize("rows", [2**31 // 4096 - 1, 2**31 // 4096 + 1])
def test_offsets_have_64_bits(rows: int) -> None:
    columns = 4096
    x = torch.empty(rows, columns, dtype=BF16)
    x[-1] = torch.randn(columns, generator=torch.Generator().manual_seed(0))
    wanted = reference.fp8_quant(x[-1:], "row")
    with launch.backend(ShimBackend(1, only_blocks=lambda num: [num - 1])):
        codes, scales, _ = fp8_quant(x, "row")
    assert_same_bits((codes[-1:], scales[-1:]), wanted[:2])
    wanted = reference.fp8_quant(x[-1:, -512:], "1x128")
    with launch.backend(ShimBackend(1, only_blocks=lambda num: [num - 1])):
        codes, scales, _ = fp8_quant(x, "1x128")
    assert_same_bits((codes[-1:, -512:], scales[-1:, -4:]), wanted[:2])
    fitted = reference.range_search(x[-1:])
    with launch.backend(ShimBackend(1, only_blocks=lambda num: [num - 1])):
        found = range_search(x)
    assert_same_bits((found.codes_RC[-1:], found.scales_R1[-1:]), fitted[:2])


FAULTS = [
    ("fp8.cuh", "round_e4m3(clamp_e4m3(both[i]))", "round_e4m3(both[i])"),  # no clamp before the cast
    ("fp8.cuh", "both[i] != both[i] ? 0x7fu : ", ""),
    ("fp8.cuh", "    if (column + i < columns) row[", "    row["),  # stores past the end of a row
    ("fp8_quant.cu", "x + row * columns;\n  unsigned", "x + (int)row * (int)columns;\n  unsigned"),
    ("common.cuh", "if (lane == 0) partial[warp] = x;\n  __syncthreads();", "if (lane == 0) partial[warp] = x;"),
]


@needs_shim
@pytest.mark.parametrize("fault", FAULTS, ids=range(len(FAULTS)))
def test_a_planted_fault_is_seen(fault: tuple[str, str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plant(monkeypatch, tmp_path, precision, *fault)
    with pytest.raises((AssertionError, KernelFault)):
        for schedule in range(1, 8):
            with launch.backend(ShimBackend(schedule)):
                x = Matrix(schedule, 5, 301, 1.0, 3, F32).make()
                x[0, :3] = torch.tensor([7.0, -3.5, 1.75])
                x[0, 3:] = 0.0
                scales = torch.full((5, 1), 1e-4)
                found = fp8_quant(x, "row", scales=scales)
                assert_same_bits(found[:2], reference.fp8_quant(x, "row", scales=scales)[:2])
                assert_same_bits(fp8_quant(x, "row", pow2=True), reference.fp8_quant(x, "row", pow2=True))
            huge = torch.empty(2**31 // 4096 + 1, 4096, dtype=BF16)
            huge[-1] = 1.0
            with launch.backend(ShimBackend(schedule, only_blocks=lambda num: [num - 1])):
                codes = fp8_quant(huge, "row").codes_RC
            assert (codes[-1].float() == 448).all()


X = torch.ones(4, 8)


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        (lambda: fp8_quant(X.double(), "row"), "x_RC must be float32 or bfloat16, not float64"),
        (lambda: fp8_quant(X.t(), "row"), "x_RC must be contiguous"),
        (lambda: fp8_quant(X[0], "row"), r"x_RC must have the shape \[any, any\]"),
        (lambda: fp8_quant(X[:, :0], "row"), "at least one column"),
        (lambda: fp8_quant(X, "8x8"), "block must be one of 'row', '1x128', '128x128'"),  # type: ignore[arg-type]
        (lambda: fp8_quant(X, "row", scales=torch.ones(3, 1)), r"scales must have the shape \[4, 1\]"),
        (lambda: fp8_quant(X, "row", scales=torch.ones(4, 1, device="meta")), "scales is on meta"),
        (lambda: range_search(X, torch.ones(7)), r"moment_C must have the shape \[8\]"),
        (lambda: range_search(X.half()), "w_RC must be float32 or bfloat16"),
        (lambda: amax_scales(X, X[0], 4), "slot must be from 0 to 3, not 4"),
        (lambda: amax_scales(X, X[0, :3], 0), r"amax_N must have the shape \[8\]"),
    ],
)
def test_bad_input_is_refused(call, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        call()
