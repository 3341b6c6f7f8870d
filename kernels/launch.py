"""Runs a compiled kernel on tensors: on torch's current stream of a GPU, or wherever a test says.

    launch(SPEC, grid, block, (x, y, rows), config=config)
      GPU tensors --> cubin (build.py) --> the CUDA driver, on torch's current stream; no copy, no synchronisation
      CPU tensors --> the backend that a test has put in place, which runs the same .cu

The host code of an operation (checks, buffers, grid, several launches) is thus the same on both. After its first launch
on a device a kernel can be captured in a CUDA graph. Knows nothing of any one kernel.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from .build import compile_source

Config = Mapping[str, int]
"""Macros that change a kernel's speed and never its result."""


@dataclass(frozen=True, eq=False, kw_only=True)
class KernelSpec:
    """One `extern "C" __global__` function of a source file."""

    source: str
    """File in kernels/cuda."""
    name: str
    configs: tuple[Config, ...] = ({},)
    """What the tuner chooses from; the first is the default."""
    variants: tuple[Mapping[str, int | str], ...] = ({},)
    """Macros that the operation sets, such as a number format: every combination it uses."""


@dataclass(frozen=True)
class Double:
    """An argument that the kernel takes as double; a plain float goes as float."""

    value: float


Argument = Tensor | int | float | Double | None
"""A tensor goes as its address, None as the null pointer, an int as long long."""


class Backend(Protocol):
    """What runs kernels on CPU tensors, for tests."""

    def launch(
        self,
        spec: KernelSpec,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        args: Sequence[Argument],
        defines: Mapping[str, int | str],
        shared_bytes: int,
    ) -> None: ...

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor: ...


FREE_SHARED_BYTES = 48 * 1024
"""Dynamic shared memory that a kernel may use without being allowed more."""

_allowed: dict[int, int] = {}
"""Function -> the most dynamic shared memory it was allowed."""
_backend: Backend | None = None
_pick: Callable[[KernelSpec, Mapping[str, int]], Config] | None = None
_around: Callable[[KernelSpec, Config], AbstractContextManager[None]] | None = None


def runs_kernels(tensor: Tensor) -> bool:
    """Whether operations on this tensor launch kernels; if not, they compute in plain torch."""
    return tensor.is_cuda or (_backend is not None and tensor.device.type == "cpu")


@contextmanager
def backend(replacement: Backend) -> Iterator[None]:
    """Runs kernels on CPU tensors by `replacement`, in the whole process."""
    global _backend
    before, _backend = _backend, replacement
    try:
        yield
    finally:
        _backend = before


def pick(spec: KernelSpec, **situation: int) -> Config:
    """The configuration to launch with: the tuner's for this situation (such as tokens=4096), else the default."""
    return _pick(spec, situation) if _pick else spec.configs[0]


@contextmanager
def picking(choose: Callable[[KernelSpec, Mapping[str, int]], Config]) -> Iterator[None]:
    """Lets `choose(spec, situation)` decide what `pick` returns, in the whole process."""
    global _pick
    before, _pick = _pick, choose
    try:
        yield
    finally:
        _pick = before


@contextmanager
def timing(around: Callable[[KernelSpec, Config], AbstractContextManager[None]]) -> Iterator[None]:
    """Puts `around(spec, config)` around every launch, in the whole process."""
    global _around
    before, _around = _around, around
    try:
        yield
    finally:
        _around = before


def empty(shape: Sequence[int], dtype: torch.dtype, like: Tensor) -> Tensor:
    """Uninitialised memory on the device of `like`; in tests it is poisoned."""
    if _backend is not None and not like.is_cuda:
        return _backend.empty(shape, dtype)
    return torch.empty(tuple(shape), dtype=dtype, device=like.device)


def launch(
    spec: KernelSpec,
    grid: int | tuple[int, ...],
    block: int | tuple[int, ...],
    args: Sequence[Argument],
    *,
    device_of: Tensor,
    config: Config | None = None,
    variant: Mapping[str, int | str] | None = None,
    shared_bytes: int = 0,
) -> None:
    """Starts the kernel; returns without waiting. `config` defaults to the first of the spec, `variant` to none.

    Tensor arguments must be contiguous and on the device of `device_of`. An empty grid is no launch.
    """
    for position, arg in enumerate(args):
        if isinstance(arg, Tensor):
            assert arg.is_contiguous() and arg.device == device_of.device, f"argument {position} of {spec.name}"
    dimensions = _three(grid), _three(block)
    if 0 in dimensions[0]:
        return
    config = spec.configs[0] if config is None else config
    defines = {**config, **(variant or {})}
    with _around(spec, config) if _around else nullcontext():
        if device_of.is_cuda:
            _launch_cuda(spec, *dimensions, args, defines, shared_bytes, device_of.device)
        else:
            assert _backend is not None, "the caller asks runs_kernels() first"
            _backend.launch(spec, *dimensions, args, defines, shared_bytes)


def _three(size: int | tuple[int, ...]) -> tuple[int, int, int]:
    x, y, z = (*((size,) if isinstance(size, int) else size), 1, 1)[:3]
    return x, y, z


class Packed:
    """Arguments as the CUDA driver takes them: the address of an array with the address of each value."""

    def __init__(self, args: Sequence[Argument]) -> None:
        self._values = [_c_value(arg) for arg in args]
        self._addresses = (ctypes.c_void_p * len(args))(*(ctypes.addressof(value) for value in self._values))

    @property
    def address(self) -> int:
        """Valid as long as this object."""
        return ctypes.addressof(self._addresses)


def _c_value(arg: Argument) -> ctypes._SimpleCData[int] | ctypes._SimpleCData[float]:
    if isinstance(arg, Tensor):
        return ctypes.c_uint64(arg.data_ptr())
    if isinstance(arg, Double):
        return ctypes.c_double(arg.value)
    if isinstance(arg, float):
        return ctypes.c_float(arg)
    return ctypes.c_longlong(arg or 0)


def _launch_cuda(
    spec: KernelSpec,
    grid: tuple[int, int, int],
    block: tuple[int, int, int],
    args: Sequence[Argument],
    defines: Mapping[str, int | str],
    shared_bytes: int,
    device: torch.device,
) -> None:
    from cupy.cuda import driver, runtime

    packed = Packed(args)
    with torch.cuda.device(device):
        runtime.setDevice(device.index)  # a thread of autograd may not have a context yet
        function = _function(spec.source, spec.name, tuple(sorted(defines.items())), device.index)
        if shared_bytes > _allowed.get(function, FREE_SHARED_BYTES):
            driver.funcSetAttribute(function, driver.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, shared_bytes)
            _allowed[function] = shared_bytes
        stream = torch.cuda.current_stream().cuda_stream
        driver.launchKernel(function, *grid, *block, shared_bytes, stream, packed.address, 0)


@cache
def _function(source: str, name: str, defines: tuple[tuple[str, int | str], ...], device: int) -> int:
    """Address of the kernel in the device's context."""
    from cupy.cuda import driver

    return int(driver.moduleGetFunction(_module(source, defines, device), name))


@cache
def _module(source: str, defines: tuple[tuple[str, int | str], ...], device: int) -> int:
    from cupy.cuda import driver

    major, minor = torch.cuda.get_device_capability(device)
    return int(driver.moduleLoadData(compile_source(source, dict(defines), f"sm_{major}{minor}").cubin))
