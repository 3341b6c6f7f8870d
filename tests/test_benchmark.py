"""The framework of bin/bench on made-up benchmarks; and, slow, the job and learning benchmarks on very small jobs."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from headrace.benchmark import (
    FOLDER,
    ROOT,
    Bar,
    bench_main,
    describe_commit,
    describe_machine,
    describe_versions,
    load,
    names,
    report,
    shown,
)

WATER = '''"""How fast water runs. Nothing else."""

from headrace.benchmark import Bar, BenchmarkError

EXAMPLE = "bin/bench water --head 3"
BARS = [Bar("water_per_s", ">=", 10.0), Bar("spill_ratio", "<=", 0.1), Bar("depth_s", "<=", 1.0)]


def add_arguments(parser):
    parser.add_argument("--head", type=float, default=2.0)


def measure(options, say):
    say("opening the gate")
    if options.head <= 0:
        raise BenchmarkError("there is no water; raise --head")
    return {"water_per_s": 10 * options.head, "spill_ratio": 0.25, "depth_s": None, "mill_bytes": 3 * 2**30}
'''


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "water.py").write_text(WATER)
    (tmp_path / "bench" / "_helper.py").write_text("raise RuntimeError('never imported')")
    return tmp_path / "bench"


def test_a_benchmark_ran_whatever_its_bars_say(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench_main(["water", "--head", "3", "--json", str(tmp_path / "water.json")], folder) == 0
    result = json.loads((tmp_path / "water.json").read_text())
    assert set(result) == {"figures", "bars", "machine", "versions", "commit", "date", "seconds"}
    assert result["figures"] == {"water_per_s": 30.0, "spill_ratio": 0.25, "depth_s": None, "mill_bytes": 3 * 2**30}
    assert result["bars"] == [
        {"name": "water_per_s", "value": 30.0, "rule": ">=", "limit": 10.0, "ok": True},
        {"name": "spill_ratio", "value": 0.25, "rule": "<=", "limit": 0.1, "ok": False},
        {"name": "depth_s", "value": None, "rule": "<=", "limit": 1.0, "ok": False},
    ]
    out, err = capsys.readouterr()
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line}
    assert rows["water_per_s"] == ["30", "/s", ">=", "10", "/s", "ok"]
    assert rows["spill_ratio"] == ["0.250", "<=", "0.100", "missed"]
    assert rows["depth_s"] == ["-", "<=", "1.00", "s", "missed"]
    assert rows["mill_bytes"] == ["3.00", "GiB"]
    assert "water: 1 of 3 bars" in out
    assert "opening the gate" in err


def test_without_a_name_the_benchmarks_are_listed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["--help"]):
        assert bench_main(arguments, folder) == 0
        out = capsys.readouterr().out
        assert "water    How fast water runs. Nothing else." in out
        assert "example: bin/bench " in out
        assert "helper" not in out


def test_help_of_a_benchmark_ends_with_an_example(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        bench_main(["water", "--help"], folder)
    assert exit.value.code == 0
    out = capsys.readouterr().out
    assert "--json FILE" in out
    assert "--head" in out
    assert out.rstrip().endswith("example: bin/bench water --head 3")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["watr"], "no benchmark 'watr'; did you mean \"water\"?"),
        (["fire"], "no benchmark 'fire'; there are: water"),
        (["_helper"], "no benchmark '_helper'"),
        (["../bench/water"], "no benchmark '../bench/water'"),
        (["water", "--json", "nowhere/water.json"], "--json nowhere/water.json: can't be written"),
        (["water", "--json", "."], "--json .: can't be written"),
    ],
)
def test_wrong_input_is_one_message(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert bench_main(arguments, folder) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert len(err.splitlines()) == 1
    assert out == ""


def test_an_installed_wheel_has_no_benchmarks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_main(["job"], tmp_path / "none") == 2
    assert "they come with the source tree" in capsys.readouterr().err


def test_what_could_not_be_measured_says_why(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "water.json"
    assert bench_main(["water", "--head", "0", "--json", str(target)], folder) == 1
    assert "bin/bench water: there is no water; raise --head" in capsys.readouterr().err
    assert not target.exists()


def test_bars() -> None:
    at_least, at_most = Bar("a", ">=", 1.0), Bar("a", "<=", 1.0)
    assert at_least.met(1.0) and at_least.met(2.0) and not at_least.met(0.5)
    assert at_most.met(1.0) and at_most.met(0.5) and not at_most.met(2.0)
    for bar in (at_least, at_most):
        assert not bar.met(None)
        assert not bar.met(math.nan)


def test_a_bar_without_a_figure_is_our_mistake() -> None:
    with pytest.raises(AssertionError, match="speed"):
        report({}, [Bar("speed", ">=", 1.0)], machine={}, seconds=0.0)


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("tokens_per_s", 39876.5, "39,876 /s"), ("step_s", 0.1234, "0.12 s"), ("job_wall_s", 123.4, "123.4 s"),
        ("call_us", 41.26, "41.3 us"), ("rss_bytes", 5 * 2**20, "5.0 MiB"), ("rss_bytes", 3 * 2**29, "1.50 GiB"),
        ("gain_ratio", 0.5, "0.500"), ("restarts", 1234, "1,234"), ("gain_ratio", None, "-"),
    ],
)  # fmt: skip
def test_figures_are_shown_by_their_unit(name: str, value: float | None, text: str) -> None:
    assert shown(name, value) == text


def test_machine_and_versions() -> None:
    machine = describe_machine()
    assert machine["cpu"]
    assert machine["cores"] == len(os.sched_getaffinity(0))
    assert machine["memory_bytes"] > 2**28
    assert len(machine["load_average"]) == 3
    assert {"python", "torch", "numpy", "pyzmq"} <= describe_versions().keys()


def test_the_commit_says_whether_files_have_changed(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        identity = ("-c", "user.name=t", "-c", "user.email=t@t.invalid", "-c", "commit.gpgsign=false")
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    assert describe_commit(tmp_path) == "unknown"
    git("init", "-q")
    (tmp_path / "file").write_text("a")
    git("add", "file")
    git("commit", "-q", "-m", "one")
    git("tag", "v1")
    assert describe_commit(tmp_path) == git("rev-parse", "HEAD")
    (tmp_path / "file").write_text("b")
    assert describe_commit(tmp_path) == git("rev-parse", "HEAD") + "-dirty"


def test_every_benchmark_of_the_checkout_can_be_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert "job" in names(FOLDER)
    for name in names(FOLDER):
        benchmark = load(name, FOLDER)
        assert benchmark.EXAMPLE.startswith(f"bin/bench {name}")
        assert len({bar.name for bar in benchmark.BARS}) == len(benchmark.BARS) > 0


def test_a_job_that_is_not_valid_is_refused_before_anything_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_main(["job", "--set", "rl.stepz=1"]) == 2
    assert 'did you mean "steps"?' in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_very_small_job(tmp_path: Path) -> None:
    target = tmp_path / "job.json"
    settings = [
        "model.hidden_size=64", "model.moe_intermediate_size=32", "task.max_operands=2", "sft.steps=60",
        "rl.steps=6", "rl.groups_per_step=4", "evaluation.num_problems=16", "actors.rollout.num_slots=32",
    ]  # fmt: skip
    command = [sys.executable, "-P", "-m", "headrace", "bench", "job", "--seeds", "1", "--seconds", "0.5"]
    command += ["--json", str(target)]
    command += [part for setting in settings for part in ("--set", setting)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=380, check=False)
    assert done.returncode == 0, done.stderr
    assert "seed-0: finished" in done.stderr, done.stderr
    figures = json.loads(target.read_text())["figures"]
    assert figures["finished_ratio"] == 1.0
    assert figures["sft_repeat_equal"] == 1
    assert all(value is not None for value in figures.values())
    for name in ("job_wall_s", "first_rollout_s", "peak_rss_bytes", "sampler_ratio", "trainer_ratio", "check_s"):
        assert figures[name] > 0


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_small_weights(tmp_path: Path) -> None:
    target = tmp_path / "weights.json"
    command = [
        sys.executable,
        "-P",
        "-m",
        "headrace",
        "bench",
        "weights",
        "--mib",
        "8",
        "--rounds",
        "1",
        "--trials",
        "1",
    ]
    command += ["--json", str(target)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=220, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(target.read_text())
    figures, missed = result["figures"], {bar["name"] for bar in result["bars"] if not bar["ok"]}
    assert all(value is not None for value in figures.values())
    assert not {
        name for name in missed if name.startswith(("plan_", "fault_hangs", "fault_mixed", "decode_failed"))
    } - {"plan_s"}
    assert figures["shm_tensors_count"] == 300


@pytest.mark.slow
def test_what_is_learned_is_read_from_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    import _learning
    from tiny_job import SETTINGS

    assert {"dapo", "vapo"} < _learning.VARIANTS.keys()
    name = "vapo_without_decoupled_gae"
    monkeypatch.setattr(_learning, "VARIANTS", {name: _learning.VARIANTS[name]})
    tiny = SETTINGS | {"rl.steps": 3, "algorithm.value_pretraining": 2, "critic.mini_batches": 1}
    figures = _learning.measure_learning(lambda text: None, *(f"{key}={value}" for key, value in tiny.items()))
    assert [figures.pop(bar.name) for bar in _learning.LEARNING_BARS] == [None] * 4
    assert figures.keys() == {
        f"{name}_{figure}" for figure in (
            "pass_at_1_ratio", "greedy_ratio", "step_0_pass_at_1_ratio", "step_3_pass_at_1_ratio",
            "pretrained_explained_variance",
        )
    }  # fmt: skip
    assert all(0 <= value <= 1 for figure, value in figures.items() if value is not None and "explained" not in figure)
