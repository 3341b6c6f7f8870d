"""Permute and unpermute on the CPU shim against plain torch, with padding, dropped pairs and huge offsets."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import plant
from shim import KernelFault, ShimBackend, needs_shim
from torch import Tensor

from headrace.kernels import launch, reference
from headrace.kernels import rows as kernels
from headrace.kernels.reference import Rows, align
from headrace.kernels.rows import permute, unpermute, unpermute_fp8

WIDTHS = st.one_of(st.integers(1, 40), st.sampled_from([64, 100, 256, 264]))
INDICES = st.sampled_from([torch.int32, torch.int64])


class Case(NamedTuple):
    """Some pairs in some of the rows, drawn from a seed."""

    seed: int
    num_tokens: int
    k: int
    width: int
    padding: int
    dropped: int
    index: torch.dtype

    def rows(self) -> Rows:
        random = self.random()
        num_pairs = self.num_tokens * self.k
        kept = torch.randperm(num_pairs, generator=random)[min(self.dropped, num_pairs) :]
        places = torch.randperm(len(kept) + self.padding, generator=random)[: len(kept)]
        strays = torch.tensor([-1, num_pairs, num_pairs + 7])
        pairs_N = strays[torch.randint(0, 3, (len(kept) + self.padding,), generator=random)]
        pairs_N[places] = kept
        rows_P = torch.full((num_pairs,), -1).scatter(0, kept, places)
        load = torch.zeros(1, dtype=torch.int64)
        return Rows(pairs_N.to(self.index), load, load.int(), rows_P.to(self.index))

    def random(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)


case_strategy = st.builds(
    Case,
    seed=st.integers(0, 10**6),
    num_tokens=st.integers(0, 9),
    k=st.integers(1, 9),
    width=WIDTHS,
    padding=st.one_of(st.just(0), st.integers(0, 70)),
    dropped=st.one_of(st.just(0), st.integers(0, 12)),
    index=INDICES,
)


def drawn(shape: tuple[int, ...], dtype: torch.dtype, random: torch.Generator) -> Tensor:
    if dtype == torch.uint8:
        return torch.randint(0, 256, shape, dtype=dtype, generator=random)
    return torch.randn(shape, generator=random).to(dtype)


def check_permute(case: Case, dtype: torch.dtype, schedule: int) -> None:
    x, rows = drawn((case.num_tokens, case.width), dtype, case.random()), case.rows()
    with launch.backend(ShimBackend(schedule)):
        got = permute(x, rows, case.k)
    assert torch.equal(got, reference.permute(x, rows, case.k))


def check_unpermute(case: Case, dtype: torch.dtype, schedule: int) -> None:
    rows, random = case.rows(), case.random()
    y = drawn((len(rows.pairs_N), case.width), dtype, random).requires_grad_()
    weights = torch.rand(case.num_tokens, case.k, generator=random).requires_grad_()
    along = drawn((case.num_tokens, case.width), dtype, random)
    wide = y.detach().double().requires_grad_(), weights.detach().double().requires_grad_()
    expected = reference.unpermute(wide[0], rows, wide[1])
    wanted = torch.autograd.grad(expected, wide, along.double())
    with launch.backend(ShimBackend(schedule)):
        got = unpermute(y, rows, weights)
        grads = torch.autograd.grad(got, (y, weights), along)
    close = {"atol": 1e-6, "rtol": 2.0**-8} if dtype == torch.bfloat16 else {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(got.double(), expected, **close)
    torch.testing.assert_close(grads[0].double(), wanted[0], **close)
    torch.testing.assert_close(grads[1].double(), wanted[1], atol=1e-4, rtol=1e-4)
    assert not grads[0][reference_empty(rows, case)].any()


def reference_empty(rows: Rows, case: Case) -> Tensor:
    return (rows.pairs_N < 0) | (rows.pairs_N >= case.num_tokens * case.k)


@needs_shim
@pytest.mark.slow
@pytest.mark.timeout(400)  # on a machine that is busy with other things
@settings(max_examples=1000)
@given(case_strategy, st.sampled_from([torch.float32, torch.bfloat16, torch.uint8]), st.integers(0, 99))
def test_permute_is_the_reference(case: Case, dtype: torch.dtype, schedule: int):
    check_permute(case, dtype, schedule)


@needs_shim
@pytest.mark.slow
@pytest.mark.timeout(400)  # on a machine that is busy with other things
@settings(max_examples=1000)
@given(case_strategy, st.sampled_from([torch.float32, torch.bfloat16]), st.integers(0, 99))
def test_unpermute_and_its_gradient_are_the_reference(case: Case, dtype: torch.dtype, schedule: int):
    check_unpermute(case, dtype, schedule)


@needs_shim
@pytest.mark.slow
@pytest.mark.timeout(400)  # on a machine that is busy with other things
@settings(max_examples=1000)
@given(case_strategy, st.integers(0, 99))
def test_gradient_of_permute_is_the_sum_over_the_copies(case: Case, schedule: int):
    rows, random = case.rows(), case.random()
    x = drawn((case.num_tokens, case.width), torch.float32, random).requires_grad_()
    along = drawn((len(rows.pairs_N), case.width), torch.float32, random)
    (wanted,) = torch.autograd.grad(reference.permute(x, rows, case.k), x, along)
    with launch.backend(ShimBackend(schedule)):
        (grad,) = torch.autograd.grad(permute(x, rows, case.k), x, along)
    torch.testing.assert_close(grad, wanted, atol=1e-5, rtol=1e-5)


SOME = Case(3, 9, 4, 40, 37, 5, torch.int64)


@needs_shim
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("width", [1, 7, 12, 64])
def test_permute_in_every_unit(dtype: torch.dtype, width: int):
    for schedule in range(1, 4):
        check_permute(SOME._replace(width=width), dtype, schedule)


@needs_shim
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 7, 64, 264])
def test_unpermute_with_and_without_whole_chunks(dtype: torch.dtype, width: int):
    for schedule in range(1, 4):
        check_unpermute(SOME._replace(width=width), dtype, schedule)


@needs_shim
def test_a_tensor_that_starts_anywhere_is_read_in_smaller_units():
    rows = SOME.rows()
    x = drawn((SOME.num_tokens * 64 + 1,), torch.bfloat16, SOME.random())[1:].reshape(-1, 64)
    y = drawn((len(rows.pairs_N) * 64 + 1,), torch.float32, SOME.random())[1:].reshape(-1, 64)
    weights = torch.rand(SOME.num_tokens, SOME.k, generator=SOME.random())
    with launch.backend(ShimBackend(1)):
        assert torch.equal(permute(x, rows, SOME.k), reference.permute(x, rows, SOME.k))
        torch.testing.assert_close(unpermute(y, rows, weights), reference.unpermute(y, rows, weights))


@needs_shim
def test_fp8_travels_as_bytes_and_its_scales_beside_it():
    rows, random = SOME.rows(), SOME.random()
    x = drawn((SOME.num_tokens, 48), torch.float32, random).to(torch.float8_e4m3fn)
    scales = torch.rand(SOME.num_tokens, 1, generator=random)
    with launch.backend(ShimBackend(1)):
        rowed, rowed_scales = permute(x, rows, SOME.k), permute(scales, rows, SOME.k)
    assert rowed.dtype == x.dtype
    torch.testing.assert_close(
        rowed.float() * rowed_scales, reference.permute(x.float() * scales, rows, SOME.k), atol=0, rtol=0
    )


def check_fp8(case: Case, num_scales: int, schedule: int) -> None:
    rows, random = case.rows(), case.random()
    num_rows = len(rows.pairs_N)
    codes = torch.randint(0, 256, (num_rows, case.width), dtype=torch.uint8, generator=random)
    y = codes.where(codes % 128 != 127, 0).view(torch.float8_e4m3fn)
    scales = torch.rand(num_rows, num_scales, generator=random) + 0.1
    weights = torch.rand(case.num_tokens, case.k, generator=random)
    numbers = y.double() * scales.double().repeat_interleave(case.width // num_scales, dim=1)
    expected = reference.unpermute(numbers, rows, weights.double())
    with launch.backend(ShimBackend(schedule)):
        got = unpermute_fp8(y, scales, rows, weights)
    for result in (got, unpermute_fp8(y, scales, rows, weights)):
        assert result.dtype == torch.bfloat16
        torch.testing.assert_close(result.double(), expected, atol=1e-3, rtol=2.0**-8)


@needs_shim
@pytest.mark.slow
@pytest.mark.timeout(400)  # on a machine that is busy with other things
@settings(max_examples=1000)
@given(case_strategy, st.integers(1, 4), st.integers(0, 99))
def test_sum_of_fp8_rows_is_the_reference(case: Case, num_scales: int, schedule: int):
    if num_scales > 1:
        case = case._replace(width=(case.width // 32 + 1) * 8 * num_scales)
    check_fp8(case, num_scales, schedule)


@needs_shim
@pytest.mark.parametrize(("width", "num_scales"), [(1, 1), (13, 1), (48, 1), (48, 3), (256, 2)])
def test_sum_of_fp8_rows(width: int, num_scales: int):
    for schedule in range(1, 4):
        check_fp8(SOME._replace(width=width), num_scales, schedule)


@needs_shim
def test_every_fp8_code_is_read_as_torch_reads_it():
    codes = torch.arange(256, dtype=torch.uint8).reshape(256, 1)
    y = codes.view(torch.float8_e4m3fn)
    rows = align(torch.zeros(256, 1, dtype=torch.int64), 1)
    with launch.backend(ShimBackend(1)):
        got = unpermute_fp8(y, torch.ones(256, 1), rows, torch.ones(256, 1))
    torch.testing.assert_close(got, y.bfloat16(), atol=0, rtol=0, equal_nan=True)


@needs_shim
def test_rows_without_an_inverse_are_inverted():
    ids = torch.tensor([[0, 2], [1, 0], [2, 1]])
    rows = align(ids, 3)
    x = drawn((3, 10), torch.float32, SOME.random())
    weights = torch.rand(3, 2, generator=SOME.random())
    with launch.backend(ShimBackend(1)):
        moved = permute(x, rows, 2)
        assert torch.equal(moved, reference.permute(x, rows, 2))
        torch.testing.assert_close(unpermute(moved, rows, weights), x * weights.sum(1, keepdim=True))


@needs_shim
def test_all_tokens_to_one_expert_and_none_at_all():
    for num_tokens in (0, 5):
        rows = align(torch.zeros(num_tokens, 1, dtype=torch.int64), 4)
        x = drawn((num_tokens, 16), torch.float32, SOME.random())
        with launch.backend(ShimBackend(1)):
            moved = permute(x, rows, 1)
            back = unpermute(moved, rows, torch.ones(num_tokens, 1))
        assert torch.equal(moved, x) and torch.equal(back, x)


@needs_shim
def test_every_schedule_and_configuration_gives_the_same_bits():
    rows, random = SOME.rows(), SOME.random()
    x = drawn((SOME.num_tokens, 100), torch.float32, random).requires_grad_()
    weights = torch.rand(SOME.num_tokens, SOME.k, generator=random).requires_grad_()

    def result(schedule: int) -> list[Tensor]:
        with (
            launch.backend(ShimBackend(schedule)),
            launch.picking(lambda spec, situation: spec.configs[schedule % len(spec.configs)]),
        ):
            back = unpermute(permute(x, rows, SOME.k).sin(), rows, weights)
            return [back, *torch.autograd.grad(back.square().sum(), (x, weights))]

    first = result(0)
    for schedule in range(1, 100):
        assert all(torch.equal(a, b) for a, b in zip(first, result(schedule), strict=True))


def beyond_2_31() -> tuple[Tensor, Rows]:
    """One token of a prime number of bytes, whose row begins past 2**31 bytes in a tensor that nobody touches."""
    width = 1_048_573
    num_rows = 2**31 // width + 2
    pairs_N = torch.zeros(num_rows, dtype=torch.int64)
    x = (torch.arange(width) % 251).to(torch.uint8).reshape(1, width)
    return x, Rows(pairs_N, pairs_N, pairs_N.int(), torch.tensor([num_rows - 1]))


@needs_shim
@pytest.mark.slow
def test_offsets_have_64_bits():
    x, rows = beyond_2_31()
    with launch.backend(ShimBackend(limit_s=60)):
        moved = permute(x, rows, 1)
    assert moved.numel() > 2**31 and torch.equal(moved[-1:], x)


@needs_shim
@pytest.mark.slow
def test_planted_offsets_of_32_bits_are_seen(tmp_path, monkeypatch):
    plant(
        monkeypatch,
        tmp_path,
        kernels,
        "permute.cu",
        "out[row * units + u] = piece",
        "out[int(row) * int(units) + int(u)] = piece",
    )
    x, rows = beyond_2_31()
    with launch.backend(ShimBackend(limit_s=60)), pytest.raises(KernelFault, match="overflow"):
        permute(x, rows, 1)


@needs_shim
@pytest.mark.slow
def test_sums_have_offsets_of_64_bits():
    width = 65_521
    num_rows = 2**31 // width + 2
    y = torch.empty(num_rows, width, dtype=torch.bfloat16)
    y[-1] = torch.arange(width) % 97
    rows = Rows(
        torch.zeros(num_rows, dtype=torch.int64), *[torch.zeros(1, dtype=torch.int32)] * 2, torch.tensor([num_rows - 1])
    )
    weights = torch.tensor([[2.0]])
    with launch.backend(ShimBackend(limit_s=60)):
        back = unpermute(y, rows, weights)
    assert y.numel() > 2**31 and torch.equal(back[0], y[-1] * 2)


@needs_shim
def test_planted_rows_between_that_are_not_zeroed_are_seen(tmp_path, monkeypatch):
    check_permute(SOME, torch.float32, 1)
    plant(monkeypatch, tmp_path, kernels, "permute.cu", "out[row * units + u] = zero;", ";")
    with pytest.raises(AssertionError):
        check_permute(SOME, torch.float32, 1)


@needs_shim
def test_planted_sum_in_bfloat16_is_seen(tmp_path, monkeypatch):
    case = SOME._replace(k=9)
    check_unpermute(case, torch.bfloat16, 1)
    right = "sum[j] = fmaf(weight, piece[j], sum[j])"
    plant(monkeypatch, tmp_path, kernels, "unpermute.cu", right, right.replace("fmaf(", "to_f32(to_bf16(fmaf(") + "))")
    with pytest.raises(AssertionError):
        check_unpermute(case, torch.bfloat16, 1)


def test_on_a_cpu_it_is_the_reference_bit_by_bit():
    rows = align(torch.tensor([[0, 2], [1, 0], [2, 1]]), 3)
    x = drawn((3, 10), torch.float32, SOME.random())
    weights = torch.rand(3, 2, generator=SOME.random())
    assert torch.equal(permute(x, rows, 2), reference.permute(x, rows, 2))
    assert torch.equal(
        unpermute(permute(x, rows, 2), rows, weights), reference.unpermute(x[rows.pairs_N // 2], rows, weights)
    )


@pytest.mark.parametrize("case", [SOME, SOME._replace(padding=0, dropped=0)])
def test_reference_gradients_are_those_of_finite_differences(case: Case):
    rows, random = case.rows(), case.random()
    x = torch.randn(case.num_tokens, 3, dtype=torch.float64, generator=random).requires_grad_()
    weights = torch.rand(case.num_tokens, case.k, dtype=torch.float64, generator=random).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: unpermute(permute(x, rows, case.k).sin(), rows, w), (x, weights))


X, ROWS = torch.zeros(3, 8), align(torch.tensor([[0, 2], [1, 0], [2, 1]]), 3)
WEIGHTS = torch.ones(3, 2)
FP8 = torch.zeros(6, 8).to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: permute(X[0], ROWS, 2), "x_TD must have the shape"),
        (lambda: permute(X.t(), ROWS, 2), "contiguous"),
        (lambda: permute(X, ROWS, 3), "rows are for 6 pairs, not 9"),
        (lambda: permute(X, ROWS._replace(pairs_N=ROWS.pairs_N.float()), 2), "pairs_N must be int32 or int64"),
        (lambda: permute(X, ROWS._replace(pairs_N=ROWS.pairs_N.to("meta")), 2), "pairs_N is on meta"),
        (lambda: permute(X, ROWS._replace(rows_P=ROWS.pairs_N[:5]), 2), "rows are for 5 pairs, not 6"),
        (lambda: permute(X, ROWS._replace(rows_P=ROWS.pairs_N.int()), 2), "rows_P must be int64"),
        (lambda: permute(X[:0], ROWS._replace(pairs_N=ROWS.pairs_N[:0]), 0), "k must be from 1"),
        (lambda: unpermute(X, ROWS, WEIGHTS), "y_ND must have 6 rows, not 3"),
        (lambda: unpermute(X.repeat(2, 1), ROWS, WEIGHTS[0]), "rows are for 6 pairs, not 2"),
        (lambda: unpermute(X.repeat(2, 1), ROWS, WEIGHTS.reshape(6)), "weights_TK must have the shape"),
        (lambda: unpermute(X.repeat(2, 1), ROWS, torch.ones(2, 3).t()), "contiguous"),
        (lambda: unpermute(X.repeat(2, 1), ROWS, WEIGHTS.to("meta")), "weights_TK is on meta"),
        (lambda: unpermute_fp8(X.repeat(2, 1), torch.ones(6, 1), ROWS, WEIGHTS), "y_ND must be float8_e4m3fn"),
        (lambda: unpermute_fp8(FP8, torch.ones(6, 1).double(), ROWS, WEIGHTS), "scales_NB must be float32"),
        (lambda: unpermute_fp8(FP8, torch.ones(5, 1), ROWS, WEIGHTS), "scales_NB must have the shape"),
        (lambda: unpermute_fp8(FP8, torch.ones(6, 2), ROWS, WEIGHTS), "2 scales can't divide 8 columns"),
        (lambda: unpermute_fp8(FP8, torch.ones(6, 0), ROWS, WEIGHTS), "0 scales can't divide 8 columns"),
    ],
)
def test_bad_input_is_refused_before_any_launch(call, message: str):
    shim = ShimBackend()
    with launch.backend(shim), pytest.raises(ValueError, match=message):
        call()
    assert not shim.launches


@needs_shim
def test_kernels_sum_single_and_bfloat16_only():
    with launch.backend(ShimBackend()):
        with pytest.raises(ValueError, match="y_ND must be float32 or bfloat16"):
            unpermute(X.repeat(2, 1).double(), ROWS, WEIGHTS)
        with pytest.raises(ValueError, match="weights_TK must be float32"):
            unpermute(X.repeat(2, 1), ROWS, WEIGHTS.double())
        with pytest.raises(ValueError, match="x_TD must be float32 or bfloat16"):
            permute(X.double().requires_grad_(), ROWS, 2)
