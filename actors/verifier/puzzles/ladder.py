"""Adapts the difficulty of a task to the pass rate of the policy.

    pass rate of the last `patience` answers
    1.0 -------------------------------------   above `high`: one level up
        high 0.7  . . . . . . . . . . . . . .
                  stays: groups are mixed, so they have an advantage
        low  0.3  . . . . . . . . . . . . . .
    0.0 -------------------------------------   below `low`: one level down

Answers are counted in batches of `patience`, each begun anew, so that one lucky group can't climb several levels. Only
answers of the present level count: those of another are late, and say nothing of this one. The state is a plain dict
for the checkpoint. Knows nothing of tasks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .puzzle import MAX_LEVEL, MIN_LEVEL


@dataclass(kw_only=True)
class Ladder:
    """The level at which a task is asked now. Raises ValueError for a band or a level that makes no sense."""

    level: int = MIN_LEVEL
    lowest: int = MIN_LEVEL
    highest: int = MAX_LEVEL
    """Where it ends."""
    low: float = 0.3
    high: float = 0.7
    """The band in which the pass rate shall be."""
    patience: int = 32
    """Answers at a level between two decisions."""
    num_seen: int = 0
    """answers of the present level since the last decision"""
    num_passed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high <= 1:
            raise ValueError(f"low and high of a ladder need 0 <= low < high <= 1, got {self.low} and {self.high}")
        if not MIN_LEVEL <= self.lowest <= self.highest <= MAX_LEVEL:
            raise ValueError(
                f"lowest and highest of a ladder need {MIN_LEVEL} <= lowest <= highest <= {MAX_LEVEL}, "
                f"got {self.lowest} and {self.highest}"
            )
        if not self.lowest <= self.level <= self.highest:
            raise ValueError(f"a ladder's level is one of {self.lowest}..{self.highest}, got {self.level}")
        if self.patience < 1:
            raise ValueError(f"a ladder's patience is at least 1 answer, got {self.patience}")

    def observe(self, level: int, *, passed: bool) -> None:
        """Counts a judged answer to a puzzle of `level`."""
        if level != self.level:
            return
        self.num_seen += 1
        self.num_passed += passed
        if self.num_seen < self.patience:
            return
        rate = self.num_passed / self.num_seen
        step = (rate > self.high) - (rate < self.low)
        self.level = min(max(self.level + step, self.lowest), self.highest)
        self.num_seen = self.num_passed = 0

    def state(self) -> dict[str, Any]:
        """Plain values; `load_state` goes on from them."""
        return {"level": self.level, "num_seen": self.num_seen, "num_passed": self.num_passed}

    def load_state(self, state: dict[str, Any]) -> None:
        self.level, self.num_seen, self.num_passed = state["level"], state["num_seen"], state["num_passed"]
