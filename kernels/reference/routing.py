"""Which expert each token goes to, and the order of the rows: plain torch. Every order is stable."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Gate(NamedTuple):
    """What the router decided for T tokens."""

    ids_TK: Tensor
    """int64: chosen experts, the best first; of equal scores the lower id."""
    weights_TK: Tensor
    """Share of each chosen expert in the output; differentiable."""
    probs_TE: Tensor
    """Softmax over all experts; differentiable (the load-balancing loss needs it)."""


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


def topk_gate(logits_TE: Tensor, k: int, *, renormalize: bool) -> Gate:
    """Softmax over all experts, then the best k; with `renormalize` their weights sum to one."""
    # One column per token: a softmax over few experts runs an order of magnitude faster across the long dimension.
    probs_ET = torch.softmax(logits_TE.t().contiguous(), dim=0)
    probs_TE = probs_ET.t()
    ids_TK = torch.sort(logits_TE.detach(), dim=-1, descending=True, stable=True).indices[:, :k]
    weights_TK = probs_TE.gather(1, ids_TK)
    if renormalize:
        weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
    return Gate(ids_TK, weights_TK, probs_TE)


def expert_load(ids_TK: Tensor, num_experts: int) -> Tensor:
    """How many (token, choice) pairs each expert got: int64 [E]."""
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
