"""tests/gpu/exchange before it meets a GPU: it says why it measures nothing; its case of two processes is played."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "gpu"))
import exchange_session  # noqa: E402

from headrace.runtime.exchange.cuda import why_no_gpu  # noqa: E402


def test_without_a_gpu_it_says_so_and_writes_no_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    if not why_no_gpu():
        pytest.skip("there is a GPU: run tests/gpu/exchange")
    assert exchange_session.main(["--json", str(tmp_path / "it.json")]) == 2
    written = json.loads((tmp_path / "it.json").read_text())
    assert written["figures"] == {}
    assert set(written["cases"]) == {"one_rank", "ipc", "two_ranks"}
    assert all(said.startswith("not yet measured on a GPU: ") for said in written["cases"].values())
    assert capsys.readouterr().out.count("not yet measured") == 3


@pytest.mark.slow
def test_two_processes_share_memory_and_a_dead_publisher_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(exchange_session.Process, "program", HERE / "rehearse_exchange_rank.py")
    monkeypatch.setenv("HEADRACE_REHEARSAL", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    figures = exchange_session.ipc(4 << 20)
    assert figures["ipc_bytes_per_s"] > 0
    assert figures["ipc_of_copy_ratio"] > 0
