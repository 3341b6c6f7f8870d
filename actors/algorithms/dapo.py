"""DAPO: decoupled clip and dynamic sampling policy optimization, arXiv 2503.14476.

    J = E[ 1 / sum_i |o_i| * sum_i sum_t min(r_it A_i, clip(r_it, 1 - eps_low, 1 + eps_high) A_i) ]       eq. 8
    A_i = (R_i - mean(R)) / std(R) over the G responses to a prompt                                       eq. 9
    subject to 0 < number of correct responses < G                                                        eq. 11

The soft overlong punishment (eq. 13) is part of the reward: actors/reward/shaping.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
from annotated_types import Ge, Gt, Le

from ...runtime.codec import wire
from ..types import Group
from .advantages import group_advantages
from .algorithm import Algorithm, Metrics, Policy
from .batch import Batch
from .groups import has_signal
from .updates import Objective


@wire
@dataclass(frozen=True, kw_only=True)
class Dapo(Algorithm):
    """The defaults are the paper's (section 4.1)."""

    least_group: ClassVar[int] = 2

    clip_low: Annotated[float, Gt(0), Le(1)] = 0.2
    """A ratio below 1 - clip_low brings nothing further to tokens of negative advantage."""
    clip_high: Annotated[float, Gt(0)] = 0.28
    """A ratio above 1 + clip_high brings nothing further to tokens of positive advantage; larger than clip_low, so that
    rare tokens can rise (clip-higher)."""
    dual_clip: Annotated[float, Ge(0)] = 0.0
    """Largest ratio that counts at negative advantage, above 1 + clip_high (the public recipe: 10); 0 sets no bound."""
    dynamic_sampling: bool = True
    """Whether groups that are all right or all wrong are filtered."""
    overlong_filtering: bool = False
    """Whether truncated responses are left out of the loss; they still count in their group's mean and deviation."""

    def __post_init__(self) -> None:
        _ = self.objective

    @property
    def objective(self) -> Objective:
        """Token-level: every token of the batch weighs the same."""
        return Objective(clip_low=self.clip_low, clip_high=self.clip_high, dual_clip=self.dual_clip, mean="token")

    def keeps(self, group: Group) -> bool:
        """Dynamic sampling."""
        return has_signal(group) or not self.dynamic_sampling

    async def step(self, batch: Batch, *, policy: Policy) -> Metrics:
        """One update of the policy."""
        advantages: list[np.ndarray | None] = [*batch.spread(group_advantages(batch))]
        if self.overlong_filtering:
            advantages = [None if cut else row for cut, row in zip(batch.truncated, advantages, strict=True)]
        return await policy.update(batch, advantages, self.objective)
