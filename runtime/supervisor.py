"""Decides what happens when a child fails: restart it, when, or give up. Strategy one_for_one: its failure is its own.

    failure -> restart type says no  -> stopped
            -> budget left           -> restart after back-off x 2^n with jitter
            -> budget exceeded       -> RestartBudgetExceeded: the failure climbs

Pure decisions on a clock that the caller passes in: it starts nothing and waits for nothing.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt

from .codec import wire
from .errors import RestartBudgetExceeded

RestartType = Literal["permanent", "transient", "temporary"]


@wire
@dataclass(frozen=True, kw_only=True, slots=True)
class RestartPolicy:
    """How one child is supervised."""

    restart: RestartType = "permanent"
    """permanent: always restarted; transient: only after a failure; temporary: never."""
    max_restarts: Annotated[int, Ge(0)] = 8
    """Restarts allowed within `window_s`; one more failure and the supervisor gives up."""
    window_s: Annotated[float, Gt(0)] = 60.0
    backoff_s: Annotated[float, Ge(0)] = 0.05
    """Wait before the first restart in the window; doubles with each further one."""
    max_backoff_s: Annotated[float, Ge(0)] = 5.0
    start_s: Annotated[float, Gt(0)] = 120.0
    """Time that the actor's `start` may take."""


class RestartBudget:
    """The restarts of one child."""

    def __init__(self, name: str, policy: RestartPolicy, seed: int = 0) -> None:
        self.name = name
        self.policy = policy
        self.total = 0
        """Restarts since the beginning."""
        self._recent: deque[float] = deque()
        self._random = random.Random(f"{seed}:{name}")

    def after_failure(self, now: float, reason: str) -> float | None:
        """Seconds to wait before the restart, or None if the child shall stay down.

        `now`: any monotonic seconds. Raises RestartBudgetExceeded.
        """
        policy = self.policy
        if policy.restart == "temporary":
            return None
        while self._recent and now - self._recent[0] > policy.window_s:
            self._recent.popleft()
        if len(self._recent) >= policy.max_restarts:
            raise RestartBudgetExceeded(
                f"{self.name} failed again after {len(self._recent)} restarts within {policy.window_s:g} s "
                f"(max_restarts = {policy.max_restarts}); last reason: {reason}"
            )
        delay = min(policy.backoff_s * 2.0 ** min(len(self._recent), 60), policy.max_backoff_s)
        self._recent.append(now)
        self.total += 1
        return delay * self._random.uniform(0.8, 1.2)

    def after_stop(self) -> bool:
        """Whether a child that ended in good order is started again."""
        return self.policy.restart == "permanent"
