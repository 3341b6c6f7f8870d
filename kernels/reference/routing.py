"""Which expert each token goes to, and the order of the rows: plain torch. Every order is stable."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Score = Literal["softmax", "sigmoid"]
"""How a logit becomes an expert's score."""


class Gate(NamedTuple):
    """What the router decided for T tokens."""

    ids_TK: Tensor
    """int64: chosen experts, the best first; of equal scores the lower id."""
    weights_TK: Tensor
    """Share of each chosen expert in the output; differentiable."""
    probs_TE: Tensor
    """Score of every expert: softmax over all, or sigmoid of each; differentiable (load-balancing losses need it)."""


class Rows(NamedTuple):
    """The (token, choice) pairs, sorted by expert, in N rows: one for each of the P = T * K pairs, or more to pad."""

    pairs_N: Tensor
    """Row -> pair, where pair = token * K + choice; what is outside [0, P) marks a row without a pair."""
    load_E: Tensor
    """int64: rows of each expert."""
    ends_E: Tensor
    """int32: one past the last row of each expert, as `torch.nn.functional.grouped_mm` wants it."""
    rows_P: Tensor | None = None
    """The inverse, pair -> row, negative for a pair without a row. None: every pair has a row and every row a pair."""


def topk_gate(
    logits_TE: Tensor,
    k: int,
    *,
    renormalize: bool,
    score: Score = "softmax",
    bias_E: Tensor | None = None,
    groups: int = 1,
    top_groups: int = 1,
    scale: float = 1.0,
    ids_TK: Tensor | None = None,
) -> Gate:
    """The best k experts of each token and their weights: scale * score, of sum `scale` if they are renormalized.

    Softmax over all experts; the choice is by logit. Or sigmoid of each (DeepSeek-V3, arXiv 2412.19437, eq. 13-16);
    the choice is by score + `bias_E`, the weight by score alone. With `groups` of neighbouring experts only the
    `top_groups` best take part: by their best expert (softmax), or by the sum of their best two (sigmoid). NaN counts
    as the largest number. Given `ids_TK` are taken as the choice (routing replay). Half-precision logits are computed
    in float32.
    """
    if logits_TE.dtype in (torch.bfloat16, torch.float16):
        logits_TE = logits_TE.float()
    if score == "softmax":
        # One column per token: a softmax over few experts runs an order of magnitude faster across the long dimension.
        scores_ET = torch.softmax(logits_TE.t().contiguous(), dim=0)
        scores_TE = scores_ET.t()
        choice_TE = logits_TE.detach()
    else:
        scores_TE = torch.sigmoid(logits_TE)
        choice_TE = scores_TE.detach() if bias_E is None else scores_TE.detach() + bias_E
    if ids_TK is None:
        barred_TE = _outside_top_groups(choice_TE, groups, top_groups, best=1 if score == "softmax" else 2)
        ids_TK = _ranked(choice_TE, barred_TE)[:, :k]
    weights_TK = scores_TE.gather(1, ids_TK.long())
    if renormalize:
        total_T1 = weights_TK.sum(dim=-1, keepdim=True)
        if score == "sigmoid" or groups > 1:
            total_T1 = total_T1.clamp_min(1e-20)  # all chosen scores may be zero
        weights_TK = weights_TK / total_T1
    return Gate(ids_TK, weights_TK if scale == 1.0 else weights_TK * scale, scores_TE)


def _ranked(choice_TE: Tensor, barred_TE: Tensor | None) -> Tensor:
    """Expert ids from best to worst, those barred last; of equals the lower id first."""
    ids_TE = torch.sort(choice_TE, dim=-1, descending=True, stable=True).indices
    if barred_TE is None:
        return ids_TE
    last_TE = torch.sort(barred_TE.gather(1, ids_TE).byte(), dim=-1, stable=True).indices
    return ids_TE.gather(1, last_TE)


def _outside_top_groups(choice_TE: Tensor, groups: int, top_groups: int, *, best: int) -> Tensor | None:
    if groups == 1:
        return None
    num_tokens, num_experts = choice_TE.shape
    size = num_experts // groups
    best_TGB = choice_TE.reshape(num_tokens, groups, size).sort(dim=-1, descending=True).values[:, :, :best]
    order_TG = torch.sort(best_TGB.sum(dim=-1), dim=-1, descending=True, stable=True).indices
    barred_TG = torch.ones(num_tokens, groups, dtype=torch.bool, device=choice_TE.device)
    return barred_TG.scatter(1, order_TG[:, :top_groups], False).repeat_interleave(size, dim=1)


def expert_load(ids_TK: Tensor, num_experts: int) -> Tensor:
    """How many (token, choice) pairs each expert got: int64 [E]."""
    return torch.bincount(ids_TK.reshape(-1), minlength=num_experts)


def align(ids_TK: Tensor, num_experts: int) -> Rows:
    """Sorts the pairs by expert; inside an expert they stay in token order."""
    load_E = expert_load(ids_TK, num_experts)
    return Rows(torch.argsort(ids_TK.reshape(-1), stable=True), load_E, load_E.cumsum(0).to(torch.int32))
