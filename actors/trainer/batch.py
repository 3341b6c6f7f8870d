"""What the learners train on: samples, and micro-batches of them as tensors. Knows nothing of models or optimizers."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..algorithms.groups import judged
from ..types import Group

_NONE = np.zeros(0, np.float32)


class Sample(NamedTuple):
    """A prompt and a response; for RL also how the response came about and what its tokens are worth."""

    prompt: np.ndarray
    """int32 [P], P >= 1"""
    response: np.ndarray
    """int32 [n], n >= 1"""
    logprobs: np.ndarray = _NONE
    """float32 [n], by the policies that sampled the response; empty unless the policy is trained by RL"""
    target: np.ndarray = _NONE
    """float32 [n]: advantages for a policy, returns for a critic; empty in SFT"""
    positive: bool = False
    """Whether the response is correct"""
    proximal: np.ndarray = _NONE
    """float32 [n], by the policy that the step began from; empty where nobody asked for it"""

    @property
    def num_inputs(self) -> int:
        """Tokens that the model reads: all but the last."""
        return len(self.prompt) + len(self.response) - 1


class Totals(NamedTuple):
    """Counts over a whole update, that losses divide by: the same for each of its parts."""

    tokens: int
    """Of responses."""
    inputs: int
    """Tokens that the model reads."""
    responses: int
    positive_tokens: int
    """Of correct responses."""

    @staticmethod
    def of(samples: Sequence[Sample]) -> Totals:
        return Totals(
            tokens=sum(len(s.response) for s in samples),
            inputs=sum(s.num_inputs for s in samples),
            responses=len(samples),
            positive_tokens=sum(len(s.response) for s in samples if s.positive),
        )


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
    sizes: list[int]
    """Response tokens of each sample"""
    behaviour: Tensor
    """float32 [N]: log-probabilities by the policies that sampled; empty unless the policy is trained by RL"""
    target: Tensor
    """float32 [N]: advantages or returns; empty in SFT"""
    positive: Tensor
    """bool [N]: tokens of correct responses"""
    proximal: Tensor
    """float32 [N]: log-probabilities by the policy that the step began from; empty where nobody asked for them"""


def imitated(examples: Sequence[tuple[np.ndarray, np.ndarray]]) -> list[Sample]:
    """(prompt, response) pairs as samples."""
    return [Sample(prompt, response) for prompt, response in examples]


def rated(groups: Sequence[Group], targets: Sequence[np.ndarray | None] | None = None) -> list[list[Sample]]:
    """The judged responses of each group with their targets [n], if any; those whose target is None are left out."""
    remaining = iter(targets) if targets is not None else itertools.repeat(_NONE)
    result = []
    for group in groups:
        members = [(t, next(remaining)) for t in judged(group)]
        result.append(
            [
                Sample(
                    group.prompt.tokens, t.tokens(), t.logprobs(), target, t.verdict is not None and t.verdict.correct
                )
                for t, target in members
                if target is not None
            ]
        )
    return result


def check_lengths(groups: Sequence[Group], max_positions: int) -> None:
    """Raises ValueError, naming the sample, if a prompt and its response are longer than the model's positions."""
    for group in groups:
        for t in judged(group):
            num_tokens = len(group.prompt.tokens) + t.num_tokens
            if num_tokens > max_positions:
                raise ValueError(
                    f"prompt {group.prompt.ordinal}, member {t.member} has {num_tokens} tokens with its prompt; the "
                    f"model has {max_positions} positions ([model] max_positions)"
                )


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
        sizes=sizes,
        behaviour=torch.from_numpy(np.concatenate([s.logprobs for s in samples])),
        target=torch.from_numpy(np.concatenate([s.target for s in samples])),
        positive=torch.tensor([s.positive for s in samples]).repeat_interleave(torch.tensor(sizes)),
        proximal=torch.from_numpy(np.concatenate([s.proximal for s in samples])),
    )


def _long(parts: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))
