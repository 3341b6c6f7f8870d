"""Keeps every expert within its capacity: pairs beyond it go to the next-best expert with room. Plain torch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

NO_EXPERT = -1
"""In place of an expert: this pair has none."""


class Redirect(NamedTuple):
    """Where the pairs of T tokens go under a capacity."""

    ids_TK: Tensor
    """Expert of each pair, NO_EXPERT if it was dropped; dtype as given."""
    load_E: Tensor
    """int64: pairs of each expert, at most its capacity."""
    num_dropped: Tensor
    """int64, scalar: pairs that had an expert and have none now."""


def capacity_redirect(ids_TK: Tensor, scores_TE: Tensor, capacity_E: Tensor, *, rounds: int = 4) -> Redirect:
    """Moves what is beyond capacity_E, in rounds; integers, the same on every machine.

    First each expert takes the pairs that chose it, then in each of `rounds` those that were sent on to it, as far as
    it has room: the best scores first, of equal ones the lower pairs (token, then choice). What it has taken stays. A
    pair without an expert asks, of the experts that have room and no other pair of its token, the one with the token's
    best score, of equal ones the lowest; pairs of a token ask in turn, never two the same. Who has none after the last
    round is dropped. NaN scores count as -inf.
    """
    num_experts, num_pairs = scores_TE.shape[1], ids_TK.numel()
    scores = torch.where(scores_TE.isnan(), -torch.inf, scores_TE) + 0.0
    ids = torch.full_like(ids_TK, NO_EXPERT)
    load = torch.zeros_like(capacity_E)
    proposal = ids_TK
    for round_ in range(rounds + 1):
        if round_:
            proposal = _proposals(ids_TK, ids, scores, load < capacity_E)
        asking = torch.arange(num_pairs, device=ids.device)[proposal.reshape(-1) >= 0]
        asked = proposal.reshape(-1)[asking].long()
        order = torch.argsort(scores[asking // ids.shape[1], asked], descending=True, stable=True)
        order = order[torch.argsort(asked[order], stable=True)]
        count = torch.bincount(asked, minlength=num_experts)
        place = torch.arange(len(order), device=ids.device) - (count.cumsum(0) - count)[asked[order]]
        room = (capacity_E - load).clamp(min=0)
        taken = order[place < room[asked[order]]]
        ids.view(-1)[asking[taken]] = asked[taken].to(ids.dtype)
        load = load + torch.minimum(count, room)
    return Redirect(ids, load, ((ids_TK >= 0) & (ids < 0)).sum())


def _proposals(wanted_TK: Tensor, ids_TK: Tensor, scores_TE: Tensor, open_E: Tensor) -> Tensor:
    """The expert that each pair without one asks, or NO_EXPERT."""
    order_TE = torch.sort(scores_TE, dim=1, descending=True, stable=True).indices
    # One column more, which nobody sees, stands for no expert.
    open_TE = torch.nn.functional.pad(open_E.expand(len(scores_TE), -1), (0, 1))
    open_TE = open_TE.scatter(1, _or_last(ids_TK, scores_TE.shape[1]), False)
    proposal = torch.full_like(ids_TK, NO_EXPERT)
    for choice in range(ids_TK.shape[1]):
        ranked_TE = open_TE.gather(1, order_TE)
        best = order_TE.gather(1, ranked_TE.int().argmax(1, keepdim=True))[:, 0]
        asks = (ids_TK[:, choice] < 0) & (wanted_TK[:, choice] >= 0) & ranked_TE.any(1)
        proposal[:, choice] = torch.where(asks, best, NO_EXPERT)
        open_TE = open_TE.scatter(1, _or_last(proposal[:, choice : choice + 1], scores_TE.shape[1]), False)
    return proposal


def _or_last(ids: Tensor, num_experts: int) -> Tensor:
    return torch.where(ids < 0, num_experts, ids).long()
