"""When the experts of a rollout worker move to other slots: by the load of its own tokens, every so many steps.

    saw(ids) of each step --sum, every `steps`--> a placement that pays for its moves, on a thread --> wanted()

The judgement is that of the balancer (balancer/fleet.py). Knows nothing of how experts move.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from ....kernels.placement import Placement
from ...balancer.fleet import Fleet, Terms
from ...model.config import ModelConfig
from .mesh import Mesh


@dataclass(frozen=True, kw_only=True)
class Balancing:
    """Settings."""

    steps: int = 256
    """Steps whose load is looked at as one."""
    decay: float = 0.5
    """Weight of the load before that, against the newest."""
    horizon: int = 4
    """So many times `steps` a placement is expected to hold: what it saves must pay for the moves in that time."""
    move_pairs: float = 14_000.0
    """Cost of moving an expert: (token, choice) pairs that a rank could compute meanwhile. A pair takes 2 operations
    for each of the expert's weights, a copy moves 2 bytes: at 700 TFLOP/s and 50 GB/s 14,000 pairs."""


class Balance:
    """Watches the load of one worker. All but the placing itself runs on the thread of the steps."""

    def __init__(self, mesh: Mesh, config: ModelConfig, settings: Balancing | None = None) -> None:
        settings = settings or Balancing()
        self._settings = settings
        self._shape = config.num_layers, config.num_experts
        self._fleet = Fleet(
            Terms(
                num_ranks=mesh.ep,
                slots_per_rank=mesh.slots_per_rank(config.num_experts),
                decay=settings.decay,
                horizon_steps=settings.horizon,
                move_pairs=settings.move_pairs,
            )
        )
        self._placements: Sequence[Placement] = ()
        self._load = np.zeros(self._shape, np.int64)
        self._steps = 0
        self._thread = ThreadPoolExecutor(1, "placing experts")
        self._placing: Future[list[Placement]] | None = None
        self.moves = 0
        """Experts that were moved."""

    def placed(self, placements: Sequence[Placement]) -> None:
        """Experts are there now; what was being thought out for others counts no more."""
        self._placements = placements
        self._placing = None

    def saw(self, ids: np.ndarray) -> None:
        """The experts of the tokens of a step, [T, L, K]."""
        layers, num_experts = self._shape
        cells = ids.astype(np.int64) + np.arange(layers)[:, None] * num_experts
        self._load += np.bincount(cells.reshape(-1), minlength=self._load.size).reshape(self._shape)
        self._steps += 1
        if self._steps >= self._settings.steps and self._placing is None:
            self._placing = self._thread.submit(self._think, list(self._placements), self._load)
            self._load, self._steps = np.zeros(self._shape, np.int64), 0

    def wanted(self) -> list[Placement] | None:
        """Where the experts should move now; None: they stay. Whoever asks moves them."""
        if self._placing is None or not self._placing.done():
            return None
        placing, self._placing = self._placing, None
        wanted = placing.result()
        moves = sum(len(new.moves_from(old)) for new, old in zip(wanted, self._placements, strict=True))
        if not moves:
            return None
        self.moves += moves
        self._placements = wanted
        return wanted

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _think(self, placements: list[Placement], load_LE: np.ndarray) -> list[Placement]:
        self._fleet.placements = placements
        self._fleet.observe(load_LE)
        return list(self._fleet.placements)
