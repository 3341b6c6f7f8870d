"""What a sandbox is asked to run, and what it reports. Plain data; knows no process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated

from annotated_types import Ge, Gt

from ....runtime.codec import wire

NO_ENVIRONMENT: Mapping[str, str] = {}


@wire
@dataclass(frozen=True, kw_only=True)
class RunLimits:
    """What one run may use, all its processes together unless said."""

    cpu_s: Annotated[float, Gt(0)] = 10.0
    """Processor seconds."""
    wall_s: Annotated[float, Gt(0)] = 30.0
    """Seconds on the clock, without those in which the program waited for a processor: a busy machine must not decide
    verdicts. Three times as many end it in any case."""
    memory_bytes: Annotated[int, Ge(1 << 20)] = 512 << 20
    """Resident memory and files."""
    output_bytes: Annotated[int, Ge(0)] = 16 << 20
    """Of each output stream, and of each file."""
    processes: Annotated[int, Ge(1)] = 16
    """At a time, threads counted."""
    open_files: Annotated[int, Ge(8)] = 64
    """Of each process."""
    inodes: Annotated[int, Ge(8)] = 4096
    """Files and folders."""


@dataclass(frozen=True, kw_only=True)
class Order:
    """One run."""

    argv: Sequence[str]
    files: Mapping[str, tuple[bytes, int]] = field(default_factory=dict)
    """Content and mode by name, written to the work folder, the current one, first."""
    environment: Mapping[str, str] = field(default_factory=lambda: NO_ENVIRONMENT)
    limits: RunLimits = RunLimits()
    collect: str = ""
    """A file of the work folder that is brought back after the run."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a run ended. The keeper says so, which what ran can't reach; `stdout` and `stderr` are what that wrote."""

    code: int
    """Exit code; minus the number of the signal that ended it."""
    stopped: str
    """Why the keeper ended it: "cpu", "wall", "memory", "inodes"; "" if it ended by itself."""
    cpu_s: float
    wall_s: float
    memory_bytes: int
    """Most that was seen: of the largest process, and of all at a time."""
    stdout: bytes = b""
    stderr: bytes = b""
    collected: bytes | None = None
    """None also if the file is not there, is no plain file or is too long."""


class SandboxFailed(Exception):
    """The sandbox did not do its part: the run has no outcome, and another attempt may have one."""
