"""What a policy or a critic is asked to do in a step, as messages. Knows nothing of how an update is computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from annotated_types import Ge, Gt, Le

from ...runtime.codec import wire
from ..types import Group


@wire
@dataclass(frozen=True, kw_only=True)
class Objective:
    """What an update of the policy maximises: the clipped surrogate of PPO (arXiv 1707.06347) with its later variants.

    losses.py has the formulas.
    """

    clip_low: Annotated[float, Gt(0), Le(1)] = 0.2
    """A ratio below 1 - clip_low brings nothing further to tokens of negative advantage."""
    clip_high: Annotated[float, Gt(0)] = 0.28
    """A ratio above 1 + clip_high brings nothing further to tokens of positive advantage."""
    dual_clip: Annotated[float, Ge(0)] = 0.0
    """Largest ratio that counts at negative advantage, above 1 + clip_high; 0 sets no bound."""
    mean: Literal["token", "response"] = "token"
    """token: over all tokens of the update; response: over its responses, of the mean over each one's tokens."""
    imitation: Annotated[float, Ge(0)] = 0.0
    """Weight of the negative log-likelihood of correct responses."""
    function: str = ""
    """A loss of the user's own in the place of the surrogate, as "module:name"; see losses.own_loss."""

    def __post_init__(self) -> None:
        if self.dual_clip and self.dual_clip <= 1 + self.clip_high:
            raise ValueError(
                f"dual_clip must be 0 or above 1 + clip_high ({1 + self.clip_high:g}), got {self.dual_clip:g}; try 10"
            )


@wire
@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyUpdate:
    """One step of the policy."""

    groups: list[Group]
    advantages: list[np.ndarray | None]
    """For each judged response, in the order of groups and members: float32 [n], or None if it takes no part."""
    objective: Objective
    learning_rate: float = 0.0
    """AdamW's, before warm-up and decay; Muon's changes in the same ratio. 0: as configured."""
    temperature: float = 0.0
    """Of the policy that is trained; 0: as configured."""


@wire
@dataclass(frozen=True, kw_only=True, slots=True)
class ValueUpdate:
    """One step of the critic."""

    groups: list[Group]
    returns: list[np.ndarray]
    """For each judged response: float32 [n], what the value of the state before each token shall be."""
