"""What a sequence costs to train, so that work can be balanced. Knows nothing of how."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..model.config import ModelConfig


class Workload(NamedTuple):
    """Floating-point operations of one forward pass over a sequence of n tokens: linear * n + quadratic * n^2.

    A backward pass costs twice as much, which changes no balance.
    """

    linear: float
    """Of a token: matrices that every token goes through, and those of its experts."""
    quadratic: float
    """Of a pair of tokens: causal attention, half of the square."""

    def cost(self, lengths: Sequence[int]) -> np.ndarray:
        """float64 [n] for n sequences."""
        tokens = np.asarray(lengths, np.float64)
        return np.asarray(self.linear * tokens + self.quadratic * tokens * tokens, np.float64)


def workload_of(model: ModelConfig) -> Workload:
    """Two operations for each weight that a token meets, and four for each width of a head that a pair meets."""
    width, heads = model.hidden_size, model.num_heads * model.head_dim
    attention = width * (2 * heads + 2 * model.num_kv_heads * model.head_dim)
    experts = width * model.num_experts + model.num_experts_per_tok * 3 * width * model.moe_intermediate_size
    weights = model.num_layers * (attention + experts) + width * model.vocab_size
    return Workload(linear=2.0 * weights, quadratic=2.0 * model.num_layers * heads)
