"""Cases of kernels/routing.py and kernels/statistics.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from case import Case
from torch import Tensor

from headrace.kernels import reference, routing, statistics


def _ids(size: tuple[int, int, int, float], random: torch.Generator) -> tuple[Tensor, int]:
    """Tokens, choices, experts, sigma of lognormal popularity; the k of a token differ, as a router's do."""
    tokens, k, experts, sigma = size
    device = random.device
    popularity = torch.exp(sigma * torch.randn(experts, generator=random, device=device))
    noise = torch.empty(tokens, experts, device=device).exponential_(generator=random)
    return (noise / popularity).topk(k, dim=1, largest=False).indices.to(torch.int32), experts


def _sorted_by_torch(ids_TK: Tensor, experts: int) -> Any:
    flat = ids_TK.reshape(-1)
    pairs = torch.sort(flat, stable=True).indices
    load = torch.bincount(flat, minlength=experts)
    rows = torch.empty_like(pairs)
    rows[pairs] = torch.arange(len(pairs), device=flat.device)
    return pairs, load, load.cumsum(0), rows


def _counts(ids_TK: Tensor, experts: int) -> list[int]:
    return torch.bincount(ids_TK.reshape(-1), minlength=experts).tolist()


def cases() -> Iterator[Case]:
    yield Case(
        name="align",
        small=((0, 2, 4, 1.0), (7, 2, 4, 1.0), (600, 8, 40, 1.0), (900, 8, 12, 3.0)),
        large=(262_144, 8, 128, 1.0),
        make=_ids,
        run=routing.align,
        exact=lambda ids, experts: reference.align(ids, experts, may_drop=True),
        eager=_sorted_by_torch,
        bars={"eager": 5.0, "compiled": 4.0},
        spec=routing.COUNT,
        tuned=tuple((1 << n, 8, 128, sigma) for n in range(10, 20) for sigma in (0.0, 0.5, 1.0, 2.0)),
        load=_counts,
    )
    yield Case(
        name="align_tiles",
        small=((7, 2, 4, 1.0), (600, 8, 40, 1.0)),
        large=(16_384, 8, 128, 1.0),
        make=_ids,
        run=lambda ids, experts: routing.align(ids, experts, tile=16),
        exact=lambda ids, experts: reference.align(ids, experts, tile=16, may_drop=True),
        eager=_sorted_by_torch,
        bars={"eager": 5.0, "compiled": 4.0},
        spec=routing.COUNT,
        load=_counts,
    )
    yield Case(
        name="align_decode",
        small=((1, 8, 128, 1.0), (64, 8, 128, 2.0)),
        large=(64, 8, 128, 1.0),
        make=_ids,
        run=routing.align,
        exact=lambda ids, experts: reference.align(ids, experts, may_drop=True),
        eager=_sorted_by_torch,
        bars={"eager": 5.0},
        spec=routing.SMALL,
        tuned=tuple((1 << n, 8, 128, sigma) for n in range(9) for sigma in (0.0, 1.0, 2.0)),
        load=_counts,
    )
    yield Case(
        name="expert_load",
        small=((600, 8, 40, 1.0),),
        large=(262_144, 8, 128, 1.0),
        make=_ids,
        run=routing.expert_load,
        exact=lambda ids, experts: torch.bincount(ids.reshape(-1), minlength=experts).to(ids.dtype),
        eager=lambda ids, experts: torch.bincount(ids.reshape(-1), minlength=experts),
        moved_bytes=lambda ids, experts: ids.nbytes,
        spec=routing.COUNT,
        load=_counts,
    )
    yield Case(
        name="prob_sum",
        small=((0, 5), (300, 40), (65, 130)),
        large=(262_144, 128),
        make=lambda size, random: (torch.rand(size, generator=random, device=random.device),),
        run=statistics.prob_sum,
        exact=lambda probs: probs.double().sum(0),
        rtol=1e-5,
        eager=lambda probs: probs.sum(0),
        moved_bytes=lambda probs: probs.nbytes,
    )
    yield Case(
        name="load_ema",
        small=((3, 40),),
        large=(64, 128),
        make=lambda size, random: (
            torch.rand(size, generator=random, device=random.device),
            torch.randint(0, 1000, size, generator=random, device=random.device),
        ),
        run=lambda ema, counts: statistics.load_ema_(ema.clone(), counts, 0.9),
        exact=lambda ema, counts: 0.9 * ema.double() + 0.1 * counts,
        rtol=1e-5,
        eager=lambda ema, counts: torch.lerp(ema, counts.float(), 0.1),
    )
