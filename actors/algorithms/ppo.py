"""PPO: proximal policy optimization, arXiv 1707.06347, as VAPO's baseline runs it (arXiv 2504.05118, section 5.1).

J = E[ mean over responses of 1/|o| * sum_t min(r_t A_t, clip(r_t, 1 - eps, 1 + eps) A_t) ]
A_t = sum_k (gamma lambda)^k delta_{t+k},   the critic's target is A_t + V_t,   one lambda for both
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Gt, Le

from ...runtime.codec import wire
from .advantages import gae, whiten
from .algorithm import Algorithm, Critic, Metrics, Policy, gather
from .batch import Batch
from .updates import Objective


@wire
@dataclass(frozen=True, kw_only=True)
class Ppo(Algorithm):
    """The defaults are those of the baseline in the VAPO paper."""

    gamma: Annotated[float, Gt(0), Le(1)] = 1.0
    """Discount per token."""
    gae_lambda: Annotated[float, Ge(0), Le(1)] = 0.95
    """Of GAE, for advantages and for the critic's targets."""
    clip: Annotated[float, Gt(0), Le(1)] = 0.2
    """A ratio further from 1 than this brings nothing further."""

    @property
    def objective(self) -> Objective:
        return Objective(clip_low=self.clip, clip_high=self.clip, mean="response")

    async def step(self, batch: Batch, *, policy: Policy, critic: Critic) -> Metrics:
        """One update of the policy and of the critic, at the same time."""
        values = await critic.values(batch)
        advantages = gae(batch.token_rewards(), values, self.gae_lambda, gamma=self.gamma)
        returns = [a + v for a, v in zip(advantages, values, strict=True)]
        policy_metrics, critic_metrics = await gather(
            policy.update(batch, whiten(advantages), self.objective), critic.update(batch, returns)
        )
        return policy_metrics | critic_metrics
