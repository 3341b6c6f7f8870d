"""tests/gpu/run before it meets a GPU: each of its cases, at its small sizes, on the CPU and under the shim."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


class Clock:
    """In place of a GPU: runs what it is to time, and says that it took a second."""

    copy_rate = 1e9

    def each(self, run: Callable[[], Any], runs: int = 3) -> list[float]:
        run()
        return [1.0] * runs

    def seconds(self, run: Callable[[], Any], runs: int = 3) -> float:
        return self.each(run, runs)[0]


@needs_shim
def test_what_the_script_does_with_a_case(monkeypatch, tmp_path):
    """All but the clock and the graph: checks, figures, bars, the recorded table and the printed one."""
    import measure
    import session

    from headrace.kernels.timings import Timings

    monkeypatch.setattr(measure, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(measure, "graphed", lambda run: run)
    monkeypatch.setattr(measure, "architecture", lambda: "sm_90")
    [case] = [case for case in CASES if case.name == "align"]
    case = dataclasses.replace(case, large=case.small[-1])
    broken = dataclasses.replace(case, run=lambda *args: (rows := case.run(*args))._replace(load_E=rows.load_E + 1))
    shaky = iter(range(1000))
    unsteady = dataclasses.replace(case, run=lambda *_: torch.tensor([next(shaky)]), exact=lambda *_: torch.tensor([0]))
    with backend(ShimBackend(1)):
        assert measure.wrong(case, 3, large=True, repeats=2) == ""
        assert "result 1: " in measure.wrong(broken, 3, large=True, repeats=2)
        assert "two runs differ" in measure.wrong(unsteady, 3, large=False, repeats=2)
        monkeypatch.setattr(measure, "_compiled_seconds", lambda *_: 3.0)
        figures = {"align": measure.timed(case, Clock(), 3)}
        table = Timings("none", measured=False)
        measure.record(case, Clock(), table, [*case.small], 3)
    assert figures["align"] == {"seconds": 1.0, "graph_seconds": 1.0, "eager": 1.0, "compiled": 3.0}
    assert [(bar["name"], bar["ok"]) for bar in session._bars(case, figures["align"])] == [
        ("align_eager_ratio", False),
        ("align_compiled_ratio", False),
    ]
    assert "eager >= 5.0, compiled >= 4.0" in session._table([case], figures, 1e12)
    table.write(tmp_path / "timings.json")
    cells = Timings.read(tmp_path / "timings.json").cells
    assert {name: [cell.load.tokens for cell in row] for name, row in cells.items()} == {
        "align_count/E40": [4800],
        "align_count/E12": [7200],
    }
    assert len(cells["align_count/E12"][0].seconds) == len(case.spec.configs)


def test_what_the_script_measures_of_decoding(capsys):
    """At a small size, without a graph; there the figures mean nothing."""
    import decode_session

    from headrace.actors.model.config import ModelConfig
    from headrace.actors.rollout.graphs import Eager, why_no_cuda

    config = ModelConfig(vocab_size=32, hidden_size=32, num_layers=1, num_experts=4, moe_intermediate_size=16)
    work = decode_session.make_work(config, num_slots=3, prompt=4, most=12, median=4)
    figures = decode_session.measure(work, Eager(), 1e9, repeats=1)
    assert set(figures) == {
        "decode_tokens_per_s", "decode_generate_tokens_per_s", "decode_to_generate_ratio",
        "decode_of_memory_floor_ratio", "decode_lengths_p99_to_mean", "decode_captured_steps",
    }  # fmt: skip
    assert all(value > 0 for value in figures.values())
    if why_no_cuda():
        assert decode_session.main(1.0) == {}
        assert "not yet measured on a GPU" in capsys.readouterr().out
