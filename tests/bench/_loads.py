"""Loads of experts: as they drift from batch to batch, and the fixed cases on which placements are compared."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


def drifting(*, experts: int, pairs: int, drift: float, sigma: float, batches: int, seed: int) -> Iterator[Ints]:
    """Pairs of each expert, batch by batch: int64 [experts], with sum `pairs`.

    Log-popularities are normal with deviation `sigma`; each is an AR(1) process that moves by `drift` a batch and keeps
    that deviation. The pairs of a batch are drawn from them.
    """
    random = np.random.default_rng(seed)
    popularity = random.normal(0, sigma, experts)
    keep = np.sqrt(1 - (drift / sigma) ** 2)
    for _ in range(batches):
        share = np.exp(popularity)
        yield random.multinomial(pairs, share / share.sum())
        popularity = keep * popularity + random.normal(0, drift, experts)


def _fixtures() -> Iterator[tuple[str, Ints, int, int]]:
    """Name, load, slots, ranks."""
    random = np.random.default_rng(2026)
    for experts, slots, ranks in ((8, 12, 4), (64, 72, 8), (128, 144, 8), (128, 160, 16), (256, 288, 32)):
        for sigma in (0.0, 0.5, 1.0, 2.0):
            load = random.multinomial(256 * experts, _share(random.normal(0, sigma, experts)))
            yield f"lognormal-{experts}-{slots}-{ranks}-{sigma:g}", load, slots, ranks
        rank = np.arange(1, experts + 1)
        yield f"zipf-{experts}-{slots}-{ranks}", (1e6 / rank).astype(np.int64), slots, ranks
        yield f"one-{experts}-{slots}-{ranks}", np.where(rank == 3, 10**6, 0), slots, ranks
        yield f"two-levels-{experts}-{slots}-{ranks}", np.where(rank % 4 == 0, 1000, 10), slots, ranks
        yield f"none-{experts}-{slots}-{ranks}", np.zeros(experts, np.int64), slots, ranks
    for seed in range(8):
        load = random.multinomial(32_768, random.dirichlet(np.full(128, 0.3 + seed / 4)))
        yield f"dirichlet-{seed}", load, 144, 8


def _share(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    share = np.exp(logits)
    return np.asarray(share / share.sum())


FIXTURES = list(_fixtures())
