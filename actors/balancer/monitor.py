"""What load the experts of each layer may expect, from the loads of the steps so far. Knows nothing of placement."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[np.int64]
Loads = NDArray[np.float64]


class LoadMonitor:
    """A mean of the loads that it observes, newer ones weighing more: by `decay` a step."""

    def __init__(self, decay: float) -> None:
        self._decay = decay
        self._sum: Loads | None = None
        self._weight = 0.0

    def observe(self, load_LE: Counts) -> None:
        """(token, choice) pairs of each expert in a step, [layers, E]. Another shape than before begins anew."""
        if self._sum is None or self._sum.shape != load_LE.shape:
            self._sum, self._weight = np.zeros(load_LE.shape), 0.0
        self._sum = self._decay * self._sum + load_LE
        self._weight = self._decay * self._weight + 1.0

    @property
    def expected(self) -> Loads:
        """Pairs in the next step, [layers, E]. There was at least one step."""
        assert self._sum is not None
        return self._sum / self._weight
