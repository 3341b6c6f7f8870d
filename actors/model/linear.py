"""Products of activations and weights, whatever the weights are held in: plain numbers, or FP8 with a scale per row.

    w [N, K] --range search, a scale per row--> codes (e4m3), scales [N, 1]
    x [T, K] --if asked, each row by its amax--> codes, scales [T, 1]
    y = (codes_x @ codes_w^T) * scales_x * scales_w^T           products of e4m3 numbers, summed in fp32

On CUDA that is what `torch._scaled_mm` and `torch._scaled_grouped_mm` compute. On a CPU the same weights are multiplied
out once, so that a product costs what it costs in fp32: it differs from the formula by rounding alone. Scales come from
the weights and nothing else: the FP8 policy of a version is the same in every worker, and after every restart. Knows
nothing of layers, phases or schedules.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels.gemv import moe_gemv
from ...kernels.precision import fp8_dequant, fp8_quant, range_search

ROWS_AT_ONCE = 512
"""Rows that are searched together on a CPU, so that they stay in its cache."""

FEW_ROWS = 8
"""Up to so many per expert on average FP8 weights are multiplied as they are read, without a copy in x's dtype."""


class Held(Protocol):
    """A weight that is no plain tensor."""

    def linear(self, x: Tensor) -> Tensor:
        """See `linear`."""

    def grouped_linear(self, x: Tensor, ends: Tensor) -> Tensor:
        """See `grouped_linear`."""


Weight = Tensor | Held


def linear(x: Tensor, w: Weight) -> Tensor:
    """x [T, K] times the transpose of w [N, K] -> [T, N], of x's dtype."""
    return F.linear(x, w) if isinstance(w, Tensor) else w.linear(x)


def grouped_linear(x: Tensor, w: Weight, ends: Tensor) -> Tensor:
    """x [T, K], sorted by expert, each row times the transpose of its expert's matrix in w [E, N, K] -> [T, N].

    Expert e has the rows up to ends[e], int32 [E], from where those of the expert before end.
    """
    if isinstance(w, Tensor):
        return F.grouped_mm(x, w.transpose(1, 2), offs=ends)
    return w.grouped_linear(x, ends)


@dataclass(frozen=True, slots=True)
class Fp8Weight:
    """One matrix, or one for each expert."""

    codes: Tensor
    """float8_e4m3fn [N, K] or [E, N, K]"""
    scales: Tensor
    """float32 [N, 1] or [E, N, 1]: what a code is multiplied by"""
    values: Tensor | None
    """float32, like `codes`: codes * scales, where FP8 is emulated; None on CUDA"""
    fp8_inputs: bool
    """Whether activations become FP8, too, each row by its own amax"""

    def experts(self, ids: Tensor) -> Fp8Weight:
        """The matrices of some experts, int64 [n], each as often as it is named."""
        codes = self.codes.view(torch.uint8)[ids].view(torch.float8_e4m3fn)
        values = None if self.values is None else self.values[ids]
        return Fp8Weight(codes, self.scales[ids], values, self.fp8_inputs)

    def linear(self, x: Tensor) -> Tensor:
        """See the function `linear`. On CUDA N and K are multiples of 16 where activations are FP8."""
        if self.values is not None:
            return F.linear(self._seen(x), self.values)
        if not self.fp8_inputs:
            return F.linear(x, self._numbers(x.dtype))
        inputs = fp8_quant(x.contiguous(), "row")
        y = torch._scaled_mm(
            inputs.codes_RC, self.codes.t(), inputs.scales, self.scales.t(), out_dtype=torch.bfloat16
        )  # fmt: skip
        return y.to(x.dtype)

    def grouped_linear(self, x: Tensor, ends: Tensor) -> Tensor:
        """See the function `grouped_linear`. On CUDA N and K are multiples of 16 where activations are FP8."""
        if self.values is not None:
            return F.grouped_mm(self._seen(x), self.values.transpose(1, 2), offs=ends)
        if not self.fp8_inputs and len(x) <= FEW_ROWS * len(self.codes):
            return moe_gemv(x.contiguous(), ends, self.codes, self.scales.squeeze(2))
        if not self.fp8_inputs:
            return F.grouped_mm(x, self._numbers(x.dtype).transpose(1, 2), offs=ends)
        inputs = fp8_quant(x.contiguous(), "row")
        scales = inputs.scales.squeeze(1), self.scales.squeeze(2)
        y = torch._scaled_grouped_mm(
            inputs.codes_RC, self.codes.transpose(1, 2), *scales, offs=ends, out_dtype=torch.bfloat16
        )  # fmt: skip
        return y.to(x.dtype)

    def _seen(self, x: Tensor) -> Tensor:
        """What is left of activations: all of it, or their FP8 numbers, float32."""
        if not self.fp8_inputs:
            return x
        inputs = fp8_quant(x.contiguous(), "row")
        return fp8_dequant(inputs.codes_RC, inputs.scales, "row")

    def _numbers(self, dtype: torch.dtype) -> Tensor:
        return self.codes.to(dtype) * self.scales.to(dtype)


def quantize(w: Tensor, *, fp8_inputs: bool = False) -> Fp8Weight:
    """A weight [N, K] or [E, N, K], float32 or bfloat16, in FP8: each row by `range_search`.

    Raises FloatingPointError for a weight that is not finite: in FP8 it would pass for a large one.
    """
    if not w.isfinite().all():
        raise FloatingPointError("a weight that is not finite can't be FP8")
    rows = w.detach().reshape(-1, w.shape[-1]).contiguous()
    parts = [range_search(part) for part in rows.split(len(rows) if rows.is_cuda else ROWS_AT_ONCE)]
    codes = torch.cat([part.codes_RC.view(torch.uint8) for part in parts]).view(torch.float8_e4m3fn)
    scales = torch.cat([part.scales_R1 for part in parts])
    values = None if rows.is_cuda else fp8_dequant(codes, scales, "row").view(w.shape)
    return Fp8Weight(codes.view(w.shape), scales.view(*w.shape[:-1], 1), values, fp8_inputs)
