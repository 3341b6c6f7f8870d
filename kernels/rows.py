"""K4 and K5: tokens to the rows of their experts and back. The kernels are cuda/permute.cu, unpermute*.cu.

    x_TD --permute--> x_ND --(grouped matmul)--> y_ND --unpermute--> y_TD

T tokens, D width, K choices a token, N rows, P = T * K pairs. Knows nothing of how rows were assigned (`align`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import launch, reference
from .checks import require, require_contiguous, require_device, require_dtype, require_range, require_shape
from .launch import KernelSpec
from .reference.routing import Rows
from .reference.rows import inverse

_BLOCKS = ({"BLOCK": 256}, {"BLOCK": 128})
_INDICES = {torch.int32: "int", torch.int64: "long long"}
_NUMBERS = {torch.float32: "float", torch.bfloat16: "bf16"}
_UNITS = {16: "uint4", 4: "unsigned int", 1: "unsigned char"}
_MOVES = tuple({"UNIT": unit, "INDEX": index} for unit in _UNITS.values() for index in _INDICES.values())
_SUMS = tuple({"REAL": real, "INDEX": index} for real in _NUMBERS.values() for index in _INDICES.values())

PERMUTE = KernelSpec(source="permute.cu", name="permute_rows", configs=_BLOCKS, variants=_MOVES)
UNPERMUTE = KernelSpec(source="unpermute.cu", name="unpermute_rows", configs=_BLOCKS, variants=_SUMS)
UNPERMUTE_FP8 = KernelSpec(
    source="unpermute_fp8.cu",
    name="unpermute_fp8_rows",
    configs=_BLOCKS,
    variants=tuple({"INDEX": index} for index in _INDICES.values()),
)
BACKWARD = KernelSpec(source="unpermute.cu", name="unpermute_rows_backward", configs=_BLOCKS, variants=_SUMS)
SPECS: tuple[KernelSpec, ...] = (PERMUTE, UNPERMUTE, UNPERMUTE_FP8, BACKWARD)


def permute(x_TD: Tensor, rows: Rows, k: int) -> Tensor:
    """Copies every token to the rows of its k experts: [N, D]; rows without a pair are zero.

    x_TD: any format, for bytes are moved; permute fp8 and its scales each in a call of their own. Contiguous, as are
    the tensors of `rows`, int32 or int64. Differentiable for float32 and bfloat16. Raises ValueError for other input.
    """
    _check("permute", x_TD, "x_TD", rows, x_TD.shape[0] * k)
    require_range("permute", "k", k, 1, 2**31)
    if not launch.runs_kernels(x_TD):
        return reference.permute(x_TD, rows, k)
    if x_TD.requires_grad:
        require_dtype("permute", "x_TD", x_TD, *_NUMBERS)
    result: Tensor = _Permute.apply(x_TD, rows, inverse(rows, x_TD.shape[0] * k), k)  # type: ignore[no-untyped-call]
    return result


def unpermute(y_ND: Tensor, rows: Rows, weights_TK: Tensor) -> Tensor:
    """Brings the rows back and sums each token's k rows by their weights: [T, D], in the format of y_ND.

    y_ND: float32 or bfloat16; weights_TK: float32. The sum is in float32 and in the order of the choices.
    Differentiable in both. Raises ValueError for other input.
    """
    _check_sum("unpermute", y_ND, rows, weights_TK)
    if not launch.runs_kernels(y_ND):
        return reference.unpermute(y_ND, rows, weights_TK)
    require_dtype("unpermute", "y_ND", y_ND, *_NUMBERS)
    require_dtype("unpermute", "weights_TK", weights_TK, torch.float32)
    rows_P = inverse(rows, weights_TK.numel())
    result: Tensor = _Unpermute.apply(y_ND, weights_TK, rows.pairs_N, rows_P)  # type: ignore[no-untyped-call]
    return result


def unpermute_fp8(y_ND: Tensor, scales_NB: Tensor, rows: Rows, weights_TK: Tensor) -> Tensor:
    """`unpermute` of rows in fp8, each number times its scale: bfloat16 [T, D].

    y_ND: float8_e4m3fn; scales_NB, weights_TK: float32; a scale for each D / B columns, which are all of them or a
    multiple of eight. Not differentiable. Raises ValueError for other input.
    """
    op = "unpermute_fp8"
    _check_sum(op, y_ND, rows, weights_TK)
    require_dtype(op, "y_ND", y_ND, torch.float8_e4m3fn)
    require_dtype(op, "weights_TK", weights_TK, torch.float32)
    require_dtype(op, "scales_NB", scales_NB, torch.float32)
    require_shape(op, "scales_NB", scales_NB, y_ND.shape[0], -1)
    require_contiguous(op, scales_NB=scales_NB)
    require_device(op, y_ND, scales_NB=scales_NB)
    (num_rows, width), num_scales = y_ND.shape, scales_NB.shape[1]
    require_range(op, "the width", width, 1, 2**31 - 1)
    fine = num_scales == 1 or (num_scales > 1 and width % (8 * num_scales) == 0)
    require(fine, op, f"{num_scales} scales can't divide {width} columns into equal multiples of eight")
    if not launch.runs_kernels(y_ND):
        return reference.unpermute_fp8(y_ND, scales_NB, rows, weights_TK)
    num_tokens, k = weights_TK.shape
    rows_P = inverse(rows, weights_TK.numel())
    out = launch.empty((num_tokens, width), torch.bfloat16, y_ND)
    config = launch.pick(UNPERMUTE_FP8, tokens=num_tokens, D=width)
    launch.launch(
        UNPERMUTE_FP8,
        num_tokens,
        config["BLOCK"],
        (y_ND, scales_NB, rows_P, weights_TK, out, k, num_rows, width, num_scales, _by_chunks(width, y_ND, out)),
        device_of=y_ND,
        config=config,
        variant={"INDEX": _INDICES[rows_P.dtype]},
    )
    return out


def _check_sum(op: str, y_ND: Tensor, rows: Rows, weights_TK: Tensor) -> None:
    _check(op, y_ND, "y_ND", rows, weights_TK.numel())
    require_shape(op, "weights_TK", weights_TK, -1, -1)
    require_contiguous(op, weights_TK=weights_TK)
    require_device(op, y_ND, weights_TK=weights_TK)
    num_rows = rows.pairs_N.shape[0]
    require(y_ND.shape[0] == num_rows, op, f"y_ND must have {num_rows} rows, not {y_ND.shape[0]}")


def _check(op: str, x: Tensor, name: str, rows: Rows, num_pairs: int) -> None:
    require_shape(op, name, x, -1, -1)
    require_contiguous(op, **{name: x}, pairs_N=rows.pairs_N, rows_P=rows.rows_P)
    require_device(op, x, pairs_N=rows.pairs_N, rows_P=rows.rows_P)
    require_dtype(op, "rows.pairs_N", rows.pairs_N, *_INDICES)
    if rows.rows_P is not None:
        require_dtype(op, "rows.rows_P", rows.rows_P, rows.pairs_N.dtype)
        require(rows.rows_P.numel() == num_pairs, op, f"rows are for {rows.rows_P.numel()} pairs, not {num_pairs}")
    else:
        size = rows.pairs_N.numel()
        require(size == num_pairs, op, f"rows are for {size} pairs, not {num_pairs}; with padding give rows_P too")


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Rows, rows_P: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(rows_P)
        ctx.shape = x.shape
        out = launch.empty((rows.pairs_N.shape[0], x.shape[1]), x.dtype, x)
        row_bytes = x.shape[1] * x.element_size()
        size = next(size for size in _UNITS if (row_bytes | x.data_ptr() | out.data_ptr()) % size == 0)
        config = launch.pick(PERMUTE, tokens=x.shape[0], row_bytes=row_bytes)
        warps = config["BLOCK"] // 32
        num_rows = out.shape[0]
        moved = [tensor.view(torch.int32) if size == 4 else tensor for tensor in (x, out)]
        launch.launch(
            PERMUTE,
            _grid(x.shape[0], warps) + _grid(num_rows, config["BLOCK"]) if row_bytes else 0,
            config["BLOCK"],
            (moved[0], rows_P, rows.pairs_N, moved[1], x.shape[0], k, num_rows, row_bytes // size),
            device_of=x,
            config=config,
            variant={"UNIT": _UNITS[size], "INDEX": _INDICES[rows_P.dtype]},
        )
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (rows_P,) = ctx.saved_tensors
        return _sum_rows(grads[0].contiguous(), rows_P, None, ctx.shape[0]), None, None, None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, weights: Tensor, pairs: Tensor, rows_P: Tensor) -> Tensor:
        ctx.save_for_backward(y, weights, pairs, rows_P)
        return _sum_rows(y, rows_P, weights, weights.shape[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        return *_unpermute_backward(grads[0].contiguous(), *ctx.saved_tensors), None, None


def _unpermute_backward(
    grad: Tensor, y: Tensor, weights: Tensor, pairs: Tensor, rows_P: Tensor
) -> tuple[Tensor, Tensor]:
    (num_tokens, k), (num_rows, width) = weights.shape, y.shape
    grad_y = launch.empty(y.shape, y.dtype, y)
    grad_weights = launch.empty(weights.shape, torch.float32, y)
    config = launch.pick(BACKWARD, tokens=num_tokens, D=width)
    block = config["BLOCK"]
    launch.launch(
        BACKWARD,
        _grid(num_tokens * k, block // 32) + _grid(num_rows, block),
        block,
        (grad, y, rows_P, pairs, weights, grad_y, grad_weights, num_tokens, k, num_rows, width,
         _by_chunks(width, grad, y, grad_y)),
        device_of=y,
        config=config,
        variant={"REAL": _NUMBERS[y.dtype], "INDEX": _INDICES[rows_P.dtype]},
    )  # fmt: skip
    return grad_y, grad_weights


def _sum_rows(y: Tensor, rows_P: Tensor, weights: Tensor | None, num_tokens: int) -> Tensor:
    """The sum of each token's rows, by their weights if there are any."""
    num_rows, width = y.shape
    out = launch.empty((num_tokens, width), y.dtype, y)
    k = rows_P.numel() // max(num_tokens, 1)
    config = launch.pick(UNPERMUTE, tokens=num_tokens, D=width)
    launch.launch(
        UNPERMUTE,
        num_tokens,
        config["BLOCK"],
        (y, rows_P, weights, out, k, num_rows, width, _by_chunks(width, y, out)),
        device_of=y,
        config=config,
        variant={"REAL": _NUMBERS[y.dtype], "INDEX": _INDICES[rows_P.dtype]},
    )
    return out


def _grid(work: int, per_block: int) -> int:
    return -(-work // per_block)


def _by_chunks(width: int, *tensors: Tensor) -> int:
    return int(width % 8 == 0 and all(tensor.data_ptr() % 16 == 0 for tensor in tensors))
