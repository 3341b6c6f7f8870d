"""One GPU as the carriers use it: memory, copies and checksums, through cupy.

    adopt(tensor) -> array       a tensor of torch or cupy, as an array of the numpy dtype that holds its bits; no copy
    here()                       a block whose work goes to this GPU, in order, on a stream that waits for no other

cupy is imported when the first of these is called, and nothing is started before. A checksum is that of the kernels'
buckets (kernels/reference/bucket.py), computed where the bytes are. Knows nothing of plans, versions or NCCL.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from ..errors import BadWeights, TransferFailed
from . import device_fp8
from .cuda import cupy, gpu_uuid
from .header import stored
from .payload import MAX_FINITE

WORD_MASK = (1 << 64) - 1

CHECKSUM_SOURCE = """
unsigned long long total = 0;
for (long long k = i; k < count; k += _ind.size()) {
  unsigned long long z = (unsigned long long)(k + 1) * 0x9E3779B97F4A7C15ULL;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ULL;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBULL;
  total += words[k] * ((z ^ (z >> 31)) | 1);
}
partial = total;
"""
"""One thread's share of the sum over 32-bit words; cupy gives `i` and `_ind.size()`, the thread and their number."""

_PARTIAL_SUMS = 1 << 16

_NAMES = {
    "float32": "<f4", "float64": "<f8", "float16": "<f2", "int64": "<i8", "int32": "<i4", "int16": "<i2",
    "int8": "|i1", "uint8": "|u1", "bool": "|b1",
}  # fmt: skip
"""torch's names of dtypes for which numpy has another; bfloat16 and float8_e4m3fn keep theirs."""


class Gpu:
    """GPU `number`. What allocates, copies or computes is called inside `here`."""

    def __init__(self, number: int = 0) -> None:
        self.number = number
        self._checksum: Callable[..., Any] | None = None
        self._stream: Any = None

    @property
    def uuid(self) -> str:
        """See cuda.gpu_uuid."""
        return gpu_uuid(self.number)

    @contextmanager
    def here(self, stream: Any = None) -> Iterator[None]:
        """A block whose work is enqueued on this GPU; on return it is done, unless the stream is the caller's."""
        with self.on():
            if stream is None and self._stream is None:
                # One for all blocks: memory that cupy frees on a stream is used again on that stream only.
                self._stream = self.stream()
            try:
                with stream or self._stream:
                    yield
                    if stream is None:
                        self._stream.synchronize()
            except cupy().cuda.memory.OutOfMemoryError as error:
                raise TransferFailed(f"GPU {self.number} has no room: {error}; use smaller buckets") from None

    @contextmanager
    def on(self) -> Iterator[None]:
        """A block whose calls go to this GPU; what CUDA reports in it becomes TransferFailed."""
        try:
            with cupy().cuda.Device(self.number):
                yield
        except cupy().cuda.runtime.CUDARuntimeError as error:
            raise TransferFailed(f"GPU {self.number}: {error}") from None

    def stream(self) -> Any:
        """A new one, that waits for no other."""
        return cupy().cuda.Stream(non_blocking=True)

    def event(self, stream: Any) -> Any:
        """One behind all that was enqueued on a stream; it has `done`."""
        return stream.record(cupy().cuda.Event(disable_timing=True))

    def empty(self, num_bytes: int) -> Any:
        """uint8 [num_bytes]"""
        return cupy().empty(num_bytes, np.uint8)

    def new(self, dtype: str, shape: tuple[int, ...]) -> Any:
        """An array for a tensor of that dtype."""
        return cupy().empty(shape, stored(dtype))

    def from_host(self, array: np.ndarray) -> Any:
        return cupy().asarray(array)

    def to_host(self, array: Any) -> np.ndarray:
        """Waits for what was enqueued before."""
        return np.asarray(array.get())

    def address(self, array: Any) -> int:
        return int(array.data.ptr)

    def wrap(self, address: int, num_bytes: int, owner: Any = None) -> Any:
        """Memory of somebody else as uint8 [num_bytes]; `owner` lives as long as the array."""
        memory = cupy().cuda.UnownedMemory(address, num_bytes, owner, self.number)
        return cupy().ndarray((num_bytes,), np.uint8, cupy().cuda.MemoryPointer(memory, 0))

    def adopt(self, tensor: Any) -> tuple[str, Any]:
        """(name of the dtype, an array that shares the memory of `tensor`), which is contiguous and on this GPU."""
        address, contiguous = (
            (tensor.data_ptr(), tensor.is_contiguous())
            if hasattr(tensor, "data_ptr")
            else (tensor.data.ptr, tensor.flags.c_contiguous)
        )
        if not contiguous:
            raise BadWeights(f"a tensor {list(tensor.shape)} is not contiguous; publish tensor.contiguous()")
        dtype = dtype_name(tensor)
        flat = self.wrap(address, stored(dtype).itemsize * math.prod(tensor.shape), tensor)
        return dtype, flat.view(stored(dtype)).reshape(tuple(tensor.shape))

    def checksum(self, data: Any, out: Any) -> None:
        """Writes that of uint8 [a multiple of 4] into uint64 [1]; both are here."""
        if self._checksum is None:
            self._checksum = cupy().ElementwiseKernel(
                "raw uint32 words, int64 count", "uint64 partial", CHECKSUM_SOURCE, "headrace_exchange_checksum"
            )
        words = data.view(np.uint32)
        partial = cupy().empty(min(_PARTIAL_SUMS, max(1, len(words))), np.uint64)
        self._checksum(words, np.int64(len(words)), partial)
        out[:] = partial.sum(dtype=np.uint64) + np.uint64(mix(-1 - data.nbytes))

    def quantize(self, box: Any, dtype: str, codes: Any, scales: Any) -> None:
        """See device_fp8."""
        device_fp8.quantize(box, dtype, codes, scales)

    def dequantize(self, codes: Any, scales: Any, dtype: str, box: Any) -> None:
        device_fp8.dequantize(codes, scales, dtype, box)

    def largest(self, arrays: Sequence[Any]) -> np.ndarray:
        """The largest element of each, as float64; integers above 2^53 are rounded."""
        return self.to_host(cupy().stack([array.max().astype(np.float64) for array in arrays]))


