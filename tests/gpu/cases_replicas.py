"""Cases of kernels/replicas.py and kernels/capacity.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from case import Case
from torch import Tensor

from headrace.kernels import capacity, reference, replicas
from headrace.kernels.placement import Placement, place_experts
from headrace.kernels.routing import Rows, align

RANKS = 8


def _popularity(experts: int, random: torch.Generator) -> Tensor:
    return torch.exp(torch.randn(experts, generator=random, device=random.device))


def _placed(expected: Tensor) -> Placement:
    experts = len(expected)
    return place_experts(expected.cpu().numpy(), experts + 2 * RANKS, RANKS)


def _layers(size: tuple[int, int], random: torch.Generator) -> tuple[Tensor, Tensor, int, int]:
    """Layers, experts: a placement of old loads, and new ones."""
    layers, experts = size
    popularity = _popularity(experts, random)
    placement = _placed(popularity)
    noise = torch.rand(layers, experts, generator=random, device=random.device)
    counts = (popularity * (0.5 + noise) * 256).long()
    slots = torch.from_numpy(placement.slots_ER).to(random.device).expand(layers, -1, -1).contiguous()
    return counts, slots, RANKS, placement.slots_per_rank


def _split(counts_LE: Tensor, slots_LER: Tensor, ranks: int, slots_per_rank: int) -> Tensor:
    return replicas.replica_split(counts_LE, slots_LER, num_ranks=ranks, slots_per_rank=slots_per_rank)


def _split_exactly(counts_LE: Tensor, slots_LER: Tensor, ranks: int, slots_per_rank: int) -> Tensor:
    return reference.replica_split(counts_LE, slots_LER, num_ranks=ranks, slots_per_rank=slots_per_rank)


def _routed(size: tuple[int, int, int], random: torch.Generator) -> tuple[Tensor, Rows, Tensor, Tensor]:
    """Tokens, choices, experts."""
    tokens, k, experts = size
    popularity = _popularity(experts, random)
    noise = torch.empty(tokens, experts, device=random.device).exponential_(generator=random)
    ids = (noise / popularity).topk(k, dim=1, largest=False).indices
    rows, placement = align(ids, experts), _placed(popularity)
    slots = torch.from_numpy(placement.slots_ER).to(random.device)
    quota = _split(rows.load_E.unsqueeze(0), slots.unsqueeze(0), RANKS, placement.slots_per_rank)[0]
    return ids, rows, slots, quota


def _limited(size: tuple[int, int, int, float], random: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, choices, experts, capacity over the mean load."""
    tokens, k, experts, factor = size
    favour = torch.log(_popularity(experts, random))
    scores = torch.randn(tokens, experts, generator=random, device=random.device) + favour
    limit = torch.full((experts,), int(tokens * k * factor / experts) + 1, device=random.device)
    return scores.topk(k, dim=1).indices, scores, limit


def _counts(ids_TK: Tensor, *rest: Any) -> list[int]:
    return torch.bincount(ids_TK.reshape(-1)).tolist()


def cases() -> Iterator[Case]:
    yield Case(
        name="replica_split",
        small=((1, 16), (3, 40)),
        large=(48, 128),
        make=_layers,
        run=_split,
        exact=_split_exactly,
        spec=replicas.SPLIT,
    )
    yield Case(
        name="replica_dispatch",
        small=((0, 2, 16), (50, 3, 16), (300, 4, 40)),
        large=(262_144, 8, 128),
        make=_routed,
        run=replicas.replica_dispatch,
        exact=reference.replica_dispatch,
        eager=reference.replica_dispatch,
        moved_bytes=lambda ids, rows, slots, quota: 3 * ids.nbytes,
        spec=replicas.DISPATCH,
        load=_counts,
    )
    yield Case(
        name="capacity_redirect",
        small=((0, 2, 8, 1.0), (60, 2, 8, 1.0), (90, 3, 40, 0.9)),
        large=(32_768, 8, 128, 1.1),
        make=_limited,
        run=capacity.capacity_redirect,
        exact=reference.capacity_redirect,
        eager=reference.capacity_redirect,
        spec=capacity.ACCEPT,
        load=_counts,
    )
