"""What a reasoning-RL job needs of its task: problems, the order they are asked in, worked examples, a vocabulary.

    [task] kind = "running_sum" | "puzzles"        running_sum.py, puzzles.py: a frozen dataclass each

    questions(seed).prompt(ordinal) -> rollout -> verifier -> questions.observe(group)       RL
    demonstrations(...)                                                                      SFT
    evaluation_set(...)                                                                      the score

Knows no task, and nothing of models, rewards or actors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from ...runtime.codec import wire
from ..types import Group, Prompt


@wire
@dataclass(kw_only=True, slots=True)
class Demonstration:
    """A prompt and the response that a demonstrator wrote for it."""

    prompt: Prompt
    response: np.ndarray
    """int32 [n], ends with the end-of-sequence token"""


class Questions(Protocol):
    """Which problems are asked in RL. What it learns of them is its state, which belongs into the checkpoint."""

    def prompt(self, ordinal: int) -> Prompt:
        """Problem number `ordinal`: the same for the same state."""

    def observe(self, group: Group, *, mixed: bool) -> None:
        """Counts a judged group; `mixed` says whether its verdicts differ, so that it has an advantage."""

    def metrics(self) -> dict[str, float]:
        """What the row of a step shall say; names are those of report.METRICS."""

    def state(self) -> dict[str, Any]:
        """Plain values; `load_state` goes on from them."""

    def load_state(self, state: dict[str, Any]) -> None:
        """Raises ValueError if the state is that of another task."""


@runtime_checkable
class Task(Protocol):
    """Table `[task]`. All of it is a function of the settings, a seed and ordinals."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def eos_id(self) -> int: ...

    @property
    def max_prompt_tokens(self) -> int:
        """No prompt is longer."""

    def questions(self, seed: int) -> Questions:
        """Those of a run that begins."""

    def evaluation_set(self, seed: int, count: int) -> list[Prompt]:
        """The fixed problems -1..-count, which training never uses."""

    def largest_size(self, step: int, num_steps: int) -> int:
        """Size of the hardest demonstrations at SFT step `step` of `num_steps`."""

    def demonstrations(self, seed: int, ordinals: np.ndarray, largest: int) -> list[Demonstration]:
        """Worked examples number `ordinals` (int64 [N]), of sizes up to `largest`; none is asked in RL."""

    def solve(self, prompt: Prompt) -> np.ndarray:
        """A faultless response, int32 [n]."""

    def decode(self, tokens: np.ndarray) -> str:
        """Text of `tokens` (int [n]), of any ids, without a last end-of-sequence token."""

    def check(self, max_new_tokens: int) -> None:
        """Raises ValueError, naming the setting, if problems don't fit prompts, or solutions `max_new_tokens`."""
