"""Judges from the times of heartbeats whether a peer that can't be seen otherwise is alive: accrual, by phi.

    alive --phi >= suspect_phi--> suspect --silent for grace_s more, and phi >= lost_phi--> lost (for good)
      ^-----------heard--------------'

phi is -log10 of the chance that a living peer is silent for so long, going by the intervals seen of late: 1 means that
one such silence in ten is innocent, 8 one in a hundred million. So the patience adapts to a slow or unsteady network.
Pure decisions on a clock that the caller passes in. Knows nothing of messages.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt

from .codec import wire

State = Literal["alive", "suspect", "lost"]

MAX_PHI = 300.0
_WINDOW = 200


@wire
@dataclass(frozen=True, kw_only=True, slots=True)
class HeartbeatPolicy:
    """How nodes on other hosts are watched. Both ends follow the same."""

    interval_s: Annotated[float, Gt(0)] = 1.0
    """Between two heartbeats."""
    suspect_phi: Annotated[float, Gt(0)] = 3.0
    lost_phi: Annotated[float, Gt(0)] = 8.0
    grace_s: Annotated[float, Ge(0)] = 4.0
    """A peer is lost only if it is so silent even when this much of its silence is forgiven."""
    orphan_s: Annotated[float, Gt(0)] = 20.0
    """A node that hears nothing of its root for so long ends itself."""


class Detector:
    """Watches one peer. `now`: any seconds that rise."""

    def __init__(self, policy: HeartbeatPolicy, now: float) -> None:
        self._policy = policy
        self._state: State = "alive"
        self._heard = self._beat = now
        # At first nothing is known: as if it had been neither steady nor unsteady.
        self._intervals: deque[float] = deque()
        self._sum = self._squares = 0.0
        for share in (0.75, 1.25):
            self._learn(share * policy.interval_s)

    def beat(self, now: float) -> None:
        """A heartbeat came. These alone teach what is usual: other messages come in bursts."""
        # A very long one is a fault that has passed, not what to expect from now on.
        self._learn(min(now - self._beat, 10 * self._policy.interval_s))
        self._beat = now
        self.heard(now)

    def heard(self, now: float) -> None:
        """Any message came: it was alive."""
        self._heard = max(self._heard, now)

    def forgive(self, seconds: float, now: float) -> None:
        """The one who watches was itself at a standstill: that much silence means nothing."""
        self._heard = min(self._heard + seconds, now)
        self._beat = min(self._beat + seconds, now)

    def silence(self, now: float) -> float:
        """Seconds since it was heard."""
        return max(0.0, now - self._heard)

    def phi(self, now: float) -> float:
        """How surely it is dead; see above."""
        return self._phi(self.silence(now))

    def state(self, now: float) -> State:
        """What to think of it. Lost is lost: its incarnation never comes back."""
        if self._state != "lost":
            silence = self.silence(now)
            if self._phi(silence - self._policy.grace_s) >= self._policy.lost_phi:
                self._state = "lost"
            else:
                self._state = "suspect" if self._phi(silence) >= self._policy.suspect_phi else "alive"
        return self._state

    def _learn(self, interval: float) -> None:
        self._intervals.append(interval)
        old = self._intervals.popleft() if len(self._intervals) > _WINDOW else 0.0
        self._sum += interval - old
        self._squares += interval * interval - old * old

    def _phi(self, silence: float) -> float:
        mean = self._sum / len(self._intervals)
        variance = max(0.0, self._squares / len(self._intervals) - mean * mean)
        # However steady it was: a tenth of an interval is nothing for a scheduler.
        deviation = max(math.sqrt(variance), 0.1 * self._policy.interval_s)
        chance = 0.5 * math.erfc((silence - mean) / (deviation * math.sqrt(2)))
        return MAX_PHI if chance == 0 else min(MAX_PHI, -math.log10(chance))
