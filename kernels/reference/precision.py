"""FP8 (e4m3) quantization in plain torch: what a scale is, which code a value gets, and which scale fits a row best.

    x_RC --amax of a block--> scale = amax / 448 --> code = e4m3(clamp(x / scale)) --> x' = code * scale

e4m3 has 3 bits of mantissa, normal numbers from 2^-6 to 448, no infinity. Values that are not finite take no part in a
block's amax; an infinity gets the code of +-448, NaN the code 0x7F. R rows, any number; C columns, at least one. Every
result is defined to the bit: sums that decide something are taken in float64, so their order does not show. Knows
nothing of models, nor of when a weight is quantized.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

E4M3_MAX = 448.0
"""The largest e4m3 number."""
MIN_AMAX = 2.0**-100
"""A smaller amax counts as this one, so that a scale and its reciprocal are normal float32 numbers."""
SIDE = 128
"""Of a tile, and length of a group."""
NUM_CANDIDATES = 33
"""Scales that `range_search` tries: from amax / 448 down to half of it, in equal steps."""

_SIGN_AND_CODE = -(2**31) + (0x7F << 20)

Block = Literal["row", "1x128", "128x128"]
"""What shares a scale. The scales of x_RC are [R, 1], [R, ceil(C / 128)] or [ceil(R / 128), ceil(C / 128)]."""
BLOCKS: tuple[Block, ...] = get_args(Block)


class Quantized(NamedTuple):
    """A matrix in FP8."""

    codes_RC: Tensor
    """float8_e4m3fn"""
    scales: Tensor
    """float32, by block: what a code is multiplied by"""
    amax: Tensor
    """float32, by block: largest absolute value of those that are finite; 0 if there are none"""


class Fitted(NamedTuple):
    """A matrix in FP8 with one scale per row that was searched for."""

    codes_RC: Tensor
    """float8_e4m3fn"""
    scales_R1: Tensor
    """float32: what a code is multiplied by; fitted to the codes, so not the scale that they were rounded with"""
    encode_R1: Tensor
    """float32: the scale that the codes were rounded with"""
    choice_R: Tensor
    """int32: which candidate that is, 0 being amax / 448"""


def fp8_quant(x_RC: Tensor, block: Block, *, pow2: bool = False, scales: Tensor | None = None) -> Quantized:
    """Quantizes float32 or bfloat16 [R, C], each block by its amax or, if given, by `scales` of earlier amax.

    With `pow2` a scale is the smallest power of two that fits, so that products with it are exact.
    """
    rows, columns = x_RC.shape
    tall = SIDE if block == "128x128" else 1
    wide = columns if block == "row" else SIDE
    x = x_RC.float()
    padded = F.pad(torch.where(x.isfinite(), x.abs(), 0.0), (0, -columns % wide, 0, -rows % tall))
    tiles = padded.unflatten(1, (-1, wide)).unflatten(0, (-1, tall))
    amax = tiles.amax(dim=(1, 3))
    if scales is None:
        scales = scale_of(amax, pow2=pow2)
    return Quantized(encode(x, spread(scales, block, rows, columns)), scales, amax)


def fp8_dequant(codes_RC: Tensor, scales: Tensor, block: Block) -> Tensor:
    """Back to float32 [R, C]."""
    return codes_RC.float() * spread(scales, block, *codes_RC.shape)


def scale_of(amax: Tensor, *, pow2: bool) -> Tensor:
    """The scale by which `amax`, float32, becomes at most 448: amax / 448, or the power of two at or above it."""
    amax = amax.clamp(min=MIN_AMAX)
    if not pow2:
        return amax / torch.full_like(amax, E4M3_MAX)  # by a number, torch's CUDA division would take the reciprocal
    mantissa, exponent = torch.frexp(amax)  # 448 = 0.875 * 2**9
    exponent = exponent - 9 + (mantissa > 0.875).int()
    return ((exponent + 127) << 23).view(torch.float32)


def spread(scales: Tensor, block: Block, rows: int, columns: int) -> Tensor:
    """Scales by block -> one for each element, [R, C]."""
    if block == "row":
        return scales.expand(rows, columns)
    wide = scales.repeat_interleave(SIDE, dim=1)[:, :columns]
    return wide.repeat_interleave(SIDE, dim=0)[:rows] if block == "128x128" else wide


def encode(x: Tensor, scales: Tensor) -> Tensor:
    """The code of each value under its scale: x times the reciprocal, clamped, rounded to the nearest, ties to even."""
    scaled = x * (1.0 / scales)
    codes = scaled.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return codes.view(torch.uint8).masked_fill(scaled.isnan(), 0x7F).view(torch.float8_e4m3fn)


def amax_scales(history_HN: Tensor, amax_N: Tensor, slot: int, *, pow2: bool = False) -> Tensor:
    """Puts `amax_N` into row `slot` of the history, in place; returns the scales of the largest amax of each column.

    Delayed scaling: the next batch is quantized by what the last H batches needed, so it is read once.
    """
    history_HN[slot] = amax_N
    return scale_of(history_HN.amax(0), pow2=pow2)


def range_search(w_RC: Tensor, moment_C: Tensor | None = None) -> Fitted:
    """Quantizes a weight matrix, each row by the scale with the smallest error on its output.

    moment_C is the mean square of the input that column c of w is multiplied with: the diagonal of the Hessian of the
    output's squared error (GPTQ, arXiv 2210.17323, section 2); what is not positive and finite counts as 0, and without
    it all columns count alike. A smaller scale clips the largest weights and rounds all others more finely; it is taken
    if the sum of moment * (w - code * scale)^2 is smaller. Then the scale is replaced by the one that fits these codes
    best, sum(m w q) / sum(m q q). Not finite weights take no part.
    """
    w = w_RC.float()
    known = w.isfinite()
    finite = torch.where(known, w, 0.0)
    widest_R1 = scale_of(finite.abs().amax(1, keepdim=True), pow2=False)
    moment = w.new_ones(w.shape[1]) if moment_C is None else moment_C.float()
    moment_RC = torch.where(known, torch.where((moment > 0) & moment.isfinite(), moment, 0.0), 0.0)

    best_R1 = torch.full_like(widest_R1, torch.inf, dtype=torch.float64)
    encode_R1, choice_R1 = widest_R1.clone(), torch.zeros_like(widest_R1, dtype=torch.int32)
    for candidate in range(NUM_CANDIDATES):
        scale_R1 = widest_R1 * (1.0 - candidate / (2.0 * (NUM_CANDIDATES - 1)))
        miss = finite - _rounded(finite, scale_R1) * scale_R1
        error_R1 = _total(moment_RC * (miss * miss))
        better = error_R1 < best_R1
        best_R1 = torch.where(better, error_R1, best_R1)
        encode_R1 = torch.where(better, scale_R1, encode_R1)
        choice_R1 = torch.where(better, candidate, choice_R1)
    q = _rounded(finite, encode_R1)
    return Fitted(encode(w, encode_R1), _refit(moment_RC, finite, q, encode_R1), encode_R1, choice_R1.squeeze(1))


def _rounded(w: Tensor, scale: Tensor) -> Tensor:
    """The e4m3 numbers nearest to w / scale, for finite w.

    As bits of a float32 a code is 2^120 times too small: its exponent counts from 7, not from 127. To multiply takes a
    fraction of the time that torch's conversion takes on a CPU.
    """
    codes = (w * (1.0 / scale)).clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    bits = (codes.view(torch.int8).int() << 20) & _SIGN_AND_CODE
    return bits.view(torch.float32) * 2.0**120


def _refit(moment: Tensor, w: Tensor, q: Tensor, otherwise: Tensor) -> Tensor:
    """The scale a per row that minimizes sum(moment * (w - a q)^2); `otherwise` where every code is zero."""
    along, norm = _total((moment * w) * q), _total((moment * q) * q)
    fitted = along / norm
    return torch.where((norm > 0) & (fitted > 0) & fitted.isfinite(), fitted.float(), otherwise)


def _total(terms_RC: Tensor) -> Tensor:
    """Row sums [R, 1] in float64, of sums of 4 in float32: the order in which a thread of the kernel adds."""
    fours = F.pad(terms_RC, (0, -terms_RC.shape[1] % 4)).unflatten(1, (-1, 4))
    sums: Tensor = fours[..., 0] + fours[..., 1] + fours[..., 2] + fours[..., 3]
    return sums.double().sum(1, keepdim=True)
