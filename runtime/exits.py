"""How an actor or a node ended, as a value that supervisors decide on and people read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .codec import wire

ExitKind = Literal["stopped", "exception", "exit_code", "signal", "out_of_memory", "lost", "hung"]


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
