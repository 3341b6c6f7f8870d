"""The `[evaluation]` table: the fixed problems that judge every stage. Knows nothing of how they are answered."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge

from ...runtime.codec import wire


@wire
@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """The same problems at every evaluation and for every seed of a run; training never sees them."""

    num_problems: Annotated[int, Ge(1)] = 512
    """Problems in the set; the standard error of a score near one half is 0.5 / sqrt(num_problems * samples)."""
    seed: Annotated[int, Ge(0)] = 20261123
    """Seed of the set. It is not the run's seed, so that runs can be compared."""
    samples: Annotated[int, Ge(1)] = 1
    """Sampled answers to each problem at temperature 1: pass@1 is the share of correct ones. Greedy takes one more."""
    every: Annotated[int, Ge(0)] = 20
    """RL steps between evaluations; 0 evaluates only after SFT and after RL."""
    num_shown: Annotated[int, Ge(0)] = 3
    """Problems whose greedy answers before and after RL are shown at the end."""
