"""What the learner trains on: samples, and micro-batches of them as tensors. Knows nothing of models or optimizers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..types import Group
from .groups import advantages, judged


class Sample(NamedTuple):
    """A prompt and a response; for RL also how the response came about and what it is worth."""

    prompt: np.ndarray
    """int32 [P], P >= 1"""
    response: np.ndarray
    """int32 [n], n >= 1"""
    logprobs: np.ndarray
    """float32 [n], by the policies that sampled the response; empty in SFT"""
    advantage: float = 0.0

    @property
    def num_inputs(self) -> int:
        """Tokens that the model reads: all but the last."""
        return len(self.prompt) + len(self.response) - 1


class MicroBatch(NamedTuple):
    """Samples end to end. T input tokens, N response tokens."""

    tokens: Tensor
    """int64 [T]"""
    positions: Tensor
    """int64 [T]"""
    lengths: list[int]
    """Input tokens of each sample"""
    rows: Tensor
    """int64 [N]: the input after which each response token comes"""
    targets: Tensor
    """int64 [N]: the response tokens"""
    behaviour: Tensor
    """float32 [N]: log-probabilities by the policies that sampled; empty in SFT"""
    advantage: Tensor
    """float32 [N]"""


def imitated(examples: Sequence[tuple[np.ndarray, np.ndarray]]) -> list[Sample]:
    """(prompt, response) pairs as samples."""
    return [Sample(prompt, response, np.zeros(0, np.float32)) for prompt, response in examples]


def sampled(group: Group) -> list[Sample]:
    """The judged responses of a group with their advantages, DAPO eq. 9.

    Raises FloatingPointError if a reward or a log-probability is not finite.
    """
    trajectories = judged(group)
    if not all(np.isfinite(t.reward) and np.isfinite(t.logprobs()).all() for t in trajectories):
        raise FloatingPointError(f"prompt {group.prompt.ordinal} has a reward or log-probability that is not finite")
    worth = advantages(np.array([t.reward for t in trajectories], np.float32))
    return [
        Sample(group.prompt.tokens, t.tokens(), t.logprobs(), float(advantage))
        for t, advantage in zip(trajectories, worth, strict=True)
    ]


def collate(samples: Sequence[Sample]) -> MicroBatch:
    """Lays samples end to end."""
    lengths = [s.num_inputs for s in samples]
    starts = np.cumsum(lengths) - lengths
    sizes = [len(s.response) for s in samples]
    firsts = starts + [len(s.prompt) - 1 for s in samples]
    return MicroBatch(
        tokens=_long([part for s in samples for part in (s.prompt, s.response[:-1])]),
        positions=_long([np.arange(length) for length in lengths]),
        lengths=lengths,
        rows=_long([first + np.arange(size) for first, size in zip(firsts, sizes, strict=True)]),
        targets=_long([s.response for s in samples]),
        behaviour=torch.from_numpy(np.concatenate([s.logprobs for s in samples])),
        advantage=torch.tensor([s.advantage for s in samples]).repeat_interleave(torch.tensor(sizes)),
    )


def _long(parts: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))
