"""Turns verdicts into rewards. Knows nothing of how verdicts are reached or what rewards are used for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge

from ...runtime import Actor, message
from ..trainer.settings import RlSettings
from ..types import Group
from .shaping import soft_overlong_punishment

CORRECT, WRONG = 1.0, -1.0


@dataclass(kw_only=True)
class Reward(Actor):
    """DAPO's reward: +1 or -1 by the verdict (eq. 7), plus the soft overlong punishment (eq. 13).

    A graded verdict's own number stands in the place of +1 or -1.
    """

    rl: RlSettings
    overlong_cache: Annotated[int, Ge(0)] = 4096
    """Last tokens of the budget over which the punishment grows to -1; 0 switches it off."""

    def __post_init__(self) -> None:
        if self.overlong_cache > self.rl.max_new_tokens:
            raise ValueError(
                f"overlong_cache must be at most [rl] max_new_tokens ({self.rl.max_new_tokens}), "
                f"got {self.overlong_cache}; it is a part of the budget"
            )

    @message(concurrent=True, deadline_s=30.0)
    async def score(self, group: Group) -> list[float]:
        """One reward for each trajectory, in their order; length counts over all segments of a continued answer.

        Raises ValueError for a trajectory without a verdict: an error is never a number.
        """
        rewards = []
        for trajectory in group.trajectories:
            if trajectory.verdict is None or trajectory.verdict.error:
                raise ValueError(
                    f"prompt {group.prompt.ordinal}, member {trajectory.member} has no verdict; "
                    "leave it out of the group or have it judged again"
                )
            reward = trajectory.verdict.reward
            if reward is None:
                reward = CORRECT if trajectory.verdict.correct else WRONG
            if self.overlong_cache:
                reward += soft_overlong_punishment(
                    trajectory.num_tokens, max_tokens=self.rl.max_new_tokens, cache_tokens=self.overlong_cache
                )
            rewards.append(reward)
        return rewards
