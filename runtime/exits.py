"""How an actor or a node ended, as a value that supervisors decide on and people read."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .codec import wire

ExitKind = Literal["stopped", "exception", "exit_code", "signal", "out_of_memory", "lost", "hung"]

OOM_READ_S = 1.0
"""Time between two readings of the kernel's counters."""


@wire
@dataclass(frozen=True, kw_only=True, slots=True)
class Exit:
    """Why something is not running any more."""

    kind: ExitKind
    """stopped: in good order; exception: its code raised; exit_code, signal, out_of_memory: how its process ended;
    lost: its host can't be reached; hung: it was killed because it answered no more."""
    detail: str
    """In words, one line."""
    code: int = 0
    """Exit code or number of the signal."""
    traceback: str = ""
    """Of the exception, or of every thread when it hung."""

    def __str__(self) -> str:
        return self.detail


def exit_of(code: int, *, out_of_memory: bool = False) -> Exit:
    """How a process ended, from its `returncode`: an exit code, or minus the number of the signal that killed it.

    `out_of_memory`: the kernel has just killed a process for want of memory. It does not say which, so this is the
    likeliest reading of a SIGKILL that came from nowhere, and says so.
    """
    if code >= 0:
        return Exit(kind="exit_code", detail=f"exit code {code}", code=code)
    number = -code
    name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
    if out_of_memory and number == signal.SIGKILL:
        detail = "killed by SIGKILL, most likely for want of memory: the kernel's out-of-memory killer has just struck"
        return Exit(kind="out_of_memory", detail=detail, code=number)
    return Exit(kind="signal", detail=f"killed by {name}", code=number)


class OomKills:
    """Tells whether the kernel has killed for want of memory just now: in this control group if it counts there
    (cgroup v2, or v1), else anywhere on this machine."""

    def __init__(self, files: list[Path] | None = None) -> None:
        self._files = oom_counters() if files is None else files
        self._older = self._newer = self._read()

    def refresh(self) -> None:
        """Call it every OOM_READ_S: a rise is only news for a while."""
        self._older, self._newer = self._newer, self._read()

    def rose(self) -> bool:
        """Whether the counter is higher than it was at the last reading but one."""
        return self._read() > self._older

    def _read(self) -> int:
        for file in self._files:
            try:
                words = [line.split() for line in file.read_text().splitlines()]
            except OSError:
                continue
            found = [int(value) for key, value in (pair for pair in words if len(pair) == 2) if key == "oom_kill"]
            if found:
                return found[0]
        return 0


def oom_counters() -> list[Path]:
    """The files that may count the kernel's kills, the nearest first."""
    files = []
    try:
        groups = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    except OSError:
        groups = []
    root = Path("/sys/fs/cgroup")
    mounts = {"": (root, "memory.events"), "memory": (root / "memory", "memory.oom_control")}
    for _, controllers, path in groups:
        for controller, (mount, name) in mounts.items():
            if controller in controllers.split(","):
                files += [mount / path.lstrip("/") / name, mount / name]
    return [*files, Path("/proc/vmstat")]
