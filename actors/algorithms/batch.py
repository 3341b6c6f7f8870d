"""The responses of a step, as an algorithm sees them. Knows nothing of tensors, models or where they came from.

groups  -->  Batch: R responses in the order of groups and members
               rewards  lengths  correct  truncated      [R] each
               token_rewards()                           R arrays, one number per response token
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..types import Group, Trajectory
from .groups import judged

Tokens = list[np.ndarray]
"""R arrays, float32 [n]: a number for each token of each response."""


class Batch:
    """The judged responses of some groups.

    Raises ValueError, naming the sample, if there is none, or a reward or a behaviour log-probability is not finite.
    """

    def __init__(self, groups: Sequence[Group]) -> None:
        self.groups = list(groups)
        self.responses: list[Trajectory] = []
        self.group_sizes: list[int] = []
        """Responses of each group that take part."""
        self._ordinals: list[int] = []
        for group in self.groups:
            members = judged(group)
            self.responses += members
            self.group_sizes.append(len(members))
            self._ordinals += [group.prompt.ordinal] * len(members)
        if not self.responses:
            raise ValueError(
                f"the batch of {len(self.groups)} groups is empty: no response has a verdict; look at the verifier"
            )
        self.lengths = np.array([t.num_tokens for t in self.responses])
        """int64 [R]: tokens of each response."""
        self.rewards = np.array([t.reward for t in self.responses], np.float32)
        """float32 [R]"""
        self.correct = np.array([t.verdict is not None and t.verdict.correct for t in self.responses])
        """bool [R]"""
        self.truncated = np.array([t.finish == "length" for t in self.responses])
        """bool [R]: responses that used up their token budget."""
        for index, response in enumerate(self.responses):
            if not np.isfinite(response.reward):
                raise ValueError(f"{self.name(index)} has reward {response.reward}; a failed reward is an error value")
            if not np.isfinite(response.logprobs()).all():
                raise ValueError(f"{self.name(index)} has a behaviour log-probability that is not finite")

    def __len__(self) -> int:
        return len(self.responses)

    def name(self, index: int) -> str:
        """Response number `index` in words."""
        return f"prompt {self._ordinals[index]}, member {self.responses[index].member}"

    def token_rewards(self) -> Tokens:
        """Zero at every token but the last, which has the response's reward."""
        rewards = self.spread(np.zeros(len(self), np.float32))
        for row, reward in zip(rewards, self.rewards, strict=True):
            row[-1] = reward
        return rewards

    def spread(self, per_response: np.ndarray) -> Tokens:
        """Each response's number [R] at all of its tokens."""
        return [np.full(n, x, np.float32) for n, x in zip(self.lengths, per_response, strict=True)]

    def check(self, tokens: Sequence[np.ndarray | None], what: str) -> None:
        """Raises ValueError, naming the first sample at which `tokens` doesn't fit the responses or is not finite.

        None in the place of an array says that the response takes no part.
        """
        if len(tokens) != len(self):
            raise ValueError(f"there must be {what} for {len(self)} responses, got {len(tokens)}")
        for index, row in enumerate(tokens):
            if row is None:
                continue
            if row.shape != (self.lengths[index],):
                raise ValueError(
                    f"{what} of {self.name(index)} must have shape ({self.lengths[index]},), one for each token of the "
                    f"response, got {row.shape}"
                )
            if len(wrong := np.flatnonzero(~np.isfinite(row))):
                raise ValueError(f"{what} of {self.name(index)} are {row[wrong[0]]} at token {wrong[0]}")
        if all(row is None for row in tokens):
            raise ValueError(f"no response of the batch takes part: there are no {what}")
