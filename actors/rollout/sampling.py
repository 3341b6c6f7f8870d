"""Choosing the next tokens from logits. Pure functions: the random numbers come from outside."""

from __future__ import annotations

import torch
from torch import Tensor


def sample(
    logits: Tensor,
    temperatures: Tensor,
    uniforms: Tensor,
    *,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    min_p: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One token a row, by inverting the cumulative distribution at `uniforms`, or the likeliest if temperature is 0.

    logits float32 [N, V]; temperatures float32 [N], at least 0; uniforms float64 [N], inside (0, 1); the others as in
    `truncate`, of which greedy rows take no notice. Returns tokens int64 [N] and their log-probabilities float32 [N]
    under the distribution that was drawn from (at temperature 1 where it is 0). Logits that are NaN or +inf give NaN
    log-probabilities; the token beside them means nothing.
    """
    if top_k is None and top_p is None and min_p is None and (temperatures == 1).all():
        return _draw(logits, uniforms)
    return sample_unseen(logits, temperatures, uniforms, top_k=top_k, top_p=top_p, min_p=min_p)


def sample_unseen(
    logits: Tensor,
    temperatures: Tensor,
    uniforms: Tensor,
    *,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    min_p: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `sample`, to the bit, without a look at any number on the host: a CUDA graph can hold it."""
    greedy = temperatures == 0
    tempered = logits / temperatures.masked_fill(greedy, 1.0).unsqueeze(1)
    tokens, logprobs = _draw(truncate(tempered, top_k=top_k, top_p=top_p, min_p=min_p), uniforms)
    best_logprobs, best = torch.log_softmax(logits, -1).max(-1)
    return torch.where(greedy, best, tokens), torch.where(greedy, best_logprobs, logprobs)


def truncate(
    logits: Tensor, *, top_k: Tensor | None = None, top_p: Tensor | None = None, min_p: Tensor | None = None
) -> Tensor:
    """Logits [N, V] with -inf for the tokens that may not be drawn; of equal ones the lower id counts as likelier.

    In this order: top_k int64 [N], so many likeliest (0: all); top_p float32 [N], of what is left the likeliest whose
    probabilities sum to it (nucleus, arXiv 1904.09751, section 3.1), at least one; min_p float32 [N], at least so many
    times as likely as the likeliest (arXiv 2407.01082, section 3).
    """
    if top_k is None and top_p is None and min_p is None:
        return logits
    ordered, ids = logits.sort(dim=-1, descending=True, stable=True)
    if top_k is not None:
        rank = torch.arange(logits.shape[1], device=logits.device)
        ordered = ordered.masked_fill((rank >= top_k.unsqueeze(1)) & (top_k > 0).unsqueeze(1), -torch.inf)
    if top_p is not None:
        probabilities = torch.softmax(ordered, -1)
        before = probabilities.cumsum(-1, dtype=torch.float64) - probabilities
        # Rounding may leave a sum just below 1 where all tokens are wanted.
        outside = (before >= top_p.unsqueeze(1)) & (top_p < 1).unsqueeze(1)
        outside[:, 0] = False
        ordered = ordered.masked_fill(outside, -torch.inf)
    if min_p is not None:
        probabilities = torch.softmax(ordered, -1)
        ordered = ordered.masked_fill(probabilities < min_p.unsqueeze(1) * probabilities[:, :1], -torch.inf)
    return torch.empty_like(logits).scatter_(1, ids, ordered)


def _draw(logits: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    probabilities = torch.softmax(logits, -1)
    cumulative = probabilities.cumsum(-1, dtype=torch.float64)
    threshold = cumulative[:, -1:] * uniforms.unsqueeze(1)
    tokens = torch.searchsorted(cumulative, threshold, right=True).clamp_(max=logits.shape[1] - 1)
    return tokens.squeeze(1), probabilities.gather(1, tokens).log_().squeeze(1)
