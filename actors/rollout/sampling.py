"""Choosing the next tokens from logits. Pure functions of their arguments: random numbers come from outside."""

from __future__ import annotations

import torch
from torch import Tensor


def sample(logits: Tensor, temperatures: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """One token for each row by inverting its cumulative distribution at `uniforms`, or the likeliest where temperature is 0.

    logits float32 [N, V]; temperatures float32 [N], at least 0; uniforms float64 [N], inside (0, 1).
    Returns tokens int64 [N] and their log-probabilities float32 [N] at the sampling temperature (at 1 where it is 0).
    Logits that are NaN or +inf give NaN log-probabilities; the token beside them means nothing.
    """
    greedy = temperatures == 0
    logprobs = torch.log_softmax(logits / temperatures.masked_fill(greedy, 1.0).unsqueeze(1), dim=-1)
    cumulative = logprobs.exp().cumsum(-1, dtype=torch.float64)
    threshold = uniforms.unsqueeze(1) * cumulative[:, -1:]
    drawn = torch.searchsorted(cumulative, threshold, right=True).clamp_(max=logits.shape[1] - 1)
    tokens = torch.where(greedy.unsqueeze(1), logits.argmax(-1, keepdim=True), drawn)
    return tokens.squeeze(1), logprobs.gather(1, tokens).squeeze(1)
