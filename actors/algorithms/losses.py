"""The losses of policies and critics, over some of the tokens of an update, in torch.

Every loss is a share: those of the parts of an update add up to the loss of the whole, however it is split over
micro-batches and ranks, since they divide by counts of the whole. Knows nothing of models, batches or optimizers.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .updates import Objective

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to +- this before exp, so that a stray token can't overflow."""


class PolicyLoss(NamedTuple):
    """The loss over N tokens, and what to watch. All scalars; only `loss` carries a gradient."""

    loss: Tensor
    """These tokens' share of the loss of the update."""
    num_clipped: Tensor
    """Tokens whose gradient the clipping removed."""
    kl_sum: Tensor
    """Sum over tokens of r - 1 - log r, whose mean estimates KL(behaviour || trained)."""
    ratio_max: Tensor


def policy_loss(
    logprobs: Tensor,
    behaviour: Tensor,
    advantage: Tensor,
    objective: Objective,
    *,
    total: float,
    weight: Tensor | None = None,
) -> PolicyLoss:
    """Minus the clipped surrogate over some of the tokens of an update (PPO, arXiv 1707.06347 eq. 7; DAPO eq. 8).

        - 1 / total * sum_t weight_t * min(r_t A_t, clip(r_t, 1 - clip_low, 1 + clip_high) A_t)
        r_t = exp(logprobs_t - behaviour_t)

    logprobs, behaviour and advantage are float32 [N]. For the mean over tokens, `total` counts those of the whole
    update and there is no weight; for the mean over responses it counts responses, and a token's `weight` [N] is one
    over the length of its response. Corrected by the weights below, which multiply the others and leave `total` as it
    is, `behaviour` is the policy that the step begins from, and not what sampled the tokens. With `dual_clip` c > 1
    the objective of a token of negative advantage is at least c * A_t (arXiv 1912.09729 eq. 5).
    """
    log_ratio = (logprobs - behaviour).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = log_ratio.exp()
    low, high, dual = 1 - objective.clip_low, 1 + objective.clip_high, objective.dual_clip
    gain = torch.minimum(ratio * advantage, ratio.clamp(low, high) * advantage)
    if dual:
        gain = torch.where(advantage < 0, gain.maximum(dual * advantage), gain)
    loss = -(gain if weight is None else gain * weight).sum() / total
    with torch.no_grad():
        clipped = (advantage > 0) & (ratio > high) | (advantage < 0) & (ratio < low)
        if dual:
            clipped |= (advantage < 0) & (ratio > dual)
        return PolicyLoss(loss, clipped.sum(), (ratio - 1 - log_ratio).sum(), ratio.max())


def decoupled_weights(proximal: Tensor, behaviour: Tensor) -> Tensor:
    """What a token that `behaviour` sampled weighs in a step that begins from `proximal`; float32 [N] each.

        J = E_behaviour[ w_t * min(r_t A_t, clip(r_t, 1 - clip_low, 1 + clip_high) A_t) ]
        w_t = exp(proximal_t - behaviour_t), a constant              r_t = exp(logprobs_t - proximal_t)

    Decoupled PPO (Hilton et al., arXiv 2110.00641; AReaL, arXiv 2505.24298): clipping bounds how far this step goes,
    not how far its beginning was from whatever sampled the token, so that stale tokens still teach.
    """
    return (proximal - behaviour).detach().clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def truncated_weights(proximal: Tensor, behaviour: Tensor, bound: float) -> Tensor:
    """The same weights, none above `bound` C: w_t = min(exp(proximal_t - behaviour_t), C).

    Truncated importance sampling (Ionides 2008), token by token as Yao et al. (2025, "Your efficient RL framework
    secretly brings you off-policy RL training") use it for engines that sample in other arithmetic than the trainer's.
    The bound ends the variance of tokens that `behaviour` found unlikely; they count for less than they should.
    """
    return decoupled_weights(proximal, behaviour).clamp(max=bound)


def imitation_loss(logprobs: Tensor, positive: Tensor, *, num_positive: int) -> Tensor:
    """Negative log-likelihood of the tokens of correct responses, VAPO (arXiv 2504.05118) eq. 9.

        - 1 / num_positive * sum over positive t of logprobs_t

    logprobs is float32 [N], positive bool [N]; `num_positive` counts the tokens of correct responses in the whole
    update. 0 if there are none.
    """
    return -(logprobs * positive).sum() / max(1, num_positive)


def value_loss(values: Tensor, returns: Tensor, *, num_tokens: int) -> Tensor:
    """Half the mean squared error, 1 / num_tokens * sum_t (V_t - G_t)^2 / 2; both are float32 [N]."""
    return (values - returns).square().sum() / (2 * num_tokens)


OwnLoss = Callable[[Tensor, Tensor, Tensor, int], Tensor]
"""(logprobs, behaviour, advantage, num_tokens) -> loss; see `own_loss`."""


def own_loss(path: str) -> OwnLoss:
    """The user's loss at "module:name".

    Called as `loss(logprobs, behaviour, advantage, num_tokens)` with float32 [N] tensors of some of the `num_tokens`
    tokens of an update; it returns their share, a scalar: shares must add up. Raises ValueError if it isn't there.
    """
    module, _, name = path.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f'the loss "{path}" can\'t be loaded: {error}; name it as "module:name"') from None
    if not callable(found):
        raise ValueError(f"the loss {path} is a {type(found).__name__}, must be a function")
    return found  # type: ignore[no-any-return]
