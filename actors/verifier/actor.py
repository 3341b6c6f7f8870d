"""Judges responses: right, wrong, or could not be judged. Knows nothing of rewards, policies or training."""

from __future__ import annotations

from dataclasses import dataclass

from ...runtime import Actor, message
from ..types import Group, Verdict
from .rules import judge_running_sum


@dataclass(kw_only=True)
class RuleVerifier(Actor):
    """Judges by comparing the final answer with the reference."""

    @message(concurrent=True, deadline_s=30.0)
    async def judge(self, group: Group) -> list[Verdict]:
        """One verdict for each trajectory of the group, in their order.

        A response that ran out of tokens is wrong. One that has not ended is not judged: its verdict is an error.
        """
        return [
            judge_running_sum(trajectory.tokens(), group.prompt.answer)
            if trajectory.finish
            else Verdict(correct=False, error="unfinished response")
            for trajectory in group.trajectories
        ]
