"""Runs kernels/cuda/*.cu on the CPU, every thread a fiber, under an adversarial schedule (tests/shim/fibers.cpp).

    with launch.backend(ShimBackend(seed=3)):
        ids = topk_gate(logits, 8)        # the operation's own host code, its kernels on the CPU

A fault of a kernel is a KernelFault that names thread and line. Tensor arguments are copied between guard pages for the
launch. Libraries are built once for each source and configuration and kept in .pytest_cache.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from headrace.kernels.build import SOURCES, kernel_names, nvidia_includes, source_text
from headrace.kernels.launch import Argument, Double, KernelSpec, Packed

HERE = Path(__file__).parent / "shim"
CACHE = Path(__file__).parent.parent / ".pytest_cache" / "shim"
FLAGS = [
    *"-x c++ -std=c++17 -O1 -g1 -fPIC -fno-strict-aliasing -ffp-contract=off -fno-exceptions".split(),
    *"-U_FORTIFY_SOURCE -Wno-attributes -Wno-unknown-pragmas -fsanitize=bounds,signed-integer-overflow".split(),
    *"-ftrivial-auto-var-init=pattern -fstack-clash-protection -fvisibility=hidden -fvisibility-inlines-hidden".split(),
]
SLACK_LIMIT = 64 << 20
"""Larger arguments are passed as they are: a test of huge offsets can't afford the copy."""

needs_shim = pytest.mark.skipif(
    shutil.which("g++") is None or not nvidia_includes(), reason="needs g++ and NVIDIA's headers (the extra `test`)"
)


class KernelFault(Exception):
    """A kernel did what it must not do: where, who and what."""


