"""DAPO's loss, arXiv 2503.14476. Reads like the paper.

Which groups are trained and what each response is worth is in groups.py; the soft overlong punishment (eq. 13) belongs
to rewards. Knows nothing of models, batches or optimizers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to +- this before exp, so that a stray token can't overflow."""


class PolicyLoss(NamedTuple):
    """The loss over N tokens, and what to watch. All scalars; only `loss` carries a gradient."""

    loss: Tensor
    """This part's share of the token-level mean; the parts of a batch add up to it."""
    num_clipped: Tensor
    """Tokens whose gradient the clipping removed."""
    kl_sum: Tensor
    """Sum over tokens of r - 1 - log r, whose mean estimates KL(behaviour || trained)."""
    ratio_max: Tensor


def policy_loss(
    logprobs: Tensor,
    behaviour: Tensor,
    advantage: Tensor,
    *,
    num_tokens: int,
    clip_low: float,
    clip_high: float,
    dual_clip: float = 0.0,
) -> PolicyLoss:
    """Minus the objective of eq. 8, over some of the `num_tokens` tokens of a batch.

        - 1 / num_tokens * sum_t min(r_t A_t, clip(r_t, 1 - clip_low, 1 + clip_high) A_t)
        r_t = exp(logprobs_t - behaviour_t)

    logprobs, behaviour and advantage are float32 [N]. `num_tokens` counts the whole batch, so the loss does not depend
    on how it is split. With `dual_clip` c > 1 the objective of a token of negative advantage is at least c * A_t.
    """
    log_ratio = (logprobs - behaviour).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = log_ratio.exp()
    objective = torch.minimum(ratio * advantage, ratio.clamp(1 - clip_low, 1 + clip_high) * advantage)
    if dual_clip:
        objective = torch.where(advantage < 0, objective.maximum(dual_clip * advantage), objective)
    loss = -objective.sum() / num_tokens
    with torch.no_grad():
        clipped = (advantage > 0) & (ratio > 1 + clip_high) | (advantage < 0) & (ratio < 1 - clip_low)
        if dual_clip:
            clipped |= (advantage < 0) & (ratio > dual_clip)
        return PolicyLoss(loss, clipped.sum(), (ratio - 1 - log_ratio).sum(), ratio.max())
