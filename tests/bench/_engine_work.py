"""What engines are compared on: a model, prompts of groups, and long-tailed lengths of their responses.

Every response has a length of its own, as if its end-of-sequence token came there: the tail is that of reasoning
(p99 several times the mean), and all engines write the same tokens. Knows nothing of engines.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from headrace.actors.data.running_sum import RunningSum
from headrace.actors.model import checkpoint
from headrace.actors.model.config import ModelConfig
from headrace.actors.model.qwen3_moe import Qwen3Moe

MODEL = ModelConfig(hidden_size=128, num_layers=2, num_experts=8, max_positions=512, initializer_range=0.1)
"""The default job's, with room for long responses; random weights of a size that makes likeliest tokens stand out."""

EOS_ID = RunningSum.eos_id
"""Its logit is always 0: as good as never the likeliest token."""

NUM_PROMPTS, GROUP_SIZE = 48, 8
MAX_PROMPT, MAX_NEW = 48, 448
MEDIAN_TOKENS, SIGMA = 64, 0.9
"""Of the lognormal lengths."""


@dataclass(frozen=True, kw_only=True)
class Endless(RunningSum):
    """Its responses end by their length alone."""

    eos_id = -1


@dataclass
class Work:
    """The responses that are wanted; entry i belongs to prompt i // GROUP_SIZE."""

    weights: dict[str, np.ndarray]
    prompts: list[np.ndarray]
    """int32 [P] each"""
    lengths: np.ndarray
    """int64 [responses]"""

    @property
    def num_tokens(self) -> int:
        return int(self.lengths.sum())


def make_work(seed: int = 0) -> Work:
    rng = np.random.default_rng(seed)
    weights = {name: p.detach().numpy().copy() for name, p in Qwen3Moe(MODEL, seed=seed).named_parameters()}
    weights["lm_head.weight"][EOS_ID] = 0.0
    sizes = rng.integers(MAX_PROMPT // 3, MAX_PROMPT + 1, NUM_PROMPTS)
    prompts = [rng.integers(2, MODEL.vocab_size, size).astype(np.int32) for size in sizes]
    lengths = rng.lognormal(np.log(MEDIAN_TOKENS), SIGMA, NUM_PROMPTS * GROUP_SIZE)
    return Work(weights, prompts, np.clip(lengths.round(), 1, MAX_NEW).astype(np.int64))


def save_model(work: Work, folder: Path) -> None:
    """As Hugging Face has it."""
    checkpoint.save(folder, MODEL, work.weights)


def tail(lengths: np.ndarray) -> float:
    """p99 over the mean."""
    return float(np.percentile(lengths, 99) / lengths.mean())