class ShimBackend:
    """For `headrace.kernels.launch.backend`. Seed 0 is the orderly schedule; each other one is an adversary of its own.

    `only_blocks(num_blocks)` chooses the blocks that run, by their linear index; `limit_s` is CPU time for each launch.
    With `races` every load and store is watched (tests/shim/races.h): slower, and no luck with the schedule is needed.
    """

    def __init__(
        self,
        seed: int = 0,
        *,
        races: bool = False,
        only_blocks: Callable[[int], Sequence[int]] = range,
        limit_s: float = 20.0,
    ) -> None:
        self.seed = seed
        self.launches: list[str] = []
        """Names of the kernels that ran."""
        self._only_blocks = only_blocks
        self._limit_s = limit_s
        self._races = races

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Memory full of 0xCB, as shared memory is."""
        tensor = torch.empty(tuple(shape), dtype=dtype)
        if tensor.nbytes <= SLACK_LIMIT:
            ctypes.memset(tensor.data_ptr(), 0xCB, tensor.nbytes)
        return tensor

    def launch(
        self,
        spec: KernelSpec,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        args: Sequence[Argument],
        defines: Mapping[str, int | str],
        shared_bytes: int,
    ) -> None:
        runtime, library = _runtime(), _library(*_version(spec.source), tuple(sorted(defines.items())), self._races)
        self.launches.append(spec.name)
        _check_limits(spec.name, grid, block, shared_bytes)
        _check_signature(library, spec.name, args)
        memory = _Memory(runtime, args, at_end=(self.seed + len(self.launches)) % 3 != 0)
        packed = Packed(memory.args)
        blocks = list(self._only_blocks(grid[0] * grid[1] * grid[2]))
        text = ctypes.create_string_buffer(8192)
        failed = runtime.shim_launch(
            ctypes.cast(getattr(library, f"shim_call_{spec.name}"), ctypes.c_void_p),
            ctypes.c_void_p(packed.address),
            (ctypes.c_uint * 3)(*grid),
            (ctypes.c_uint * 3)(*block),
            ctypes.c_uint(shared_bytes),
            ctypes.c_void_p(library.shim_shared_begin()),
            ctypes.c_void_p(library.shim_shared_end()),
            ctypes.c_uint64(self.seed),
            ctypes.c_double(self._limit_s),
            (ctypes.c_longlong * len(blocks))(*blocks),
            ctypes.c_longlong(len(blocks)),
            ctypes.c_int(self._races),
            text,
            ctypes.c_size_t(len(text)),
        )
        beside = memory.release()
        if failed:
            raise KernelFault(f"{spec.name}: {_with_line(text.value.decode(), library)}")
        if beside >= 0:
            raise KernelFault(f"{spec.name}: somebody wrote right beside argument {beside}")


class _Memory:
    """Copies of the tensors among `args` between guard pages; tensors that overlap share one copy."""

    def __init__(self, runtime: ctypes.CDLL, args: Sequence[Argument], *, at_end: bool) -> None:
        self._runtime = runtime
        self._copies: list[tuple[int, int, int]] = []
        spans: list[list[int]] = []  # begin, end, argument
        for position, arg in enumerate(args):
            if isinstance(arg, Tensor) and arg.nbytes <= SLACK_LIMIT:
                begin = arg.data_ptr()
                span = [begin, begin + arg.nbytes, position]
                for other in [other for other in spans if other[0] < span[1] and span[0] < other[1]]:
                    span = [min(span[0], other[0]), max(span[1], other[1]), other[2]]
                    spans.remove(other)
                spans.append(span)
        for begin, end, position in spans:
            copy = runtime.shim_map(ctypes.c_size_t(end - begin), ctypes.c_int(at_end), ctypes.c_int(position))
            ctypes.memmove(copy, begin, end - begin)
            self._copies.append((begin, copy, end - begin))
        self.args = [self._moved(arg) for arg in args]

    def _moved(self, arg: Argument) -> Argument:
        if isinstance(arg, Tensor):
            for begin, copy, size in self._copies:
                if begin <= arg.data_ptr() < begin + max(size, 1):
                    return copy + arg.data_ptr() - begin
        return arg

    def release(self) -> int:
        """Copies everything back; returns the argument beside which somebody wrote, or -1."""
        for begin, copy, size in self._copies:
            ctypes.memmove(begin, copy, size)
        return int(self._runtime.shim_unmap())


def _check_limits(name: str, grid: Sequence[int], block: Sequence[int], shared_bytes: int) -> None:
    """What the CUDA driver would refuse, and what our kernels promise: whole warps."""
    threads = block[0] * block[1] * block[2]
    if not 0 < threads <= 1024 or threads % 32 or block[2] > 64:
        raise KernelFault(f"{name}: a block of {tuple(block)} threads; it must be whole warps, at most 1024 threads")
    if grid[0] >= 2**31 or grid[1] >= 2**16 or grid[2] >= 2**16 or min(grid) < 1:
        raise KernelFault(f"{name}: a grid of {tuple(grid)} blocks; the limits are 2**31-1, 65535, 65535")
    if shared_bytes > 163 * 1024:
        raise KernelFault(f"{name}: {shared_bytes} bytes of shared memory; sm_80 has 163 KiB for a block")


def _check_signature(library: ctypes.CDLL, name: str, args: Sequence[Argument]) -> None:
    """The launch must give what the kernel takes: the driver would not notice."""
    text = ctypes.create_string_buffer(4096)
    getattr(library, f"shim_signature_{name}")(text)
    wanted = [kind.strip() for kind in text.value.decode().split(",")[:-1]]
    given = [_kind(arg) for arg in args]
    same = len(wanted) == len(given) and all(
        want == got or (want[0] == got[0] == "p" and (got == "p" or want in ("p1", "p*")))
        for want, got in zip(wanted, given, strict=True)
    )
    if not same:
        raise KernelFault(
            f"{name} takes ({', '.join(wanted)}), the launch gives ({', '.join(given)}); pN: to N-byte items"
        )


def _kind(arg: Argument) -> str:
    if isinstance(arg, Tensor):
        return f"p{arg.element_size()}"
    if arg is None:
        return "p"
    return "double" if isinstance(arg, Double) else "float" if isinstance(arg, float) else "long long"


@cache
def _runtime() -> ctypes.CDLL:
    source = HERE / "fibers.cpp"
    flags = [flag for flag in FLAGS if not flag.startswith(("-fsanitize", "-fvisibility"))]
    path = _built("".join(file.read_text() for file in sorted(HERE.iterdir())), f'#include "{source}"\n', flags)
    runtime = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    runtime.shim_map.restype = ctypes.c_void_p
    return runtime


def _with_line(text: str, library: ctypes.CDLL) -> str:
    """The message with the line of the source where it has an address of the library."""
    match = re.search(r" \[code \+(0x[0-9a-f]+)\]", text)
    if match is None:
        return text
    address = hex(int(match[1], 16) - 1)  # the call, not what follows it
    done = subprocess.run(["addr2line", "-e", library._name, address], capture_output=True, text=True, check=False)
    return text.replace(match[0], f" ({Path(done.stdout.split()[0]).name})" if done.stdout.strip() else "")


def _version(source: str) -> tuple[str, int]:
    """The source and the time when it was written: a test may plant one fault after another in the same file."""
    return source, (SOURCES / source).stat().st_mtime_ns


@cache
def _library(source: str, written: int, defines: tuple[tuple[str, int | str], ...], races: bool) -> ctypes.CDLL:
    path = SOURCES / source
    flags = [*FLAGS, "-DHEADRACE_SHIM", f"-I{SOURCES}", *(f"-D{name}={value}" for name, value in defines)]
    flags += ["-fsanitize=thread"] * races
    lines = [f'#include "{HERE / "device.h"}"', "#pragma GCC visibility push(default)", "SHIM_LIBRARY"]
    lines += [f'#include "{path}"', *(f"SHIM_KERNEL({name})" for name in kernel_names(source))]
    content = source_text(path) + "".join(file.read_text() for file in sorted(HERE.iterdir()))
    library = ctypes.CDLL(str(_built(content, "\n".join(lines) + "\n", flags)))
    library.shim_shared_begin.restype = library.shim_shared_end.restype = ctypes.c_void_p
    return library


def _built(content: str, unit: str, flags: Sequence[str]) -> Path:
    """The library of a translation unit that includes the text `content`. One process builds it, the others wait."""
    flags = [*flags, f"-I{HERE}", *(f"-isystem{folder}" for folder in nvidia_includes())]
    key = hashlib.sha256("\0".join([content, unit, *flags]).encode()).hexdigest()[:24]
    CACHE.mkdir(parents=True, exist_ok=True)
    library = CACHE / f"{key}.so"
    with open(CACHE / f"{key}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            # In two steps: told of -fsanitize, the linker would bring a library of its own for what fibers.cpp answers.
            partial = CACHE / f"{key}.{os.getpid()}"
            _gxx([*flags, "-c", "-", "-o", f"{partial}.o"], unit)
            _gxx(["-shared", f"{partial}.o", "-o", str(partial)])
            Path(f"{partial}.o").unlink()
            partial.rename(library)
    return library


def _gxx(arguments: Sequence[str], text: str = "") -> None:
    done = subprocess.run(["g++", *arguments], input=text, capture_output=True, text=True, timeout=110, check=False)
    if done.returncode:
        raise KernelFault(f"g++ refuses it:\n{done.stderr}")
