"""DAPO, arXiv 2503.14476: which groups are trained, what each response is worth, and the loss. Reads like the paper.

Knows nothing of models, batches or optimizers; the soft overlong punishment (eq. 13) belongs to rewards.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..types import Group, Trajectory

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to +- this before exp, so that a stray token can't overflow."""

_MIN_STD = 1e-6


def judged(group: Group) -> list[Trajectory]:
    """The responses that take part: those with a verdict that is no error, and at least one token."""
    return [t for t in group.trajectories if t.verdict is not None and not t.verdict.error and t.num_tokens]


def has_signal(group: Group) -> bool:
    """Dynamic sampling, eq. 11: 0 < number of correct responses < number of responses. Rewards don't matter here."""
    correct = [t.verdict.correct for t in judged(group) if t.verdict is not None]
    return 0 < sum(correct) < len(correct)


def advantages(rewards: np.ndarray) -> np.ndarray:
    """A_i = (R_i - mean(R)) / std(R) over the responses of one group, eq. 9: float32 [n] -> float32 [n].

    The deviation is that of the group itself (divided by n). Equal rewards give zeros.
    """
    centred = rewards - rewards.mean(dtype=np.float64)
    std = rewards.std(dtype=np.float64)
    return (centred / std if std > _MIN_STD else np.zeros_like(centred)).astype(np.float32)


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

        - 1 / num_tokens * sum_t min(r_t A_t, clip(r_t, 1 - clip_low, 1 + clip_high) A_t),   r_t = exp(logprobs_t - behaviour_t)

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
