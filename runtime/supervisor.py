"""How often a failed child is started again, and when: its policy, and the budget that is kept of it.

    failure -> restart type says no  -> stays down
            -> budget left           -> restart: the first at once, then after back-off x 2^n with jitter
            -> budget exceeded       -> RestartBudgetExceeded: the failure climbs

Pure decisions on a clock that the caller passes in. Which siblings share its fate is decided in strategy.py.
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
    """How one child, or the children of a group together, are supervised."""

    restart: RestartType = "permanent"
    """permanent: always restarted; transient: only after a failure; temporary: never."""
    max_restarts: Annotated[int, Ge(0)] = 8
    """Restarts allowed within `window_s`; one more failure and the supervisor gives up."""
    window_s: Annotated[float, Gt(0)] = 60.0
    backoff_s: Annotated[float, Ge(0)] = 0.05
    """Wait before the second restart in the window (the first is immediate); doubles with each further one."""
    max_backoff_s: Annotated[float, Ge(0)] = 5.0
    start_s: Annotated[float, Gt(0)] = 120.0
    """Time that the actor's `start` may take."""


class RestartBudget:
    """The restarts that are counted together: of one child, or of the children of a group."""

    def __init__(self, name: str, policy: RestartPolicy, seed: int = 0) -> None:
        self.name = name
        self.policy = policy
        self.total = 0
        """Restarts since the beginning."""
        self._seed = seed
        self._recent: deque[float] = deque()
        self._random: random.Random | None = None

    def after_failure(self, now: float, reason: str) -> float | None:
        """Seconds to wait before the restart, or None if the child shall stay down.

        `now`: any monotonic seconds. Raises RestartBudgetExceeded.
        """
        return None if self.policy.restart == "temporary" else self.count(now, reason)

    def count(self, now: float, reason: str) -> float:
        """Counts a restart; returns the seconds to wait before it. Raises RestartBudgetExceeded."""
        policy = self.policy
        while self._recent and now - self._recent[0] > policy.window_s:
            self._recent.popleft()
        if len(self._recent) >= policy.max_restarts:
            raise RestartBudgetExceeded(
                f"{self.name} failed again after {len(self._recent)} restarts within {policy.window_s:g} s "
                f"(max_restarts = {policy.max_restarts}); last reason: {reason}"
            )
        earlier = len(self._recent)
        self._recent.append(now)
        self.total += 1
        if earlier == 0:
            return 0.0
        return min(policy.backoff_s * 2.0 ** min(earlier - 1, 60), policy.max_backoff_s) * self._jitter()

    def after_stop(self) -> bool:
        """Whether a child that ended in good order is started again."""
        return self.policy.restart == "permanent"

    def forget(self) -> None:
        """Starts anew: what is counted here was restarted as a whole."""
        self._recent.clear()

    def _jitter(self) -> float:
        if self._random is None:  # Most children never fail.
            self._random = random.Random(f"{self._seed}:{self.name}")
        return self._random.uniform(0.8, 1.2)
