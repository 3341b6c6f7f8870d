"""metrics.jsonl, summary.json and TensorBoard events."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import orjson
import pytest

from headrace.actors.report import METRICS, SUMMARY, MetricsWriter, read_metrics, rewind_metrics, write_summary


def test_a_row_is_a_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    writer = MetricsWriter(path)
    row = writer.write("rl", 3, reward_mean=np.float32(0.5), version=4, loss=float("nan"))
    assert read_metrics(path) == [{"stage": "rl", "step": 3, "reward_mean": 0.5, "version": 4, "loss": None}]
    assert row["version"] == 4
    writer.write("rl", 4)
    writer.close()
    writer.close()
    assert path.read_bytes().count(b"\n") == 2


def test_a_metric_that_nobody_explained_is_refused(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path / "metrics.jsonl")
    with pytest.raises(ValueError, match="metric 'rewrad' is not documented; add it to METRICS"):
        writer.write("rl", 1, rewrad=1.0)
    for name in ("mood/maze", "verifier_errors/", "puzzle_level"):
        with pytest.raises(ValueError, match=f"metric '{name}' is not documented"):
            writer.write("rl", 1, **{name: 1.0})
    assert read_metrics(tmp_path / "metrics.jsonl") == []
    assert writer.write("rl", 1, **{"puzzle_level/maze": 2.0, "verifier_errors/worker died": 1})["step"] == 1
    writer.close()


def test_suffixes_are_units() -> None:
    units = {"_per_s": "1/s", "_ratio": "0..1", "_bytes": "bytes", "_nats": "nats", "_s": "s", "_groups": "groups"}
    for name, metric in METRICS.items():
        suffix = next((s for s in units if name.endswith(s)), None)
        if suffix and not name.startswith("tokens"):
            assert metric.unit == units[suffix], name
        assert metric.text


def test_a_new_writer_goes_on_after_the_old_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for step in (1, 2):
        writer = MetricsWriter(path)
        writer.write("sft", step)
        writer.close()
    assert [row["step"] for row in read_metrics(path)] == [1, 2]


def test_reading_leaves_a_half_line_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == []
    path.write_bytes(b'{"stage":"sft","step":1}\n{"stage":')
    assert len(read_metrics(path)) == 1


def test_rewinding_keeps_what_the_checkpoint_knows(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    writer = MetricsWriter(path)
    steps = [("sft", 25), ("sft", 50), ("rl", 1), ("rl", 2), ("rl", 3)]
    for stage, step in steps:
        writer.write(stage, step)
    writer.close()
    kept = rewind_metrics(path, "rl", 2)
    assert [(row["stage"], row["step"]) for row in kept] == steps[:4]
    assert read_metrics(path) == kept
    assert [row["step"] for row in rewind_metrics(path, "sft", 25)] == [25]
    assert rewind_metrics(path, "sft", 0) == []


def test_a_summary_has_exactly_the_documented_keys(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    summary = dict.fromkeys(SUMMARY, 0)
    write_summary(path, {**summary, "staleness": {"mean": np.float64(1.5), "max": 3}})
    assert orjson.loads(path.read_bytes())["staleness"] == {"mean": 1.5, "max": 3}
    for wrong in ({"ok": True}, {**summary, "mood": "good"}):
        with pytest.raises(ValueError, match="is missing or unknown; the keys are ok, "):
            write_summary(path, wrong)
    assert orjson.loads(path.read_bytes())["staleness"]["max"] == 3


def test_tensorboard_reads_what_was_written_without_torch(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    code = (
        "import sys; from pathlib import Path; from headrace.actors.report import MetricsWriter\n"
        "path = Path(sys.argv[1]); writer = MetricsWriter(path / 'm.jsonl', tensorboard=path / 'tensorboard')\n"
        "writer.write('rl', 1, reward_mean=0.25); writer.write('rl', 2, reward_mean=0.5); writer.close()\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-P", "-c", code, str(tmp_path)], check=True)
    read = (
        "import sys; from tensorboard.backend.event_processing.event_accumulator import EventAccumulator\n"
        "events = EventAccumulator(sys.argv[1]); events.Reload()\n"
        "print([(e.step, e.value) for e in events.Scalars('rl/reward_mean')])"
    )
    folder = str(tmp_path / "tensorboard")
    done = subprocess.run([sys.executable, "-P", "-c", read, folder], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[(1, 0.25), (2, 0.5)]"
