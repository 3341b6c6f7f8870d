"""The actor benchmark: its floors and its arithmetic; peers that fail; and, slow, a very small run."""

from __future__ import annotations

import argparse
import os
import stat
from pathlib import Path

import numpy as np
import pytest
import uvloop

from headrace.benchmark import FOLDER, load

actors = load("actors", FOLDER)

import _messages  # noqa: E402
import _peers  # noqa: E402
from _floor import Floor, memcpy_s  # noqa: E402
from _messages import Rounds, calls_per_s, quantile, seconds_of  # noqa: E402

TINY = actors.Scale(
    rounds=1, calls=10, seconds=0.02, casts=2_000, samples=5, large=1, kills=2, cold_kills=1, blocks=1, actors=200,
    supervised=10, nodes=4, systems=1, fan_in_calls=8, peer_calls=10,
)  # fmt: skip


def test_the_floor_says_back_what_it_is_sent() -> None:
    async def main() -> None:
        floor = Floor()
        try:
            assert await floor.call(b"one") == b"one"
            coalesced = [floor.call_coalesced(b"%d" % number) for number in range(1000)]
            assert [await answer for answer in coalesced] == [b"%d" % number for number in range(1000)]
            for array in (np.full(1000, 3, np.uint8), np.full(500_000, 100, np.uint8)):
                assert await floor.call_array(array) == 2 * int(array[0])
            assert await floor.casts(b"x" * 80, 10_001) == 10_001
            assert await floor.casts(b"x" * 80, 3) == 3
            assert len(await seconds_of(lambda: floor.call(b""), 5)) == 5
            assert await calls_per_s(lambda: floor.call_coalesced(b""), 10, 0.01) > 0
        finally:
            floor.close()
        assert floor.process.returncode is not None

    uvloop.run(main())


def test_ratios_are_of_medians() -> None:
    rounds = Rounds()
    for ours, theirs in ((1.0, 10.0), (100.0, 20.0), (3.0, 30.0)):
        rounds.add("ours", ours)
        rounds.add("theirs", theirs)
    assert rounds.ratio("ours", "theirs") == 3.0 / 20.0
    assert rounds.ratio("ours", "nobody") is None
    rounds.latency("call", [n / 1e6 for n in range(1, 101)])
    assert [round(rounds.median(f"call_{q}_us") or 0) for q in ("p50", "p90", "p99")] == [51, 91, 100]
    assert quantile([5.0], 0.99) == 5.0


def test_a_copy_is_a_copy() -> None:
    source, target = np.arange(1000), np.zeros(1000, int)
    assert memcpy_s(target, source) > 0
    assert (source == target).all()


def test_with_one_core_there_is_one_placement() -> None:
    assert [name for name, _, _ in _messages._placements([3])] == ["same_core"]
    assert _messages._placements([0, 1]) == [("same_core", 1, 1), ("cross_core", 0, 1)]
    rounds = Rounds()
    rounds.add("same_core_call_p50_us", 3.0)
    rounds.add("same_core_floor_p50_us", 2.0)
    figures = _messages._figures(rounds, ["same_core"])
    assert figures["same_core_call_p50_ratio"] == 1.5
    assert figures["cross_core_call_p50_ratio"] is None


def test_peers_are_named() -> None:
    assert _peers.chosen("ray, xoscar") == ["ray", "xoscar"]
    with pytest.raises(argparse.ArgumentTypeError, match="no peer 'akka'; there are: ray, xoscar"):
        _peers.chosen("ray,akka")


def _script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_a_peer_that_can_not_be_installed_is_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(_peers.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(
        _peers.sys, "executable", _script(tmp_path / "python", "echo first >&2; echo no way >&2; exit 1")
    )
    said: list[str] = []
    assert _peers.interpreters([], said.append) == {}
    assert said == []
    assert _peers.interpreters(["ray"], said.append) == {}
    assert "making an environment for ray" in said[0]
    assert said[1].startswith("ray is left out: ")
    assert said[1].endswith("no way")


@pytest.mark.parametrize(
    ("script", "why"),
    [
        ("echo 'broken peer' >&2; exit 3", "broken peer"),
        ("echo hello; echo ready; read line; exit 0", "without an answer"),
    ],
)
def test_a_peer_that_fails_is_left_out(tmp_path: Path, script: str, why: str) -> None:
    said: list[str] = []
    python = _script(tmp_path / "python", script)
    figures = uvloop.run(_peers.measure_peers({"ray": python}, TINY, said.append))
    assert figures["ray_call_p50_ratio"] is None
    assert figures["xoscar_calls_100_ratio"] is None
    assert any(line.startswith("ray is left out: ") and why in line for line in said)


def test_a_peer_is_compared(tmp_path: Path) -> None:
    python = _script(
        tmp_path / "python",
        """echo ready; while read n; do echo noise; echo '{"p50_s": 1000, "calls_100_per_s": 1e-6}'; done""",
    )
    figures = uvloop.run(_peers.measure_peers({"xoscar": python}, TINY, lambda text: None))
    assert figures["xoscar_call_p50_us"] == 1e9
    assert 0 < (figures["xoscar_call_p50_ratio"] or 0) < 1
    assert (figures["xoscar_calls_100_ratio"] or 0) > 1
    assert figures["ray_call_p50_ratio"] is None


@pytest.mark.slow
def test_a_very_small_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(actors, "QUICK", TINY)
    before = os.sched_getaffinity(0)
    figures = actors.measure(argparse.Namespace(quick=True, peer=[]), lambda text: None)
    assert os.sched_getaffinity(0) == before
    assert {bar.name for bar in actors.BARS} <= figures.keys()
    assert figures["casts_lost"] == figures["fan_in_lost"] == 0
    # What every version of the runtime can do; others are None until it can.
    for name in (
        "same_core_call_p50_ratio",
        "copy_in_64mib_ratio",
        "error_p50_us",
        "cold_back_p50_us",
        "first_answer_s",
    ):
        assert (figures[name] or 0) > 0, name
