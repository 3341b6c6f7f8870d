"""The trained model: one optimizer step of imitation (SFT) or of DAPO at a time, deterministic, resumable to the bit.

    examples --sft_step--> metrics        state() -> arrays, info -> load_state(): goes on as if it had not stopped
    groups ---rl_step---> metrics         weights(): what is published

A step splits its tokens into packed micro-batches, adds up their gradients, and updates once (RL: once per mini-batch).
Knows nothing of actors, pools, versions or files.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..model.config import ModelConfig
from ..model.qwen3_moe import Qwen3Moe
from ..types import Group, Trajectory
from .dapo import advantages, judged, policy_loss
from .optim import Optimizer, Schedule
from .packing import pack
from .settings import RlSettings, SftSettings

Stage = Literal["sft", "rl"]
Metrics = dict[str, float]
"""Names and units are those of actors/report.py."""


class Sample(NamedTuple):
    """A prompt, a response, and for RL what the loss needs of it."""

    prompt: np.ndarray
    """int32 [P]"""
    response: np.ndarray
    """int32 [n]"""
    logprobs: np.ndarray | None = None
    """float32 [n], of the policy that sampled it"""
    advantage: float = 0.0

    @property
    def num_inputs(self) -> int:
        """Tokens that the model reads: all but the last."""
        return len(self.prompt) + len(self.response) - 1


class _Tally:
    """Sums over the tokens of a step, for its metrics."""

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.tokens = 0
        self.sums: dict[str, float] = {}
        self.ratio_max = 0.0
        self.norms: list[float] = []
        self.load: Tensor | None = None

    def add(self, load: Tensor, **sums: Tensor) -> None:
        self.load = load if self.load is None else self.load + load
        for name, value in sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(value)
