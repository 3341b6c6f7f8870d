"""Pairs to the replicas of their experts: how many each takes, and which. The split itself is kernels/leveling.py."""

from __future__ import annotations

import torch
from torch import Tensor

from ..leveling import NO_SLOT, SWEEPS, level_split
from .routing import Rows


def replica_split(
    counts_LE: Tensor, slots_LER: Tensor, *, num_ranks: int, slots_per_rank: int, sweeps: int = SWEEPS
) -> Tensor:
    """Pairs of each replica, int64 [L, E, R], so that no rank has more to do than it must; see `level_split`."""
    shape = {"num_ranks": num_ranks, "slots_per_rank": slots_per_rank, "sweeps": sweeps}
    layers = zip(counts_LE.cpu().numpy(), slots_LER.cpu().numpy(), strict=True)
    quota = [torch.from_numpy(level_split(counts, slots, **shape)) for counts, slots in layers]
    return torch.stack(quota).to(counts_LE.device) if quota else torch.empty_like(slots_LER)


def replica_dispatch(ids_TK: Tensor, rows: Rows, slots_ER: Tensor, quota_ER: Tensor) -> Tensor:
    """The slot of each pair, like ids_TK: an expert's pairs, in token order, fill its replicas one by one.

    `rows` are those of ids_TK, without padding. Pairs beyond an expert's quota go to its last replica; a pair without a
    row gets NO_SLOT.
    """
    pairs = rows.pairs_N[: int(rows.load_E.sum())].long()
    experts = ids_TK.reshape(-1)[pairs].long()
    start_E = rows.ends_E.long() - rows.load_E.long()
    place = torch.arange(len(pairs), device=ids_TK.device) - start_E[experts]
    replica = (place.unsqueeze(1) >= quota_ER.cumsum(1)[experts]).sum(1)
    last = (slots_ER != NO_SLOT).sum(1)[experts] - 1
    result = torch.full_like(ids_TK, NO_SLOT).reshape(-1)
    result[pairs] = slots_ER[experts, torch.minimum(replica, last)].to(ids_TK.dtype)
    return result.reshape(ids_TK.shape)
