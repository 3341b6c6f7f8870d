"""Every kernel in every configuration compiles for every architecture without spills; the cache returns what it got."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from headrace.kernels import build
from headrace.kernels.specs import all_specs

pytest.importorskip("cupy", reason="needs cupy and NVRTC (the extra `test`)")

MAX_REGISTERS = 255
MAX_SHARED_BYTES = 48 * 1024


SPECS = list(all_specs())


def binaries() -> dict[tuple[str, tuple[tuple[str, int | str], ...]], list[str]]:
    """Source and macros of each binary that may be launched -> the kernels that are taken from it."""
    found: dict[tuple[str, tuple[tuple[str, int | str], ...]], list[str]] = {}
    for _, spec in SPECS:
        for config in spec.configs:
            for variant in spec.variants:
                found.setdefault((spec.source, tuple({**config, **variant}.items())), []).append(spec.name)
    return found


BINARIES = binaries()


@pytest.fixture(scope="module", autouse=True)
def cache() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HEADRACE_CACHE", str(Path(__file__).parent.parent / ".pytest_cache"))
        yield


def test_every_kernel_of_the_folder_has_its_spec():
    written = {(path.name, name) for path in build.SOURCES.glob("*.cu") for name in build.kernel_names(path.name)}
    assert written == {(spec.source, spec.name) for _, spec in SPECS}


@pytest.mark.parametrize("architecture", build.ARCHITECTURES)
@pytest.mark.parametrize(
    "binary", BINARIES, ids=lambda b: "-".join([b[0], *(f"{name}={value}" for name, value in b[1])])
)
def test_compiles_without_spills(binary, architecture: str, record_property) -> None:
    used = build.compile_source(binary[0], dict(binary[1]), architecture).usage
    for name in BINARIES[binary]:
        record_property(name, str(used[name]))
        assert used[name].spill_bytes == 0 and used[name].registers <= MAX_REGISTERS, used[name]
        assert used[name].shared_bytes <= MAX_SHARED_BYTES, used[name]


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HEADRACE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "part.cuh").write_text("constexpr int ADD = 1;\n")
    path = tmp_path / "k.cu"
    path.write_text('#include "part.cuh"\nextern "C" __global__ void k(int* x) { x[threadIdx.x] += ADD + N; }\n')
    return path


def cached(source: Path) -> int:
    return len(list((source.parent / "cache" / "kernels").glob("*.cubin")))


def test_the_cache_is_keyed_by_source_includes_options_and_architecture(source):
    def compiled(n: int = 1, architecture: str = "sm_90") -> build.Binary:
        return build.compile_source(str(source), {"N": n}, architecture)

    first = compiled()
    assert first.cubin[:4] == b"\x7fELF" and first.usage["k"].registers > 0
    assert compiled() == first and cached(source) == 1
    assert compiled(2).cubin != first.cubin and cached(source) == 2
    assert compiled(1, "sm_80").cubin != first.cubin and cached(source) == 3
    (source.parent / "part.cuh").write_text("constexpr int ADD = 5;\n")
    assert compiled().cubin != first.cubin and cached(source) == 4
    source.write_text(source.read_text().replace("+=", "-="))
    compiled()
    assert cached(source) == 5


def test_a_damaged_cache_is_compiled_anew(source):
    first = build.compile_source(str(source), {"N": 1}, "sm_90")
    [cubin] = (source.parent / "cache" / "kernels").glob("*.cubin")
    cubin.write_bytes(first.cubin[:100])
    assert build.compile_source(str(source), {"N": 1}, "sm_90").cubin == first.cubin == cubin.read_bytes()


def test_a_cache_that_cannot_be_written_is_none(source, monkeypatch):
    monkeypatch.setenv("HEADRACE_CACHE", str(source))
    assert build.compile_source(str(source), {"N": 1}, "sm_90").usage["k"].spill_bytes == 0


def test_errors_and_spills_are_seen(source):
    with pytest.raises(RuntimeError, match=r'(?s)k\.cu does not compile.*identifier "N" is undefined'):
        build.compile_source(str(source), {}, "sm_90")
    body = "float s[64]; for (int i = 0; i < 64; ++i) s[i] = x[i * 1024 + threadIdx.x]; __syncthreads();"
    body += "for (int r = 0; r < 9; ++r) for (int i = 0; i < 64; ++i) s[i] = s[i] * s[(i + 7) % 64]; __syncthreads();"
    body += "for (int i = 0; i < 64; ++i) x[i * 1024 + threadIdx.x] = s[i];"
    source.write_text(f'extern "C" __global__ void __launch_bounds__(1024, 2) k(float* x) {{ {body} }}\n')
    usage = build.compile_source(str(source), {}, "sm_90").usage["k"]
    assert usage.spill_bytes > 0 and usage.registers <= 32


def test_cupy_is_not_imported_at_import():
    code = "import sys, headrace.kernels.launch; print(sorted({'cupy', 'nvidia'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "[]\n", done.stderr
