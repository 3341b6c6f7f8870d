"""GRPO: group relative policy optimization, arXiv 2402.03300, without its KL term.

    J = E[ 1/G * sum_i 1/|o_i| * sum_t min(r_it A_i, clip(r_it, 1 - eps, 1 + eps) A_i) ]

What DAPO changed: every response weighs the same, however long; the clipping is symmetric; nothing is filtered, so that
a batch in which no group has two different rewards is an error. The paper subtracts beta times the KL divergence to a
reference model; there is none here, as in DAPO.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Gt, Le

from ...runtime.codec import wire
from .advantages import group_advantages
from .algorithm import Algorithm, Metrics, Policy
from .batch import Batch
from .updates import Objective


@wire
@dataclass(frozen=True, kw_only=True)
class Grpo(Algorithm):
    """The default is that of the public code."""

    least_group: ClassVar[int] = 2

    clip: Annotated[float, Gt(0), Le(1)] = 0.2
    """A ratio further from 1 than this brings nothing further."""

    @property
    def objective(self) -> Objective:
        return Objective(clip_low=self.clip, clip_high=self.clip, mean="response")

    async def step(self, batch: Batch, *, policy: Policy) -> Metrics:
        """One update of the policy."""
        return await policy.update(batch, batch.spread(group_advantages(batch)), self.objective)
