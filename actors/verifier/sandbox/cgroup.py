"""A control group for one sandbox, where this process may make one: hard limits of memory and of processes.

    memory   .../headrace-PID-N    v1: memory.limit_in_bytes    v2: memory.max
    pids     .../headrace-PID-N    pids.max

The keeper's own watch is the narrower one, and gives the verdict; this holds where its 10 ms are too long. Groups are
made below that of this process, in the hierarchies of v1, or in that of v2 if it hands both controllers down. What a
process that was killed has left is removed by the next one. Knows nothing of sandboxes.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

PREFIX = "headrace-"
REMOVE_S = 1.0
"""Longest wait until the kernel has let go of a group whose processes are gone."""

_numbers = itertools.count(1)


@dataclass(frozen=True)
class Parents:
    """Where groups are made, by controller, and what the file of the memory limit is called."""

    memory: Path
    pids: Path
    memory_file: str


class Cgroup:
    """One group, with nothing in it at first."""

    def __init__(self, parents: Parents) -> None:
        """Raises OSError."""
        name = f"{PREFIX}{os.getpid()}-{next(_numbers)}"
        self._memory, self._pids = parents.memory / name, parents.pids / name
        self._memory_file = parents.memory_file
        self._folders = list(dict.fromkeys((self._memory, self._pids)))
        for folder in self._folders:
            folder.mkdir()

    def admit(self, pids: Sequence[int]) -> None:
        """Takes processes in; what they start will be in it, too. Raises OSError."""
        for folder, pid in itertools.product(self._folders, pids):
            (folder / "cgroup.procs").write_text(str(pid))

    def limit(self, *, memory_bytes: int, processes: int) -> None:
        """Sets the limits. Raises OSError."""
        (self._memory / self._memory_file).write_text(str(memory_bytes))
        (self._pids / "pids.max").write_text(str(processes))

    def remove(self) -> None:
        """Waits, within REMOVE_S, until it is empty and gone; blocks."""
        until = time.monotonic() + REMOVE_S
        for folder in self._folders:
            while folder.exists():
                try:
                    folder.rmdir()
                except OSError:
                    if time.monotonic() > until:
                        return
                    time.sleep(0.005)


@cache
def parents() -> Parents | None:
    """Where this process may make groups; None if it may not. Removes what dead processes have left there."""
    try:
        mounts, own = Path("/proc/self/mounts").read_text(), Path("/proc/self/cgroup").read_text()
    except OSError:
        return None
    for candidate in candidates(mounts, own):
        try:
            probe = Cgroup(candidate)
        except OSError:
            continue
        try:
            probe.limit(memory_bytes=1 << 30, processes=16)
        except OSError:
            continue
        finally:
            probe.remove()
        sweep(candidate)
        return candidate
    return None


def candidates(mounts: str, own: str) -> Iterator[Parents]:
    """By the texts of /proc/self/mounts and /proc/self/cgroup: v1 first, each at our own group and at the top."""
    v1, v2 = _mounted(mounts)
    places = {name: path for line in own.splitlines() for name, path in _place(line)}
    if "memory" in v1 and "pids" in v1:
        for here in (True, False):
            memory, pids = (v1[name] / (places.get(name, "") if here else "") for name in ("memory", "pids"))
            yield Parents(memory, pids, "memory.limit_in_bytes")
    if v2 is not None:
        for place in dict.fromkeys((places.get("", ""), "")):
            yield Parents(v2 / place, v2 / place, "memory.max")


def sweep(parents: Parents) -> None:
    """Removes the empty groups of processes that are gone."""
    for parent in {parents.memory, parents.pids}:
        for folder in parent.glob(f"{PREFIX}*-*"):
            owner = folder.name.removeprefix(PREFIX).partition("-")[0]
            if owner.isdigit() and not Path("/proc", owner).exists():
                with contextlib.suppress(OSError):
                    folder.rmdir()


def _mounted(mounts: str) -> tuple[Mapping[str, Path], Path | None]:
    """Mount points of v1 by controller, and of v2."""
    v1: dict[str, Path] = {}
    v2 = None
    for line in mounts.splitlines():
        _, point, kind, options, *_ = line.split()
        if kind == "cgroup":
            v1 |= {option: Path(point) for option in options.split(",")}
        elif kind == "cgroup2":
            v2 = Path(point)
    return v1, v2


def _place(line: str) -> Iterator[tuple[str, str]]:
    _, controllers, path = line.split(":", 2)
    for controller in controllers.split(","):
        yield controller, path.lstrip("/")
