"""Weights as FP8 while they travel: e4m3 codes of a row and one float32 scale for it, a half of bfloat16's bytes.

    scale = max |row| / 448        code = e4m3(value / scale), rounded to nearest, ties to even

e4m3 ("fn"): 4 bits of exponent, bias 7, 3 bits of mantissa, no infinity, largest value 448 (arXiv 2209.05433, table 1).
The relative error of a value is at most 2^-4, that of values below max / 2^15 larger. Knows nothing of buckets.
"""

from __future__ import annotations

import numpy as np

from .header import stored

LARGEST = 448.0
"""The largest finite e4m3 value."""

_SUBNORMAL_STEP = 2.0**-9
_SMALLEST_NORMAL = 2.0**-6
_NAN = 0x7F


def as_float(array: np.ndarray, dtype: str) -> np.ndarray:
    """The values of an array of `dtype` (<f4, <f2, bfloat16) as float32."""
    if dtype == "bfloat16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32, copy=False)


def from_float(values: np.ndarray, dtype: str) -> np.ndarray:
    """float32 as an array of `dtype`; bfloat16 rounds to nearest, ties to even."""
    if dtype == "bfloat16":
        bits = values.view(np.uint32)
        return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    return values.astype(stored(dtype), copy=False)


def encode(values: np.ndarray) -> np.ndarray:
    """float32 -> e4m3 codes, uint8: nearest, ties to even; clamped to +-448, infinity too; NaN stays NaN."""
    magnitude = np.abs(values)
    bits = magnitude.view(np.uint32)
    # Drops 20 of the 23 bits of mantissa, and takes the difference of the two biases off the exponent.
    code = ((bits + 0x7FFFF + (bits >> 20 & 1)) >> 20).astype(np.int32) - ((127 - 7) << 3)
    with np.errstate(invalid="ignore"):
        small = np.rint(np.minimum(magnitude, _SMALLEST_NORMAL) / _SUBNORMAL_STEP)
        code = np.where(magnitude < _SMALLEST_NORMAL, np.nan_to_num(small).astype(np.int32), np.minimum(code, 0x7E))
    code = np.where(np.isnan(values), _NAN, code)
    codes: np.ndarray = (code | np.signbit(values).astype(np.int32) << 7).astype(np.uint8)
    return codes


def decode(codes: np.ndarray) -> np.ndarray:
    """e4m3 codes, uint8 -> float32."""
    values: np.ndarray = _VALUES[codes]
    return values


def quantize(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float32 [n, k] -> codes uint8 [n, k], scales float32 [n]. Raises ValueError if a value is not finite."""
    largest = np.abs(rows).max(1, initial=0.0)
    if not np.isfinite(largest).all():
        raise ValueError(f"{int((~np.isfinite(rows)).sum())} of {rows.size} values are not finite (NaN, infinity)")
    scales = np.where(largest > 0, largest / np.float32(LARGEST), 1).astype(np.float32)
    scales = np.maximum(scales, np.finfo(np.float32).tiny)
    return encode(rows / scales[:, None]), scales


def dequantize(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """codes uint8 [n, k], scales float32 [n] -> float32 [n, k]."""
    rows: np.ndarray = decode(codes) * scales[:, None]
    return rows


def _values() -> np.ndarray:
    codes = np.arange(256)
    exponent, mantissa = codes >> 3 & 15, codes & 7
    normal = (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    values = np.where(exponent == 0, mantissa * _SUBNORMAL_STEP, normal)
    values[codes & 0x7F == _NAN] = np.nan
    return np.where(codes & 0x80, -values, values).astype(np.float32)


_VALUES = _values()
