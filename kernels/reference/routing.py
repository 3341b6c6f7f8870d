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
    """The P = T * K (token, choice) pairs, sorted by expert. Indices have the dtype of the ids, int64 or int32."""

    pairs_N: Tensor
    """Row -> pair, where pair = token * K + choice; -1 in rows that only pad. N = P if nothing is padded."""
    load_E: Tensor
    """Pairs of each expert."""
    ends_E: Tensor
    """int32: one past the last row of each expert, as `torch.nn.functional.grouped_mm` wants it."""
    rows_P: Tensor | None = None
    """The inverse: pair -> row, -1 for a pair that was dropped; None where nobody had it at hand."""
    experts_M: Tensor | None = None
    """int32: the expert of each tile of rows, -1 after the last; None where rows are not padded."""


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
    if ids_TK.is_cuda:  # bincount would ask the device for the largest id, and wait.
        ids_P = ids_TK.reshape(-1)
        zeros_E = torch.zeros(num_experts, dtype=torch.int64, device=ids_P.device)
        return zeros_E.index_add_(0, ids_P, torch.ones_like(ids_P, dtype=torch.int64))
    return torch.bincount(ids_TK.reshape(-1), minlength=num_experts)


def align(ids_TK: Tensor, num_experts: int, *, tile: int = 1, may_drop: bool = False) -> Rows:
    """Sorts the pairs by expert; inside an expert they stay in token order.

    With `tile` > 1 the rows of each expert are padded to a multiple of it. With `may_drop`, ids outside
    0..num_experts-1 are pairs without a row; without, they are an error of the caller.
    """
    if tile > 1 or may_drop:
        return _align_padded(ids_TK.reshape(-1), num_experts, tile)
    load_E = expert_load(ids_TK, num_experts)
    pairs_N = torch.argsort(ids_TK.reshape(-1), stable=True)
    return Rows(pairs_N.to(ids_TK.dtype), load_E.to(ids_TK.dtype), load_E.cumsum(0).to(torch.int32))


def num_rows(num_pairs: int, num_experts: int, tile: int) -> int:
    """Rows that are enough for any load: a multiple of `tile`."""
    return (num_pairs + min(num_pairs, num_experts) * (tile - 1)) // tile * tile


def _align_padded(ids_P: Tensor, num_experts: int, tile: int) -> Rows:
    num_pairs = len(ids_P)
    expert_P = torch.where((ids_P >= 0) & (ids_P < num_experts), ids_P, num_experts)
    load_E = torch.bincount(expert_P, minlength=num_experts + 1)[:num_experts]
    padded_E = -(-load_E // tile) * tile
    ends_E = padded_E.cumsum(0)
    kept = torch.argsort(expert_P, stable=True)[: int(load_E.sum())]
    shift_E = (ends_E - padded_E) - (
        load_E.cumsum(0) - load_E
    )  # an expert's first row, minus its first place in `kept`
    row = shift_E[expert_P[kept]] + torch.arange(len(kept), device=ids_P.device)
    pairs_N = ids_P.new_full((num_rows(num_pairs, num_experts, tile),), -1)
    pairs_N[row] = kept.to(ids_P.dtype)
    rows_P = torch.full_like(ids_P, -1)
    rows_P[kept] = row.to(ids_P.dtype)
    experts_M = None
    if tile > 1:
        begin_M = torch.arange(len(pairs_N) // tile, device=ids_P.device) * tile
        expert_M = torch.searchsorted(ends_E, begin_M, right=True)
        experts_M = torch.where(expert_M < num_experts, expert_M, -1).to(torch.int32)
    return Rows(pairs_N, load_E.to(ids_P.dtype), ends_E.to(torch.int32), rows_P, experts_M)


def prob_sum(probs_TE: Tensor) -> Tensor:
    """Sum over the tokens: float32 [E]; differentiable (the load-balancing loss needs it)."""
    return probs_TE.sum(0, dtype=torch.float32)


def load_ema(ema_LE: Tensor, counts_LE: Tensor, decay: float) -> Tensor:
    """The moving average of the load after one more batch, decay * ema + (1 - decay) * counts: float32 [L, E]."""
    return ema_LE + (1 - decay) * (counts_LE.to(torch.float32) - ema_LE)