def refuse_non_finite(device: Gpu, arrays: Mapping[str, tuple[str, Any]], version: int) -> None:
    """Raises BadWeights if a value of name -> (dtype, array) is NaN or infinite.

    As integers, what is not finite lies above all else of its sign, see payload.py; one look at all the maxima.
    """
    names, views, least = [], [], []
    for name, (dtype, array) in arrays.items():
        if dtype in MAX_FINITE and array.size:
            signed, unsigned, bits = MAX_FINITE[dtype]
            names += [name, name]
            views += [array.view(signed), array.view(unsigned)]
            least += [bits, bits + (1 << 8 * array.itemsize - 1)]
    if not names:
        return
    bad = device.largest(views) >= np.array(least, np.float64)
    if bad.any():
        raise BadWeights(
            f"{names[int(bad.argmax())]} of version {version} has values that are not finite (NaN, infinity) and was "
            "not published. Look at the loss of the last step, lower the learning rate, or go back to a checkpoint"
        )


def dtype_name(tensor: Any) -> str:
    """header's name for the dtype of a tensor of torch, cupy or numpy. Raises BadWeights if it can't travel."""
    name = str(tensor.dtype).removeprefix("torch.")
    name = _NAMES.get(name, name)
    try:
        stored(name)
    except KeyError:
        raise BadWeights(f"a tensor {list(tensor.shape)} has dtype {tensor.dtype}, which can't travel") from None
    return name


def mix(index: int) -> int:
    """SplitMix64's finalizer, made odd, as in the kernel."""
    z = (index + 1) * 0x9E3779B97F4A7C15 & WORD_MASK
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & WORD_MASK
    z = (z ^ z >> 27) * 0x94D049BB133111EB & WORD_MASK
    return (z ^ z >> 31) | 1
