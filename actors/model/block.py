"""The mathematics of one Qwen3-MoE layer, once, for training, prefill and decoding. Knows nothing of parameters or caches.

    x -> norm -> q, k, v -> norm, rotate -> attend -> out -> +x -> norm -> gate -> experts -> +

What differs between training and generation is only how queries meet keys, so that is an argument (`Attend`).
Shapes: T tokens (of any sequences), d width, H query heads, G key/value heads, D head width, E experts, f their width.
Queries and keys are kept with the two halves of each head interleaved (see `fuse`), so that a rotation is one
complex product; products of queries and keys do not notice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels.reference import Gate, Rows, align, permute, topk_gate, unpermute
from .config import ModelConfig

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, q [T, H, D], k [T, G, D], v [T, G, D]) -> [T, H * D]"""


class LayerWeights(NamedTuple):
    """Weights of one layer in the form that computing wants."""

    input_norm: Tensor
    """[d]"""
    qkv: Tensor
    """[(H + 2G) D, d]: queries and keys interleaved, then values"""
    qk_norm: Tensor
    """[H + G, D]: the norm of queries for H heads, of keys for G, interleaved"""
    out: Tensor
    """[d, H D]"""
    post_norm: Tensor
    """[d]"""
    gate: Tensor
    """[E, d]"""
    gate_up: Tensor
    """[E, 2f, d]"""
    down: Tensor
    """[E, d, f]"""


def fuse(config: ModelConfig, tensor: Callable[[str], Tensor]) -> LayerWeights:
    """Puts the weights of a layer, found by their Hugging Face names in it, in the form of LayerWeights; differentiable."""
    heads, kv_heads = config.num_heads, config.num_kv_heads
    q, k, v = (tensor(f"self_attn.{name}_proj.weight") for name in "qkv")
    q_norm, k_norm = (tensor(f"self_attn.{name}_norm.weight") for name in "qk")
    return LayerWeights(
        input_norm=tensor("input_layernorm.weight"),
        qkv=torch.cat((_interleave(q, heads), _interleave(k, kv_heads), v)),
        qk_norm=torch.cat((_interleave(q_norm, 1).expand(heads, -1), _interleave(k_norm, 1).expand(kv_heads, -1))),
        out=tensor("self_attn.o_proj.weight"),
        post_norm=tensor("post_attention_layernorm.weight"),
        gate=tensor("mlp.gate.weight"),
        gate_up=tensor("mlp.experts.gate_up_proj"),
        down=tensor("mlp.experts.down_proj"),
    )


def _interleave(weight: Tensor, heads: int) -> Tensor:
    """Rows of each head from (first half, second half) to pairs."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)

def rotations(config: ModelConfig) -> Tensor:
    """Unit complex numbers by which position p turns pair i of a head: [max_positions, D / 2] complex64."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    angles = torch.outer(torch.arange(config.max_positions, dtype=torch.float32), config.rope_theta**-exponents)
    return torch.polar(torch.ones_like(angles), angles)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / root mean square over the last dimension, times weight."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def block(config: ModelConfig, layer: int, x: Tensor, w: LayerWeights, turn: Tensor, attend: Attend) -> tuple[Tensor, Gate, Rows]:
    """One decoder layer over x [T, d]; `turn` [T, 1, D / 2] are the rotations of the tokens' positions."""
    x = x + F.linear(_attention(config, layer, rms_norm(x, w.input_norm, config.rms_norm_eps), w, turn, attend), w.out)
    y, gate, rows = _experts(config, rms_norm(x, w.post_norm, config.rms_norm_eps), w)
    return x + y, gate, rows


def _attention(config: ModelConfig, layer: int, x: Tensor, w: LayerWeights, turn: Tensor, attend: Attend) -> Tensor:
    heads = F.linear(x, w.qkv).unflatten(-1, (-1, config.head_dim))
    qk, v = heads.split((config.num_heads + config.num_kv_heads, config.num_kv_heads), dim=1)
    qk = rms_norm(qk, w.qk_norm, config.rms_norm_eps)
    qk = torch.view_as_real(torch.view_as_complex(qk.unflatten(-1, (-1, 2))) * turn).flatten(-2)
    q, k = qk.split((config.num_heads, config.num_kv_heads), dim=1)
    return attend(layer, q, k, v)


def _experts(config: ModelConfig, x: Tensor, w: LayerWeights) -> tuple[Tensor, Gate, Rows]:
    chosen = topk_gate(F.linear(x, w.gate), config.num_experts_per_tok, renormalize=config.norm_topk_prob)
    rows = align(chosen.ids_TK, config.num_experts)
    expert_in = permute(x, rows, config.num_experts_per_tok)
    gate, up = F.grouped_mm(expert_in, w.gate_up.transpose(1, 2), offs=rows.ends_E).chunk(2, dim=-1)
    expert_out = F.grouped_mm(F.silu(gate) * up, w.down.transpose(1, 2), offs=rows.ends_E)
    return unpermute(expert_out, rows, chosen.weights_TK), chosen, rows
