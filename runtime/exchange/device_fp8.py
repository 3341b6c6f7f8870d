"""FP8 on a GPU: the codes of fp8.py, bit for bit, one thread for a value. See there for what they are.

Rows are taken some at a time, so that their float32 values need little memory. Knows nothing of buckets.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np

from . import fp8
from .cuda import cupy

CHUNK_VALUES = 1 << 22
"""Values that are float32 at once."""

ENCODE_SOURCE = """
union { float value; unsigned int bits; } it;
it.value = x / scale;
unsigned int sign = it.bits >> 31 << 7;
it.bits &= 0x7FFFFFFF;
int found = (int)((it.bits + 0x7FFFF + (it.bits >> 20 & 1)) >> 20) - 960;
if (it.bits > 0x7F800000) found = 0x7F;
else if (it.value < 0.015625f) found = (int)rintf(it.value * 512.0f);
else if (found > 0x7E) found = 0x7E;
code = (unsigned char)(found | sign);
"""

DECODE_SOURCE = """
int exponent = code >> 3 & 15, mantissa = code & 7;
float found = exponent ? ldexpf((float)(8 + mantissa), exponent - 10) : mantissa * 0.001953125f;
if ((code & 0x7F) == 0x7F) found = nanf("");
y = (code & 0x80 ? -found : found) * scale;
"""


def quantize(box: Any, dtype: str, codes: Any, scales: Any) -> None:
    """Rows of the last dimension of `box` into codes uint8 [values] and scales float32 [rows], all on this GPU."""
    rows, codes = box.reshape(-1, box.shape[-1]), codes.reshape(-1, box.shape[-1])
    least = np.float32(np.finfo(np.float32).tiny)
    for part in _chunks(rows):
        values = fp8.as_float(rows[part], dtype)
        largest = abs(values).max(axis=1)
        scale = cupy().where(largest > 0, largest / np.float32(fp8.LARGEST), np.float32(1))
        scales[part] = cupy().maximum(scale.astype(np.float32), least)
        _encode()(values, scales[part][:, None], codes[part])


def dequantize(codes: Any, scales: Any, dtype: str, box: Any) -> None:
    """The opposite, into `box`."""
    codes = codes.reshape(-1, box.shape[-1])
    values = cupy().empty(codes.shape, np.uint16 if dtype == "bfloat16" else box.dtype)
    for part in _chunks(codes):
        values[part] = fp8.from_float(_decode()(codes[part], scales[part][:, None]), dtype)
    box[...] = values.reshape(box.shape)


def _chunks(rows: Any) -> Iterator[slice]:
    step = max(1, CHUNK_VALUES // max(1, rows.shape[1]))
    return (slice(begin, begin + step) for begin in range(0, len(rows), step))


@cache
def _encode() -> Any:
    return cupy().ElementwiseKernel("float32 x, float32 scale", "uint8 code", ENCODE_SOURCE, "headrace_fp8_encode")


@cache
def _decode() -> Any:
    return cupy().ElementwiseKernel("uint8 code, float32 scale", "float32 y", DECODE_SOURCE, "headrace_fp8_decode")
