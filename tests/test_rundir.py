"""Run directories: claims, refusals, resuming, and what a crash leaves behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import orjson
import pytest

from headrace.runtime.rundir import RunDirectory, RunSpec, drop_half_line, read_summary, write_atomically
from headrace.runtime.toml import ConfigError

HOLD = """
import sys, time
from pathlib import Path
from headrace.runtime.rundir import RunDirectory
run = RunDirectory.create(Path(sys.argv[1]), "x = 1\\n")
print("claimed", flush=True)
time.sleep(600)
"""


def refusal(path: Path, *, resume: bool = False) -> str:
    before = sorted(path.rglob("*"))
    with pytest.raises(ConfigError) as caught:
        RunDirectory.resume(path) if resume else RunDirectory.create(path, "new = true\n")
    assert sorted(path.rglob("*")) == before, "a refusal leaves all as it was"
    return str(caught.value).removeprefix(f"{path.parent}/")


def finish(run: RunDirectory, *, ok: bool) -> None:
    run.summary.write_bytes(orjson.dumps({"ok": ok, "steps": 90}))
    run.close()


def test_a_new_run_has_its_files(tmp_path: Path) -> None:
    with RunDirectory.create(tmp_path / "runs" / "a", "x = 1\n") as run:
        assert run.path == tmp_path / "runs" / "a"
        assert run.config.read_text() == "x = 1\n"
        assert not run.resumed
        assert {p.name for p in run.path.iterdir()} == {"config.toml", "checkpoints", "journal", "logs", "lock"}
        assert (run.path / "lock").read_text() == f"{os.getpid()}\n"
    run.close()


def test_in_use_names_the_process(tmp_path: Path) -> None:
    path = tmp_path / "a"
    (tmp_path / "a-2").mkdir()
    with RunDirectory.create(path, "x = 1\n"):
        expected = (
            f"a: in use by process {os.getpid()}; wait for it or stop it, or start another run with --set run.name=a-3"
        )
        assert refusal(path) == expected
        assert refusal(path, resume=True) == expected


def test_a_finished_run_is_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "a"
    finish(RunDirectory.create(path, "x = 1\n"), ok=True)
    assert refusal(path) == "a: holds a finished run (90 steps); start another run with --set run.name=a-2"
    assert refusal(path, resume=True) == "a: the run has finished (90 steps); start another run with --set run.name=a-2"
    assert (path / "config.toml").read_text() == "x = 1\n"


@pytest.mark.parametrize("has_summary", [False, True])
def test_an_interrupted_run_resumes(tmp_path: Path, has_summary: bool) -> None:
    path = tmp_path / "a"
    run = RunDirectory.create(path, "x = 1\n")
    run.metrics.write_bytes(b'{"step":1}\n{"st')
    finish(run, ok=False) if has_summary else run.close()
    assert refusal(path).startswith("a: holds an interrupted run; continue it with --resume, or start another run")
    with RunDirectory.resume(path) as resumed:
        assert resumed.resumed
        assert resumed.config.read_text() == "x = 1\n"
        assert resumed.metrics.read_bytes() == b'{"step":1}\n'


def test_nothing_to_resume(tmp_path: Path) -> None:
    RunDirectory.create(tmp_path / "first", "").close()
    assert refusal(tmp_path / "a", resume=True) == (
        f"a: there is no run to resume (runs in {tmp_path}: first); to start one, leave --resume out"
    )
    assert not (tmp_path / "a").exists()


def test_a_directory_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "thesis.tex").touch()
    with pytest.raises(ConfigError, match=r"a: is not empty and holds no run \(thesis\.tex\); start another run with"):
        RunDirectory.create(tmp_path / "a", "")


@pytest.mark.parametrize("place", ["file/a", "file"])
def test_a_place_that_can_not_be_written(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"can't be written: .*; choose another place with --set run\.directory=DIR"):
        RunDirectory.create(tmp_path / place, "")


def test_a_killed_process_frees_its_claim(tmp_path: Path) -> None:
    path = tmp_path / "a"
    holder = subprocess.Popen([sys.executable, "-P", "-c", HOLD, str(path)], stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"claimed\n"
        assert refusal(path).startswith(f"a: in use by process {holder.pid};")
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    assert "interrupted" in refusal(path)
    RunDirectory.resume(path).close()


def test_a_crash_before_the_configuration_was_written_leaves_the_name_free(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "lock").write_text("1\n")
    (tmp_path / "a" / ".config.toml.1").touch()
    RunDirectory.create(tmp_path / "a", "").close()


def test_a_broken_summary_counts_as_none(tmp_path: Path) -> None:
    assert read_summary(tmp_path) == {}
    for text in ("", "{", "[1]"):
        (tmp_path / "summary.json").write_text(text)
        assert read_summary(tmp_path) == {}


def test_lines_are_cut_after_the_last_whole_one(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    drop_half_line(path)
    for before, after in [(b"", b""), (b"half", b""), (b"a\nb\n", b"a\nb\n"), (b"a\nb", b"a\n")]:
        path.write_bytes(before)
        drop_half_line(path)
        assert path.read_bytes() == after


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x"
    write_atomically(path, b"old")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize("name", ["", "..", "../x", "a/b", "-x", "a b", ".hidden", "x" * 101])
def test_a_run_name_is_one_plain_folder(name: str) -> None:
    with pytest.raises(ValueError, match="name must be letters"):
        RunSpec(name=name)
