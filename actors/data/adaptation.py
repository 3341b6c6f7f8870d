"""Online data adaptation: draw problems of the sizes whose groups still teach something.

A group whose answers are all right or all wrong has no advantage and is filtered (dynamic sampling), so sizes are
drawn by how often their groups are mixed of late:

    weight(size) = prior(size) ** exponent * (share of mixed groups + FLOOR)

An exponent below 1 flattens the prior, the floor keeps asking for sizes that are too easy or too hard today. The state
is a plain dict for the checkpoint, and prompt `ordinal` is drawn with its own random number: the same state gives the
same size. Knows nothing of what a size means.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..philox import Stream, uniforms

EXPONENT = 0.35
FLOOR = 0.05
RATE = 0.05
"""Weight of the newest group in the running mean."""
UNSEEN = 0.5
"""Share of mixed groups that a size is credited with before any is seen."""


class Adaptation:
    """Draws difficulty classes. `sizes` int [S], `prior` float [S] sums to one."""

    def __init__(self, *, sizes: np.ndarray, prior: np.ndarray, seed: int, exponent: float = EXPONENT) -> None:
        self._sizes = [int(size) for size in sizes]
        self._flat_prior = np.asarray(prior, np.float64) ** exponent
        self._seed = seed
        self._mixed = np.full(len(self._sizes), UNSEEN)
        self._num_groups = np.zeros(len(self._sizes), np.int64)

    @property
    def probabilities(self) -> np.ndarray:
        """Chance of each size at the next draw, float64 [S]."""
        weights = self._flat_prior * (self._mixed + FLOOR)
        return np.asarray(weights / weights.sum())

    def choose(self, ordinal: int) -> int:
        """Size of prompt number `ordinal`."""
        u = uniforms(self._seed, Stream.ADAPTATION, ordinal, 0, 1)[0]
        return self._sizes[int(np.searchsorted(np.cumsum(self.probabilities)[:-1], u, side="right"))]

    def observe(self, size: int, *, mixed: bool) -> None:
        """Counts a judged group: were some of its answers right and some wrong?"""
        i = self._sizes.index(size)
        self._mixed[i] += RATE * (mixed - self._mixed[i])
        self._num_groups[i] += 1

    def forget(self, size: int) -> None:
        """What was seen of a size says nothing any more: its problems are others now."""
        self._mixed[self._sizes.index(size)] = UNSEEN

    def state(self) -> dict[str, Any]:
        """Plain values; `load_state` goes on from them."""
        return {"sizes": self._sizes, "mixed": self._mixed.tolist(), "num_groups": self._num_groups.tolist()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Raises ValueError if the state is of other sizes."""
        if list(state["sizes"]) != self._sizes:
            raise ValueError(
                f"adaptation state is for problem sizes {list(state['sizes'])}, the task has {self._sizes}; "
                "resume with the task settings that the run was started with"
            )
        self._mixed = np.array(state["mixed"], np.float64)
        self._num_groups = np.array(state["num_groups"], np.int64)
