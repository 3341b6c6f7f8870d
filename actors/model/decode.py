"""Qwen3-MoE for generation: weights fused once per version, and a forward pass over tokens of any sequences.

How queries meet keys is the cache's affair (`Attend`; paged.py). Knows nothing of sampling, requests or pages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import PackedAttention
from .block import Attend, LayerWeights, block, fuse, rotations, unit_rms
from .config import ModelConfig


class DecoderWeights(NamedTuple):
    """The weights of one policy version, in the form that computing wants."""

    layers: tuple[LayerWeights, ...]
    embed: Tensor
    """[V, d]"""
    head: Tensor
    """[V, d], times the last norm"""


def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of a model, by Hugging Face name; the experts of a layer are fused."""
    d, f, width, experts = config.hidden_size, config.moe_intermediate_size, config.head_dim, config.num_experts
    of_layer = {
        "input_layernorm.weight": (d,),
        "self_attn.q_proj.weight": (config.num_heads * width, d),
        "self_attn.k_proj.weight": (config.num_kv_heads * width, d),
        "self_attn.v_proj.weight": (config.num_kv_heads * width, d),
        "self_attn.o_proj.weight": (d, config.num_heads * width),
        "self_attn.q_norm.weight": (width,),
        "self_attn.k_norm.weight": (width,),
        "post_attention_layernorm.weight": (d,),
        "mlp.gate.weight": (experts, d),
        "mlp.experts.gate_up_proj": (experts, 2 * f, d),
        "mlp.experts.down_proj": (experts, d, f),
    }
    layers = {f"model.layers.{i}.{name}": shape for i in range(config.num_layers) for name, shape in of_layer.items()}
    head = {} if config.tie_word_embeddings else {"lm_head.weight": (config.vocab_size, d)}
    return {"model.embed_tokens.weight": (config.vocab_size, d), **layers, "model.norm.weight": (d,), **head}


def check_weights(config: ModelConfig, tensors: Mapping[str, np.ndarray]) -> None:
    """Raises ValueError for names or shapes of another model, FloatingPointError for numbers that are not finite."""
    wanted = shapes(config)
    wrong = sorted(n for n in wanted.keys() | tensors.keys() if n not in tensors or wanted.get(n) != tensors[n].shape)
    if wrong:
        given = tensors[wrong[0]].shape if wrong[0] in tensors else None
        raise ValueError(
            f"weights are of another model: {wrong[0]} has shape {given}, expected {wanted.get(wrong[0])} "
            f"({len(wrong)} tensors differ); check the [model] table"
        )
    for name, tensor in tensors.items():
        if not np.isfinite(tensor).all():
            raise FloatingPointError(f"{name} is not finite; these weights are refused")


@torch.inference_mode()
def fuse_weights(
    config: ModelConfig, tensors: Mapping[str, np.ndarray], device: torch.device | str = "cpu"
) -> DecoderWeights:
    """Fuses weights by Hugging Face name (fp32, as `Learner.weights` gives them). All are copied."""

    def tensor(name: str) -> Tensor:
        return torch.tensor(tensors[name], device=device)

    def layer(index: int) -> LayerWeights:
        return fuse(config, lambda name: tensor(f"model.layers.{index}.{name}"))

    embed = tensor("model.embed_tokens.weight")
    head = embed if config.tie_word_embeddings else tensor("lm_head.weight")
    layers = tuple(layer(index) for index in range(config.num_layers))
    return DecoderWeights(layers, embed, head * tensor("model.norm.weight"))


def forward(
    config: ModelConfig, weights: DecoderWeights, tokens: Tensor, turn: Tensor, attend: Attend
) -> tuple[Tensor, list[Tensor]]:
    """Runs tokens int64 [T] through all layers; `turn` [T, 1, D / 2] are the rotations of their positions.

    Returns the hidden states [T, d], before the last norm, and the experts [T, K] that each layer chose.
    """
    x, routes = weights.embed[tokens], []
    for index, layer in enumerate(weights.layers):
        x, gate, _ = block(config, index, x, layer, turn, attend)
        routes.append(gate.ids_TK)
    return x, routes


def logits(config: ModelConfig, weights: DecoderWeights, x: Tensor) -> Tensor:
    """[N, d] -> [N, V], through the last norm and the head."""
    return F.linear(unit_rms(x, config.rms_norm_eps), weights.head)


CROP_TOKENS = 16
"""A step reads the cache up to its longest row, rounded up to this many tokens."""


