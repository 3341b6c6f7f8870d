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

    First each expert takes the pairs that chose it, then in each of `rounds` those that were sent on to it, as far as it
    has room: the best scores first, of equal ones the lower pairs (token, then choice). What it has taken stays. A pair
    without an expert asks, of the experts that have room and no other pair of its token, the one with the token's best
    score, of equal ones the lowest; pairs of a token ask in turn, never two the same. Who has none after the last round
    is dropped. NaN scores count as -inf.
    """
    num_experts, pairs = scores_TE.shape[1], ids_TK.numel()
    scores = torch.where(scores_TE.isnan(), -torch.inf, scores_TE) + 0.0
    ids = torch.full_like(ids_TK, NO_EXPERT)
    load = torch.zeros_like(capacity_E)
    proposal = torch.where(ids_TK < 0, num_experts, ids_TK)
    for round_ in range(rounds + 1):
        if round_:
            proposal = _proposals(ids_TK, ids, scores, load < capacity_E)
        asked = proposal.reshape(-1).long()
        tokens = torch.arange(pairs, device=ids.device) // max(1, ids_TK.shape[1])
        score = torch.cat((scores, scores.new_zeros(len(scores), 1)), 1)[tokens, asked]
        order = torch.argsort(score, descending=True, stable=True)
        order = order[torch.argsort(asked[order], stable=True)]
        count = torch.bincount(asked, minlength=num_experts + 1)
        place = torch.arange(pairs, device=ids.device) - (count.cumsum(0) - count)[asked[order]]
        room = torch.cat(((capacity_E - load).clamp(min=0), load.new_zeros(1)))
        taken = order[place < room[asked[order]]]
        ids.view(-1)[taken] = asked[taken].to(ids.dtype)
        load = load + torch.minimum(count, room)[:-1]
    return Redirect(ids, load, ((ids_TK >= 0) & (ids < 0)).sum())


def _proposals(wanted_TK: Tensor, ids_TK: Tensor, scores_TE: Tensor, open_E: Tensor) -> Tensor:
    """The expert that each pair without one asks; E: none."""
    num_experts = scores_TE.shape[1]
    open_TE = torch.cat((open_E.expand(len(scores_TE), -1), open_E.new_zeros(len(scores_TE), 1)), 1)
    held = torch.where(ids_TK < 0, num_experts, ids_TK).long()
    open_TE = open_TE.scatter(1, held, False)
    padded = torch.cat((scores_TE, scores_TE.new_zeros(len(scores_TE), 1)), 1)
    proposal = torch.full_like(ids_TK, num_experts)
    for choice in range(ids_TK.shape[1]):
        # Not a maximum: -inf is a score too.
        order = torch.sort(torch.where(open_TE, padded, -torch.inf), dim=1, descending=True, stable=True).indices
        open_first = torch.sort(open_TE.gather(1, order).int(), dim=1, descending=True, stable=True).indices[:, :1]
        best = order.gather(1, open_first)
        asks = (ids_TK[:, choice] < 0) & (wanted_TK[:, choice] >= 0) & open_TE.gather(1, best)[:, 0]
        best = torch.where(asks.unsqueeze(1), best, num_experts)
        proposal[:, choice] = best[:, 0].to(proposal.dtype)
        open_TE = open_TE.scatter(1, best, False)
    return proposal
