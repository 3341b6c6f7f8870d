"""Judges responses: right, wrong, or could not be judged. Knows nothing of rewards, policies or training."""

from __future__ import annotations

import time
from dataclasses import dataclass

from ...runtime import Actor, message
from ..types import Group, Verdict
from .metrics import VerdictMetrics
from .rules import judge_running_sum


@dataclass(kw_only=True)
class RuleVerifier(Actor):
    """Judges by comparing the final answer with the reference."""

    def __post_init__(self) -> None:
        self._metrics = VerdictMetrics()

    @message(concurrent=True, deadline_s=30.0)
    async def judge(self, group: Group) -> list[Verdict]:
        """One verdict for each trajectory of the group, in their order.

        A response that ran out of tokens is wrong. One that has not ended is not judged: its verdict is an error.
        """
        begun = time.perf_counter()
        verdicts = [
            judge_running_sum(trajectory.tokens(), group.prompt.answer)
            if trajectory.finish
            else Verdict(correct=False, error="unfinished response")
            for trajectory in group.trajectories
        ]
        for verdict in verdicts:
            self._metrics.judged(verdict, (time.perf_counter() - begun) / len(verdicts))
        return verdicts

    @message(concurrent=True)
    async def stats(self) -> dict[str, float]:
        """See VerdictMetrics.snapshot."""
        return self._metrics.snapshot()
