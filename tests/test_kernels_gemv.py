"""Expert GEMV against a float64 loop; its bits under every schedule, configuration and batch."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import plant
from shim import KernelFault, ShimBackend, needs_shim
from torch import Tensor

from headrace.kernels import gemv, launch
from headrace.kernels.gemv import moe_gemv
from headrace.kernels.precision import fp8_quant
from headrace.kernels.reference import align

F32, BF16, E4M3 = torch.float32, torch.bfloat16, torch.float8_e4m3fn
KINDS = [(F32, F32), (BF16, BF16), (F32, E4M3), (BF16, E4M3)]
"""dtype of the inputs, of the weights"""


class Case(NamedTuple):
    seed: int
    loads: list[int]
    """Rows of each expert"""
    spare: int
    """Rows of nobody"""
    features: int
    columns: int
    kinds: tuple[torch.dtype, torch.dtype]

    def make(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        random = torch.Generator().manual_seed(self.seed)
        x = torch.randn(sum(self.loads) + self.spare, self.columns, generator=random).to(self.kinds[0])
        w = torch.randn(len(self.loads), self.features, self.columns, generator=random)
        ends = torch.tensor(self.loads).cumsum(0).int()
        if self.kinds[1] != E4M3:
            return x, ends, w.to(self.kinds[1]), None
        codes, scales, _ = fp8_quant(w.reshape(-1, self.columns), "row")
        return x, ends, codes.view(w.shape), scales.reshape(w.shape[:2]).clone()


cases = st.builds(
    Case,
    seed=st.integers(0, 10**6),
    loads=st.lists(st.sampled_from([0, 0, 1, 2, 3, 5, 8, 9]), min_size=1, max_size=3),
    spare=st.sampled_from([0, 0, 2]),
    features=st.integers(1, 10),
    columns=st.one_of(st.integers(1, 40), st.sampled_from([64, 128, 129, 640])),
    kinds=st.sampled_from(KINDS),
)


def exact(x: Tensor, ends: Tensor, w: Tensor, scales: Tensor | None) -> Tensor:
    """Row by row, in float64."""
    y = torch.zeros(len(x), w.shape[1], dtype=torch.float64)
    weights = w.double() if scales is None else w.double() * scales.double().unsqueeze(2)
    begin = 0
    for expert, end in enumerate(ends.tolist()):
        for row in range(begin, end):
            y[row] = weights[expert] @ x[row].double()
        begin = end
    return y


def assert_close(y: Tensor, args: tuple[Tensor, Tensor, Tensor, Tensor | None]) -> None:
    x, _, w, _ = args
    tolerance = 2.0**-8 if y.dtype == BF16 else 1e-5
    assert y.dtype == x.dtype
    torch.testing.assert_close(y.double(), exact(*args), rtol=tolerance, atol=tolerance * w.shape[2] ** 0.5)


@settings(max_examples=50)
@given(cases)
def test_in_plain_torch_it_is_the_loop(case: Case) -> None:
    args = case.make()
    assert_close(moe_gemv(*args), args)


@needs_shim
@pytest.mark.slow
@pytest.mark.parametrize("kinds", KINDS, ids=["f32", "bf16", "f32-fp8", "bf16-fp8"])
def test_the_kernel_is_the_loop(kinds: tuple[torch.dtype, torch.dtype]) -> None:
    @settings(max_examples=260, database=None)
    @given(cases, st.integers(0, 5), st.sampled_from(gemv.GEMV.configs))
    def check(case: Case, schedule: int, config: launch.Config) -> None:
        args = case._replace(kinds=kinds).make()
        with launch.backend(ShimBackend(schedule)), launch.picking(lambda spec, _: config):
            assert_close(moe_gemv(*args), args)

    check()


@needs_shim
@pytest.mark.parametrize("kinds", KINDS, ids=["f32", "bf16", "f32-fp8", "bf16-fp8"])
def test_a_row_has_the_same_bits_in_every_batch(kinds: tuple[torch.dtype, torch.dtype]) -> None:
    x, ends, w, scales = Case(3, [9, 0, 3, 1], 0, 13, 300, kinds).make()
    with launch.backend(ShimBackend(0)):
        together = moe_gemv(x, ends, w, scales)
    for schedule, config in enumerate((*gemv.GEMV.configs, {"BLOCK": 64, "FEATURES": 3})):
        with launch.backend(ShimBackend(1 + schedule)), launch.picking(lambda spec, _, config=config: config):
            assert torch.equal(moe_gemv(x, ends, w, scales), together)
            experts = torch.repeat_interleave(torch.arange(4), torch.diff(ends, prepend=torch.zeros(1).int()))
            for row in (0, 8, 10, 12):
                own = (torch.arange(4) >= experts[row]).int()
                assert torch.equal(moe_gemv(x[row : row + 1].clone(), own, w, scales)[0], together[row])


@needs_shim
def test_rows_come_from_align() -> None:
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 4, (6, 2), generator=random)
    rows = align(ids, 4)
    x = torch.randn(6, 32, generator=random)[rows.pairs_N // 2]
    w = torch.randn(4, 8, 32, generator=random)
    grouped = torch.nn.functional.grouped_mm(x, w.transpose(1, 2), offs=rows.ends_E)
    with launch.backend(ShimBackend(2)):
        torch.testing.assert_close(moe_gemv(x, rows.ends_E, w), grouped)


@needs_shim
def test_strange_numbers_stay_in_their_row() -> None:
    x, ends, w, _ = Case(0, [2, 1], 0, 4, 20, (F32, F32)).make()
    x[0, 3], x[1, 5], w[1, 2, 0] = torch.nan, torch.inf, torch.nan
    with launch.backend(ShimBackend(1)):
        y = moe_gemv(x, ends, w)
    assert y[0].isnan().all() and y[1].isinf().all()
    assert y[2].isnan().tolist() == [False, False, True, False]


@needs_shim
def test_offsets_of_weights_have_64_bits() -> None:
    experts, features, columns = 2**31 // (512 * 4096) + 1, 512, 4096
    w = torch.empty(experts, features, columns, dtype=torch.uint8).view(E4M3)
    w.view(torch.uint8)[-1, -8:] = 0x38  # 1.0
    scales = torch.ones(experts, features)
    ends = torch.zeros(experts, dtype=torch.int32)
    ends[-1] = 1
    blocks = -(-features // (gemv.GEMV.configs[0]["FEATURES"] * gemv.GEMV.configs[0]["BLOCK"] // 32))
    with launch.backend(ShimBackend(1, only_blocks=lambda num: [num - blocks - 1])):  # last expert, last features
        y = moe_gemv(torch.full((1, columns), 0.5), ends, w, scales)
    assert y[0, -8:].tolist() == [columns * 0.5] * 8


FAULTS = [
    ("moe_gemv.cu", "column + i < columns ? to_f32(row[column + i]) : 0.0f", "to_f32(row[column + i])"),
    ("moe_gemv.cu", "w += expert * features * columns", "w += (int)expert * features * columns * 0"),
    ("moe_gemv.cu", "store(y + row * features + first + f, 0.0f);", ";"),  # rows of nobody are left as they were
]


@needs_shim
@pytest.mark.parametrize("fault", FAULTS, ids=range(len(FAULTS)))
def test_a_planted_fault_is_seen(fault: tuple[str, str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plant(monkeypatch, tmp_path, gemv, *fault)
    args = Case(0, [9, 0, 2], 2, 5, 37, (F32, F32)).make()
    with pytest.raises((AssertionError, KernelFault)):
        for schedule in range(3):
            with launch.backend(ShimBackend(schedule)):
                assert_close(moe_gemv(*args), args)


X, ENDS, W = torch.ones(4, 8), torch.tensor([1, 4], dtype=torch.int32), torch.ones(2, 3, 8)


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        (lambda: moe_gemv(X.half(), ENDS, W), "x_ND must be float32 or bfloat16"),
        (lambda: moe_gemv(X, ENDS, W.bfloat16()), "w_EFD must be float32 or float8_e4m3fn"),
        (lambda: moe_gemv(X, ENDS.long(), W), "ends_E must be int32"),
        (lambda: moe_gemv(X, ENDS, W[:, :, :7]), r"w_EFD must have the shape \[any, any, 8\]"),
        (lambda: moe_gemv(X, ENDS[:1], W), r"ends_E must have the shape \[2\]"),
        (lambda: moe_gemv(X, ENDS, W.to(E4M3)), "scales_EF belongs to float8_e4m3fn weights"),
        (lambda: moe_gemv(X, ENDS, W, torch.ones(2, 3)), "scales_EF belongs to float8_e4m3fn weights"),
        (lambda: moe_gemv(X, ENDS, W.mT.contiguous().mT), "w_EFD must be contiguous"),
        (lambda: moe_gemv(X, ENDS + 1, W), "ends_E must rise and end at most at 4"),
        (lambda: moe_gemv(X, ENDS.flip(0), W), "ends_E must rise"),
    ],
)
def test_bad_input_is_refused(call, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        call()
