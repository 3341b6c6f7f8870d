"""Compiles kernels/cuda/*.cu by NVRTC, without a GPU if need be, and keeps the result on disk.

    source + includes + options + architecture + compiler --key--> <cache>/<key>.json, .cubin

With the binary comes what the compiler reports: registers, spills, shared memory. Knows nothing of tensors or launches.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

SOURCES = Path(__file__).parent / "cuda"
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
"""What every kernel must compile for: A100, H100 and H200, B200."""


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What one kernel needs, as the compiler reports it."""

    registers: int
    """Per thread."""
    spill_bytes: int
    """Stored to and loaded from local memory, per thread."""
    stack_bytes: int
    """Local memory per thread, that of spills included."""
    shared_bytes: int
    """Static shared memory per block."""


@dataclass(frozen=True)
class Binary:
    """A compiled source file."""

    cubin: bytes
    usage: Mapping[str, Usage]
    """Kernel -> what it needs."""


def compile_source(source: str, defines: Mapping[str, int | str], architecture: str) -> Binary:
    """The binary of `source` (a file of kernels/cuda, or a path) for `architecture` ("sm_90"), from the cache if there.

    Raises RuntimeError with the compiler's messages if it does not compile, ImportError if NVRTC is not installed.
    """
    path = SOURCES / source
    options = [f"-arch={architecture}", "-std=c++17", "-fmad=false", "--ptxas-options=-v"]
    options += [f"-D{name}={value}" for name, value in sorted(defines.items())]
    nvrtc = _nvrtc()
    key = _key(path, options, nvrtc)
    folder = cache_folder()
    binary = _load(folder, key)
    if binary is None:
        options += [f"-I{include}" for include in (path.parent, SOURCES, *nvidia_includes())]
        binary = _compile(nvrtc, path, options)
        _save(folder, key, binary)
    return binary


def cache_folder() -> Path:
    """Where binaries are kept: HEADRACE_CACHE, or headrace/ in the user's cache folder."""
    if folder := os.environ.get("HEADRACE_CACHE"):
        return Path(folder) / "kernels"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "headrace" / "kernels"


def source_text(path: Path) -> str:
    """The text of `path` with our own includes in their places: what decides the binary, NVIDIA's headers apart."""

    def inline(match: re.Match[str]) -> str:
        included = path.parent / match[1]
        return source_text(included) if included.exists() else match[0]

    return re.sub(r'^#include "(.*)"', inline, path.read_text(), flags=re.MULTILINE)


def kernel_names(source: str) -> list[str]:
    """The kernels that a source file defines."""
    text = re.sub(r"//[^\n]*", "", (SOURCES / source).read_text())
    return re.findall(r'extern\s+"C"\s+__global__\s+void\s+(?:__launch_bounds__\([^)]*\)\s+)?(\w+)\s*\(', text)


@cache
def nvidia_includes() -> tuple[Path, ...]:
    """Folders with NVIDIA's headers: of the installed wheels, else of CUDA_PATH or /usr/local/cuda."""
    toolkit = Path(os.environ.get("CUDA_PATH", "/usr/local/cuda"))
    found = [*(folder / "include" for folder in _wheels()), toolkit / "include"]
    return tuple(folder for folder in found if (folder / "vector_types.h").exists())[:1]


def _wheels() -> Iterator[Path]:
    spec = find_spec("nvidia")
    for folder in (spec and spec.submodule_search_locations) or ():
        yield from sorted(Path(folder).glob("cu[0-9]*"), reverse=True)


@cache
def _nvrtc() -> Any:
    # cupy looks in site-packages only and misses wheels elsewhere on the path; what is loaded already it finds.
    for folder in _wheels():
        for library in sorted((folder / "lib").glob("libnvrtc.so*"))[:1]:
            ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    from cupy.cuda import nvrtc

    return nvrtc


def _key(path: Path, options: list[str], nvrtc: ModuleType) -> str:
    import cupy

    parts = [source_text(path), *options, cupy.__version__, str(nvrtc.getVersion())]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _compile(nvrtc: Any, path: Path, options: list[str]) -> Binary:
    program = nvrtc.createProgram(path.read_text(), path.name, (), ())
    try:
        nvrtc.compileProgram(program, tuple(options))
        return Binary(nvrtc.getCUBIN(program), _report(nvrtc.getProgramLog(program)))
    except nvrtc.NVRTCError as error:
        raise RuntimeError(f"{path} does not compile with {options}:\n{nvrtc.getProgramLog(program)}") from error
    finally:
        nvrtc.destroyProgram(program)


def _report(log: str) -> dict[str, Usage]:
    usage = {}
    for part in log.split("Compiling entry function ")[1:]:
        name = part[1 : part.index("'", 1)]
        usage[name] = Usage(
            registers=_number(r"Used (\d+) registers", part),
            spill_bytes=_number(r"(\d+) bytes spill stores", part) + _number(r"(\d+) bytes spill loads", part),
            stack_bytes=_number(r"(\d+) bytes stack frame", part),
            shared_bytes=_number(r"(\d+) bytes smem", part, missing=0),
        )
    return usage


def _number(pattern: str, text: str, missing: int | None = None) -> int:
    match = re.search(pattern, text)
    if match is None and missing is None:
        raise RuntimeError(f"the compiler's report has no {pattern!r}; is this release of NVRTC a newer one?\n{text}")
    return int(match[1]) if match else missing or 0


def _load(folder: Path, key: str) -> Binary | None:
    try:
        usage = json.loads((folder / f"{key}.json").read_text())
        cubin = (folder / f"{key}.cubin").read_bytes()
    except OSError:
        return None
    if usage.pop("cubin_sha256") != hashlib.sha256(cubin).hexdigest():
        return None  # cut short by a crash: compile again
    return Binary(cubin, {name: Usage(**values) for name, values in usage.items()})


def _save(folder: Path, key: str, binary: Binary) -> None:
    """Each file appears whole: other processes may do the same just now. A cache that can't be written is none."""
    report = {name: asdict(usage) for name, usage in binary.usage.items()}
    text = json.dumps(report | {"cubin_sha256": hashlib.sha256(binary.cubin).hexdigest()}, indent=1)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for suffix, content in ((".cubin", binary.cubin), (".json", text.encode())):
            with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
                file.write(content)
            os.replace(file.name, folder / (key + suffix))
    except OSError:
        return