class KvCache:
    """Keys and values of `num_slots` sequences of up to `max_len` tokens, in fp32."""

    def __init__(self, config: ModelConfig, *, num_slots: int, max_len: int) -> None:
        if max_len > config.max_positions:
            raise ValueError(
                f"a cache of {max_len} tokens is longer than the model's max_positions {config.max_positions}; "
                "raise model.max_positions or shorten prompts or answers"
            )
        self.num_slots = num_slots
        self.max_len = max_len
        self.num_heads = config.num_kv_heads
        self.data = torch.zeros(config.num_layers, 2, num_slots, config.num_kv_heads, max_len, config.head_dim)
        """[layers, (key, value), slots, G, max_len, D]"""

    @torch.inference_mode()
    def copy(self, source: int, targets: slice, length: int) -> None:
        """Copies the first `length` tokens of slot `source` to every slot of `targets`."""
        self.data[:, :, targets, :, :length] = self.data[:, :, source : source + 1, :, :length]

    def rows(self, slots: Tensor, positions: Tensor) -> Tensor:
        """Where (slot, position) pairs [N] lie in the flat view that `write` uses: int64 [N * G]."""
        heads = slots.unsqueeze(1) * self.num_heads + torch.arange(self.num_heads)
        return (heads * self.max_len + positions.unsqueeze(1)).flatten()

    def write(self, layer: int, rows: Tensor, k: Tensor, v: Tensor) -> None:
        """Stores k and v [N, G, D] at `rows`."""
        for flat, new in zip(self.data[layer].flatten(1, 3), (k, v), strict=True):
            flat.index_copy_(0, rows, new.flatten(0, 1))

    def view(self, layer: int, num_rows: int, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the first rows and tokens: two [num_rows * G, length, D], without a copy."""
        k, v = self.data[layer, :, :num_rows].flatten(1, 2)[:, :, :length]
        return k, v


class Decoder:
    """The weights of one policy version, fused for decoding. `load` replaces them; caches stay valid."""

    def __init__(self, config: ModelConfig, tensors: Mapping[str, np.ndarray]) -> None:
        self.config = config
        self._rotations = rotations(config)
        self.load(tensors)

    @torch.inference_mode()
    def load(self, tensors: Mapping[str, np.ndarray]) -> None:
        """Takes weights by Hugging Face name (fp32, as `Learner.weights` gives them). All are copied."""

        self.weights = fuse_weights(self.config, tensors)

    @torch.inference_mode()
    def prefill(self, cache: KvCache, tokens: Tensor, lengths: Sequence[int], slots: Tensor) -> Tensor:
        """Runs whole sequences that lie end to end (int64 [T]) and fills slot i of `slots` with the i-th.

        Returns the logits after the last token of each, [len(lengths), vocab_size].
        """
        sizes = torch.as_tensor(lengths)
        ends = sizes.cumsum(0)
        positions = torch.arange(len(tokens)) - (ends - sizes).repeat_interleave(sizes)
        rows = cache.rows(slots.repeat_interleave(sizes), positions)
        packed = PackedAttention(lengths)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            cache.write(layer, rows, k, v)
            return packed(layer, q, k, v)

        return self._logits(self._run(tokens, positions, attend)[ends - 1])

    @torch.inference_mode()
    def step(self, cache: KvCache, tokens: Tensor, positions: Tensor) -> Tensor:
        """Adds one token to each of the first B slots: tokens and positions are int64 [B].

        Row b attends to cache positions 0..positions[b], its own new token last. Returns logits [B, vocab_size].
        """
        num_rows, heads, width = len(tokens), self.config.num_heads, self.config.head_dim
        length = min(-(-(int(positions.max()) + 1) // CROP_TOKENS) * CROP_TOKENS, cache.max_len)
        rows = cache.rows(torch.arange(num_rows), positions)
        future = torch.arange(length) > positions.unsqueeze(1)
        bias = torch.zeros(num_rows, length).masked_fill_(future, -torch.inf)
        bias = bias.repeat_interleave(cache.num_heads, 0).unsqueeze(1)
        scale = width**-0.5

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            cache.write(layer, rows, k, v)
            keys, values = cache.view(layer, num_rows, length)
            queries = q.reshape(num_rows * cache.num_heads, heads // cache.num_heads, width)
            scores = torch.baddbmm(bias, queries, keys.transpose(1, 2), alpha=scale)
            return torch.bmm(torch.softmax(scores, -1), values).view(num_rows, heads * width)

        return self._logits(self._run(tokens, positions, attend))

    def _run(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        return forward(self.config, self.weights, tokens, self._rotations[positions].unsqueeze(1), attend)[0]

    def _logits(self, x: Tensor) -> Tensor:
        return logits(self.config, self.weights, x)
