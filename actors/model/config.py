"""The shape of a Qwen3-MoE model: the `[model]` table. Knows nothing of torch, weights or files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Gt

from ...runtime.codec import wire


@wire
@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes of a Qwen3-MoE model in which every layer is a mixture of experts. Raises ValueError if they contradict."""

    vocab_size: Annotated[int, Ge(2)] = 64
    """Rows of the embedding: at least the number of tokens of the task's tokenizer."""
    hidden_size: Annotated[int, Ge(1)] = 128
    """Width of the residual stream."""
    num_layers: Annotated[int, Ge(1)] = 2
    """Decoder layers."""
    num_heads: Annotated[int, Ge(1)] = 4
    """Query heads; a multiple of num_kv_heads."""
    num_kv_heads: Annotated[int, Ge(1)] = 2
    """Key and value heads."""
    head_dim: Annotated[int, Ge(2)] = 32
    """Width of a head; even."""
    num_experts: Annotated[int, Ge(1)] = 8
    """Experts of each layer."""
    num_experts_per_tok: Annotated[int, Ge(1)] = 2
    """Experts that each token visits; at most num_experts."""
    moe_intermediate_size: Annotated[int, Ge(1)] = 128
    """Inner width of an expert."""
    rope_theta: Annotated[float, Gt(0)] = 10000.0
    """Base of the rotary position frequencies."""
    rms_norm_eps: Annotated[float, Gt(0)] = 1e-6
    """Added to the mean square in every norm."""
    max_positions: Annotated[int, Ge(1)] = 256
    """Longest sequence, prompt included."""
    tie_word_embeddings: bool = False
    """Whether the output layer is the embedding."""
    norm_topk_prob: bool = True
    """Whether the weights of the chosen experts are scaled to sum to one."""
    initializer_range: Annotated[float, Gt(0)] = 0.02
    """Standard deviation of the random initial weights."""

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads must be a multiple of num_kv_heads, got {self.num_heads} and {self.num_kv_heads}; "
                f"set num_kv_heads to a divisor of {self.num_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even, got {self.head_dim}; rotary positions turn pairs of numbers")
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(
                f"num_experts_per_tok must be at most num_experts, got {self.num_experts_per_tok} of "
                f"{self.num_experts}; lower it or add experts"
            )
