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
    """The N = T * K (token, choice) pairs, sorted by expert."""

    pairs_N: Tensor
    """int64: row -> pair, where pair = token * K + choice."""
    load_E: Tensor
    """int64: rows of each expert."""
    ends_E: Tensor
    """int32: one past the last row of each expert, as `torch.nn.functional.grouped_mm` wants it."""


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


def align(ids_TK: Tensor, num_experts: int) -> Rows:
    """Sorts the pairs by expert; inside an expert they stay in token order."""
    load_E = expert_load(ids_TK, num_experts)
    return Rows(torch.argsort(ids_TK.reshape(-1), stable=True), load_E, load_E.cumsum(0).to(torch.int32))
