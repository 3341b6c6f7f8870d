"""Experts of a layer on several ranks: which pairs are this rank's, and how experts move to other slots.

    ids_TK --replicas share the load--> slots --those of this rank--> Rows      (then block.experts; sums make the rest)
    placements, new placements --> the experts that change hands, one exchange a layer

All ranks see the same ids, so all know who computes what without asking. Where an expert has replicas, each batch is
divided anew by kernels.replicas. Knows nothing of when to move.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from ....kernels.placement import Placement
from ....kernels.reference import Rows, align
from ....kernels.replicas import replica_dispatch, replica_split
from ...model.block import LayerWeights
from ...model.linear import Weight
from .link import Link


class Slots:
    """The experts of one layer, as seen from one rank."""

    def __init__(self, placement: Placement, e: int, device: torch.device) -> None:
        self.placement = placement
        self._first = e * placement.slots_per_rank
        self._slots_ER = torch.from_numpy(placement.slots_ER).to(device)
        self._replicas = self._slots_ER.shape[1] > 1

    def rows(self, ids_TK: Tensor) -> Rows:
        """The pairs of T tokens that this rank computes, sorted by its slots; `ids_TK` are the same at all ranks."""
        local = (self._slots(ids_TK) - self._first).reshape(-1)
        size = self.placement.slots_per_rank
        slot = torch.where((local >= 0) & (local < size), local, size)
        load = torch.bincount(slot, minlength=size + 1)[:size]
        pairs = torch.argsort(slot, stable=True)[: int(load.sum())]
        return Rows(pairs, load, load.cumsum(0).to(torch.int32))

    def _slots(self, ids_TK: Tensor) -> Tensor:
        if not self._replicas:
            return self._slots_ER[:, 0][ids_TK]
        rows = align(ids_TK, self.placement.num_experts)
        shape = {"num_ranks": self.placement.num_ranks, "slots_per_rank": self.placement.slots_per_rank}
        quota_LER = replica_split(rows.load_E.long()[None], self._slots_ER[None], **shape)
        return replica_dispatch(ids_TK.contiguous(), rows, self._slots_ER, quota_LER[0])


def move(
    link: Link, layers: Sequence[LayerWeights], old: Sequence[Placement], new: Sequence[Placement]
) -> tuple[LayerWeights, ...]:
    """The weights of all layers in their new slots. All ranks call this at once. Raises RankLost."""
    moved = []
    for weights, before, after in zip(layers, old, new, strict=True):
        if np.array_equal(before.experts_P, after.experts_P):
            moved.append(weights)
            continue
        raw = _tensors(weights.gate_up) + _tensors(weights.down)
        fresh = _moved(link, [_bytes(tensor) for tensor in raw], before, after)
        fresh = [new.view(old.dtype).view(old.shape) for new, old in zip(fresh, raw, strict=True)]
        num = len(_tensors(weights.gate_up))
        gate_up, down = _with(weights.gate_up, fresh[:num]), _with(weights.down, fresh[num:])
        moved.append(weights._replace(gate_up=gate_up, down=down))
    return tuple(moved)


def _moved(link: Link, held: list[Tensor], old: Placement, new: Placement) -> list[Tensor]:
    """Rows of bytes, one for each slot of this rank, after the moves; `held` are those before."""
    size, me = old.slots_per_rank, link.place.e
    moves = new.moves_from(old)
    give: list[list[int]] = [[] for _ in range(old.num_ranks)]
    get: list[list[int]] = [[] for _ in range(old.num_ranks)]
    own: list[tuple[int, int]] = []
    for slot, _, source in moves:
        if slot // size == source // size == me:
            own.append((slot % size, source % size))
        elif source // size == me:
            give[slot // size].append(source % size)
        elif slot // size == me:
            get[source // size].append(slot % size)
    widths = [row.shape[1] for row in held]
    sent = [torch.cat([row[give[rank]] for row in held], 1).reshape(-1) for rank in range(old.num_ranks)]
    sizes = [len(slots) * sum(widths) for slots in get]
    received = link.exchange("slots", torch.cat(sent), [len(piece) for piece in sent], sizes)
    fresh = [row.clone() for row in held]
    for target, source in own:
        for row, before in zip(fresh, held, strict=True):
            row[target] = before[source]
    for slots, piece in zip(get, received.split(sizes), strict=True):
        for row, bytes_ in zip(fresh, piece.view(len(slots), sum(widths)).split(widths, 1), strict=True):
            row[slots] = bytes_
    return fresh


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8).reshape(len(tensor), -1)


def _tensors(weight: Weight) -> list[Tensor]:
    """What a weight is made of, each with a row for every slot."""
    return [weight] if isinstance(weight, Tensor) else list(_parts(weight).values())


def _with(weight: Weight, tensors: list[Tensor]) -> Weight:
    """The same weight of other tensors."""
    if isinstance(weight, Tensor):
        return tensors[0]
    changed: Weight = replace(cast(Any, weight), **dict(zip(_parts(weight), tensors, strict=True)))
    return changed


def _parts(weight: Any) -> dict[str, Tensor]:
    """The tensors of a weight that is a dataclass."""
    found = ((field.name, getattr(weight, field.name)) for field in fields(weight))
    return {name: value for name, value in found if isinstance(value, Tensor)}
