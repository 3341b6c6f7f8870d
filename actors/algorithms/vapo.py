"""VAPO: value-model-based augmented PPO, arXiv 2504.05118.

    values learn first: the policy stays as it is, the critic regresses on Monte-Carlo returns            section 4.1
    advantages by GAE with lambda_policy = 1 - 1 / (alpha l) for a response of l tokens                   eq. 5
    the critic's targets by GAE with lambda_value = 1: Monte-Carlo returns, without the critic's bias     section 4.1
    L = L_PPO + mu L_NLL: clip-higher, token-level, and imitation of the correct responses                eq. 10

Several responses to a prompt (group sampling) are contrasted by their values, so no group is filtered.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import numpy as np
from annotated_types import Ge, Gt, Le

from ...runtime.codec import wire
from .advantages import adaptive_lambda, gae, returns_to_go, whiten
from .algorithm import Algorithm, Critic, Metrics, Policy, gather
from .batch import Batch
from .updates import Objective


@wire
@dataclass(frozen=True, kw_only=True)
class Vapo(Algorithm):
    """The defaults are the paper's (section 5.1), which has no discount and does not tell whether it whitens."""

    value_pretraining: Annotated[int, Ge(0)] = 50
    """Steps in which only the critic learns."""
    gamma: Annotated[float, Gt(0), Le(1)] = 1.0
    """Discount per token."""
    lambda_value: Annotated[float, Ge(0), Le(1)] = 1.0
    """Of the critic's targets."""
    adaptive_alpha: Annotated[float, Ge(0)] = 0.05
    """Share of a response over which advantages look ahead; 0 takes `lambda_policy` for all lengths."""
    lambda_policy: Annotated[float, Ge(0), Le(1)] = 0.95
    """Of the advantages where they don't adapt to the length."""
    clip_low: Annotated[float, Gt(0), Le(1)] = 0.2
    """A ratio below 1 - clip_low brings nothing further to tokens of negative advantage."""
    clip_high: Annotated[float, Gt(0)] = 0.28
    """A ratio above 1 + clip_high brings nothing further to tokens of positive advantage (clip-higher)."""
    imitation: Annotated[float, Ge(0)] = 0.1
    """Weight of the loss on correct responses (mu)."""
    whitening: bool = True
    """Whether advantages are shifted and scaled to mean 0 and deviation 1 over the batch."""

    @property
    def value_steps(self) -> int:
        """See Algorithm."""
        return self.value_pretraining

    @property
    def objective(self) -> Objective:
        """Token-level: every token of the batch weighs the same."""
        return Objective(clip_low=self.clip_low, clip_high=self.clip_high, mean="token", imitation=self.imitation)

    async def pretrain(self, batch: Batch, *, critic: Critic) -> Metrics:
        """One update of the critic alone, on responses of the fixed policy."""
        return await critic.update(batch, returns_to_go(batch.token_rewards(), gamma=self.gamma))

    async def step(self, batch: Batch, *, policy: Policy, critic: Critic) -> Metrics:
        """One update of the policy and of the critic, at the same time."""
        rewards, values = batch.token_rewards(), await critic.values(batch)
        lambdas = np.full(len(batch), self.lambda_policy)
        if self.adaptive_alpha:
            lambdas = adaptive_lambda(batch.lengths, self.adaptive_alpha)
        advantages = gae(rewards, values, lambdas, gamma=self.gamma)
        targets = gae(rewards, values, self.lambda_value, gamma=self.gamma)
        returns = [a + v for a, v in zip(targets, values, strict=True)]
        policy_metrics, critic_metrics = await gather(
            policy.update(batch, whiten(advantages) if self.whitening else advantages, self.objective),
            critic.update(batch, returns),
        )
        return policy_metrics | critic_metrics
