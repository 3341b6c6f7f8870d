"""The placements of all layers, and when it pays to change them.

    a step's load --> what the ranks had to do, as placed before it --> what may be expected --> new placements?

A layer's replicas move if, over the steps that a placement may be expected to hold, the busiest rank saves more work
than it takes to copy the experts. Replicas count at their best division (`level_split`), which is made anew for each
batch. Knows nothing of actors, or of how weights are moved.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ...kernels.placement import Placement, place_experts
from .monitor import Counts, LoadMonitor, Loads


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What is balanced, and what a move may cost."""

    num_ranks: int
    slots_per_rank: int
    decay: float
    horizon_steps: int
    move_pairs: float


class Outcome(NamedTuple):
    """Of one step. Loads are those of the busiest rank over the mean, layers added up: they wait for each other."""

    before: float
    """Experts in order, no replicas."""
    after: float
    """As placed when the step began, pairs divided by `level_split`."""
    moves: int
    """Experts to be copied before the next step."""


class Fleet:
    """Virtual ranks that share the experts of a model."""

    def __init__(self, terms: Terms) -> None:
        self._terms = terms
        self._monitor = LoadMonitor(terms.decay)
        self.placements: list[Placement] = []

    def observe(self, load_LE: Counts) -> Outcome:
        """Judges the placements by the load of a step, then changes them where that pays."""
        if not self.placements:
            self.placements = [self._place(np.ones(load_LE.shape[1])) for _ in load_LE]
        layers = list(zip(self.placements, load_LE, strict=True))
        mean = float(load_LE.sum()) / self._terms.num_ranks or 1.0
        before = sum(int(in_order(load, self._terms.num_ranks).max()) for load in load_LE)
        after = sum(int(placement.level_load(load).max()) for placement, load in layers)
        self._monitor.observe(load_LE)
        moves = sum(self._replace(layer, load) for layer, load in enumerate(self._monitor.expected))
        return Outcome(before / mean, after / mean, moves)

    def _replace(self, layer: int, load_E: Loads) -> int:
        """Moves the replicas of a layer if that pays; returns how many experts are copied."""
        old, counts = self.placements[layer], np.rint(load_E).astype(np.int64)
        highest = int(old.level_load(counts).max())
        if self._worth(highest - counts.sum() / self._terms.num_ranks) < 1:
            return 0  # Even a perfect placement would not pay for one move.
        new = self._place(load_E, keep=old)
        moves = len(new.moves_from(old))
        if moves == 0 or self._worth(highest - int(new.level_load(counts).max())) <= moves:
            return 0
        self.placements[layer] = new
        return moves

    def _worth(self, saved_pairs: float) -> float:
        """How many moves so much less work for the busiest rank in a step would pay for."""
        return saved_pairs * self._terms.horizon_steps / self._terms.move_pairs

    def _place(self, load_E: Loads, keep: Placement | None = None) -> Placement:
        ranks = self._terms.num_ranks
        return place_experts(load_E, ranks * self._terms.slots_per_rank, ranks, keep=keep)


def in_order(load_E: Counts, num_ranks: int) -> Counts:
    """Load of each rank if experts lie in order, without replicas, as evenly as their number allows: int64 [G]."""
    rank_E = np.arange(len(load_E)) * num_ranks // len(load_E)
    return np.bincount(rank_E, weights=load_E, minlength=num_ranks).astype(np.int64)
