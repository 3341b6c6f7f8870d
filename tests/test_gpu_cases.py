"""tests/gpu/run before it meets a GPU: each of its cases, at its small sizes, on the CPU and under the shim."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from shim import ShimBackend, needs_shim

from headrace.kernels.launch import backend

HERE = Path(__file__).parent / "gpu"
sys.path.insert(0, str(HERE))
from case import Case, cases, difference  # noqa: E402

CASES = list(cases())


@needs_shim
@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES])
def test_case(case: Case) -> None:
    for seed, size in enumerate(case.small):
        args = case.make(size, torch.Generator().manual_seed(seed))
        assert difference(case, case.run(*args), case.exact(*args)) == "", (size, "plain torch")
        for races in (False, True):
            with backend(ShimBackend(seed, races=races)):
                assert difference(case, case.run(*args), case.exact(*args)) == "", (size, "the kernel")
        if case.eager and size == case.small[-1]:
            case.eager(*args)
        if case.moved_bytes:
            assert case.moved_bytes(*args) >= 0


def test_cases_have_names_of_their_own_and_bars_that_are_measured():
    assert len({case.name for case in CASES}) == len(CASES)
    for case in CASES:
        assert set(case.bars) <= {"copy", "eager", "compiled"}
        assert "copy" not in case.bars or case.moved_bytes
        assert not {"eager", "compiled"} & set(case.bars) or case.eager


def test_differences_are_seen():
    x = torch.arange(4.0)

    def case(rtol: float) -> Case:
        return Case(name="x", small=(), large=(), make=lambda *_: (), run=lambda: x, exact=lambda: x, rtol=rtol)

    assert difference(case(0), (x, None), (x,)) == ""
    assert "2 results instead of 1" in difference(case(0), (x, x), x)
    assert "shape [4] instead of [2]" in difference(case(0), x, x[:2])
    assert "1 of 4 values, the worst 3.0 instead of 3.5 at 3" in difference(case(1e-3), x, x.double() + 0.5 * (x > 2))
    assert difference(case(0.2), x, x.double() + 0.5 * (x > 2)) == ""
    assert "1 of 4" in difference(case(0.2), x, torch.tensor([0, 1, 2, torch.nan]))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_cuda_the_script_says_so():
    done = subprocess.run(
        [sys.executable, "-P", str(HERE / "run")], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 2, done.stderr
    assert "no CUDA here" in done.stdout and "Traceback" not in done.stderr
