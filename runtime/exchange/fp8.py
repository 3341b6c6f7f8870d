"""Weights as FP8 while they travel: e4m3 codes of a row and one float32 scale for it, a half of bfloat16's bytes.

    scale = max |row| / 448        code = e4m3(value / scale), rounded to nearest, ties to even

e4m3 ("fn"): 4 bits of exponent, bias 7, 3 bits of mantissa, no infinity, largest value 448 (arXiv 2209.05433, table 1).
The relative error of a value is at most 2^-4, that of values below max / 2^15 larger. In buckets of a plan the codes
and scales of a box lie together (staging.py); through shared memory and the tree they travel as two tensors:

    w float32 [n, k]  -- shrink -->  w@fp8:<f4 uint8 [n, k], w@scales float32 [n]  -- restore -->  w float32 [n, k]

Knows nothing of which tensors can bear it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

import numpy as np

from ..errors import BadWeights, CorruptWeights
from .header import stored

LARGEST = 448.0
"""The largest finite e4m3 value."""

FLOATS = ("<f4", "<f2", "bfloat16")
"""Dtypes that can travel as FP8."""

_CODES = re.compile(rf"(.*)@fp8:({'|'.join(FLOATS)})")
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


def shrink(
    tensors: Mapping[str, np.ndarray], names: Collection[str], *, bfloat16: Collection[str] = ()
) -> dict[str, np.ndarray]:
    """Those of `names` as codes and scales, a scale for each row of the last dimension; the others as they are.

    `bfloat16`: which of them are its bits, in uint16. Raises BadWeights if one is not finite, or of another dtype.
    """
    shrunk: dict[str, np.ndarray] = {}
    for name, array in tensors.items():
        if name not in names:
            shrunk[name] = array
            continue
        dtype = "bfloat16" if name in bfloat16 else array.dtype.str
        if dtype not in FLOATS or not array.ndim:
            raise BadWeights(f"{name} is {dtype} {list(array.shape)}: only rows of {', '.join(FLOATS)} travel as FP8")
        try:
            codes, scales = quantize(as_float(array, dtype).reshape(-1, array.shape[-1]))
        except ValueError as error:
            raise BadWeights(f"{name}: {error}; it was not published, the version before stays") from None
        shrunk[f"{name}@fp8:{dtype}"] = codes.reshape(array.shape)
        shrunk[f"{name}@scales"] = scales.reshape(array.shape[:-1])
    return shrunk


def restore(tensors: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
    """What `shrink` was given, within the error of e4m3; the same mapping where nothing was shrunk. Raises
    CorruptWeights for codes without scales."""
    found = {name: match for name in tensors if (match := _CODES.fullmatch(name))}
    if not found:
        return tensors
    scales = {f"{match[1]}@scales" for match in found.values()}
    if not scales <= tensors.keys():
        raise CorruptWeights(f"there are codes without scales: {', '.join(sorted(scales - tensors.keys()))}")
    restored: dict[str, np.ndarray] = {}
    for name, array in tensors.items():
        if (match := found.get(name)) is not None:
            values = dequantize(array.reshape(-1, array.shape[-1]), tensors[f"{match[1]}@scales"].reshape(-1))
            restored[match[1]] = from_float(values, match[2]).reshape(array.shape)
        elif name not in scales:
            restored[name] = array
    return restored


def _values() -> np.ndarray:
    codes = np.arange(256)
    exponent, mantissa = codes >> 3 & 15, codes & 7
    normal = (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    values = np.where(exponent == 0, mantissa * _SUBNORMAL_STEP, normal)
    values[codes & 0x7F == _NAN] = np.nan
    return np.where(codes & 0x80, -values, values).astype(np.float32)


_VALUES = _values()
