"""Choosing the next tokens from logits. A pure function: the random numbers come from outside."""

from __future__ import annotations

import torch
from torch import Tensor


def sample(logits: Tensor, temperatures: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """One token a row, by inverting the cumulative distribution at `uniforms`, or the likeliest if temperature is 0.

    logits float32 [N, V]; temperatures float32 [N], at least 0; uniforms float64 [N], inside (0, 1).
    Returns tokens int64 [N] and their log-probabilities float32 [N] at the sampling temperature (at 1 where it is 0).
    Logits that are NaN or +inf give NaN log-probabilities; the token beside them means nothing.
    """
    if (temperatures == 1).all():
        return _draw(logits, uniforms)
    greedy = temperatures == 0
    tokens, logprobs = _draw(logits / temperatures.masked_fill(greedy, 1.0).unsqueeze(1), uniforms)
    best_logprobs, best = torch.log_softmax(logits, -1).max(-1)
    return torch.where(greedy, best, tokens), torch.where(greedy, best_logprobs, logprobs)


def _draw(logits: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    probabilities = torch.softmax(logits, -1)
    cumulative = probabilities.cumsum(-1, dtype=torch.float64)
    threshold = cumulative[:, -1:] * uniforms.unsqueeze(1)
    tokens = torch.searchsorted(cumulative, threshold, right=True).clamp_(max=logits.shape[1] - 1)
    return tokens.squeeze(1), probabilities.gather(1, tokens).log_().squeeze(1)
