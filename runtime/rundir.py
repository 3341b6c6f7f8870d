"""The directory of a run: claimed by one process at a time, never overwritten.

    nothing there ----create----> in use ----close, or death of the process----> finished / interrupted
                                    ^                                                        |
                                    '------------------------resume--------------------------'

    config.toml metrics.jsonl events.jsonl summary.json checkpoints/ journal/ logs/ lock

The claim is a flock on `lock`: the kernel frees it when the process dies, however it dies. A run is finished when its
summary.json says `"ok": true`; with a config.toml and no such summary it was interrupted. Knows nothing of what the run
does.
"""

from __future__ import annotations

import fcntl
import os
import re
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any

import orjson
from annotated_types import Ge

from .codec import wire
from .errors import DirectoryInUse
from .toml import ConfigError, dump_value

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@wire
@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """Table `[run]`."""

    name: str
    """The run's files are in `directory`/`name`."""
    seed: Annotated[int, Ge(0)] = 0
    """Seed of every random choice of the run."""
    directory: str = "runs"
    """Where runs are kept, relative to the working directory."""

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ValueError(f"name must be letters, digits, '.', '_', '-' (at most 100), got {dump_value(self.name)}")

    @property
    def path(self) -> Path:
        return Path(self.directory) / self.name


class RunDirectory:
    """Paths of a claimed run. Made by `create` and `resume`; a context manager that gives the claim back."""

    def __init__(self, path: Path, lock: int, *, resumed: bool) -> None:
        self.path = path
        self.resumed = resumed
        """Whether an earlier process has worked here."""
        self.config = path / "config.toml"
        self.metrics = path / "metrics.jsonl"
        self.events = path / "events.jsonl"
        self.summary = path / "summary.json"
        self.checkpoints = path / "checkpoints"
        self.journal = path / "journal"
        self.logs = path / "logs"
        self._lock = lock

    @classmethod
    def create(cls, path: Path, config: str) -> RunDirectory:
        """Claims a new run directory and writes its config.toml.

        Raises ConfigError if there is a run already (in use, finished or interrupted) or if nothing can be written.
        """
        lock = _claim(path, make=True)
        try:
            _refuse_existing(path)
            run = cls(path, lock, resumed=False)
            write_atomically(run.config, config.encode())
            run._make_folders()
        except BaseException as error:
            os.close(lock)
            if isinstance(error, OSError):
                raise _unwritable(path, error) from None
            raise
        return run

    @classmethod
    def resume(cls, path: Path) -> RunDirectory:
        """Claims the directory of an interrupted run.

        Raises ConfigError if it is in use, finished or was never started.
        """
        if not (path / "config.toml").is_file():
            raise ConfigError(f"{path}: there is no run to resume{_other_runs(path)}; to start one, leave --resume out")
        lock = _claim(path, make=False)
        try:
            summary = read_summary(path)
            if summary.get("ok"):
                raise ConfigError(f"{path}: the run has finished{_steps(summary)}; {_elsewhere(path)}")
            run = cls(path, lock, resumed=True)
            run._make_folders()
            for lines in (run.metrics, run.events):
                drop_half_line(lines)
        except BaseException as error:
            os.close(lock)
            if isinstance(error, OSError):
                raise _unwritable(path, error) from None
            raise
        return run

    def close(self) -> None:
        """Gives the claim back. May be called twice."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _make_folders(self) -> None:
        for folder in (self.checkpoints, self.journal, self.logs):
            folder.mkdir(exist_ok=True)


def read_summary(path: Path) -> dict[str, Any]:
    """summary.json of the run at `path`; empty if there is none or it is no JSON object."""
    try:
        summary = orjson.loads((path / "summary.json").read_bytes())
    except (FileNotFoundError, orjson.JSONDecodeError):
        return {}
    return summary if isinstance(summary, dict) else {}


def write_atomically(path: Path, data: bytes) -> None:
    """Replaces the file: after a crash it holds the old content or the new, whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def drop_half_line(path: Path) -> None:
    """Cuts a file of lines after its last newline: a crash may have left half a line."""
    if path.exists():
        with path.open("rb+") as file:
            file.truncate(file.read().rfind(b"\n") + 1)


def claim(path: Path) -> int:
    """Claims a directory for this process; returns the descriptor that holds the claim until it is closed.

    Raises DirectoryInUse with the holder's process id, OSError.
    """
    lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
    except BlockingIOError:
        holder = os.pread(lock, 32, 0).decode("ascii", "replace").strip()
        os.close(lock)
        who = f"process {holder}" if holder else "another process"
        raise DirectoryInUse(f"{path}: in use by {who}; wait for it or stop it, or use another directory") from None
    except OSError:
        os.close(lock)
        raise
    return lock


def _claim(path: Path, *, make: bool) -> int:
    try:
        if make:
            path.mkdir(parents=True, exist_ok=True)
        return claim(path)
    except DirectoryInUse as error:
        raise ConfigError(str(error).replace("use another directory", _elsewhere(path))) from None
    except OSError as error:
        raise _unwritable(path, error) from None


def _refuse_existing(path: Path) -> None:
    found = {p.name for p in path.iterdir() if p.name != "lock" and not p.name.startswith(".")}
    if not found:
        return
    summary = read_summary(path)
    if summary.get("ok"):
        raise ConfigError(f"{path}: holds a finished run{_steps(summary)}; {_elsewhere(path)}")
    if "config.toml" in found:
        raise ConfigError(f"{path}: holds an interrupted run; continue it with --resume, or {_elsewhere(path)}")
    raise ConfigError(f"{path}: is not empty and holds no run ({min(found)}); {_elsewhere(path)}")


def _elsewhere(path: Path) -> str:
    n = 2
    while path.with_name(f"{path.name}-{n}").exists():
        n += 1
    return f"start another run with --set run.name={path.name}-{n}"


def _steps(summary: dict[str, Any]) -> str:
    steps = summary.get("steps")
    return f" ({steps} steps)" if isinstance(steps, int) else ""


def _other_runs(path: Path) -> str:
    others = sorted(p.parent.name for p in path.parent.glob("*/config.toml"))
    return f" (runs in {path.parent}: {', '.join(others[:5])})" if others else ""


def _unwritable(path: Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"{path}: can't be written: {error.strerror or error}; choose another place with --set run.directory=DIR"
    )
