"""The mathematics of one Qwen3-MoE layer, the same for training, prefill and decoding.

    x -> norm -> q, k, v -> norm, rotate -> attend -> out -> +x -> norm -> gate -> experts -> +

What differs between training and generation is only how queries meet keys, so that is an argument (`Attend`). Knows
nothing of parameters, their gradients or caches.
Shapes: T tokens (of any sequences), d width, H query heads, G key/value heads, D head width, E experts, f their width.
Queries and keys are kept with the two halves of each head interleaved (see `fuse`), so that a rotation is one complex
product; products of queries and keys do not notice. The weights of a norm are folded into the matrices after it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels.reference import Gate, Rows, align, permute, topk_gate, unpermute
from .config import ModelConfig
from .linear import Weight, grouped_linear, linear, quantize

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, q [T, H, D], k [T, G, D], v [T, G, D]) -> [T, H * D]"""


class LayerWeights(NamedTuple):
    """Weights of one layer in the form that computing wants."""

    qkv: Weight
    """[(H + 2G) D, d]: queries and keys interleaved, then values; times the norm before attention"""
    qk_norm: Tensor
    """[H + G, D]: the norm of queries for H heads, of keys for G, interleaved"""
    out: Weight
    """[d, H D]"""
    gate: Weight
    """[E, d], times the norm before the experts"""
    gate_up: Weight
    """[E, 2f, d], times the norm before the experts"""
    down: Weight
    """[E, d, f]"""


def fuse(config: ModelConfig, tensor: Callable[[str], Tensor]) -> LayerWeights:
    """Puts the weights of a layer, found by their Hugging Face names, in the form of LayerWeights; differentiable."""
    heads, kv_heads = config.num_heads, config.num_kv_heads
    q, k, v = (tensor(f"self_attn.{name}_proj.weight") for name in "qkv")
    q_norm, k_norm = (_interleave(tensor(f"self_attn.{name}_norm.weight"), 1) for name in "qk")
    pre_attention, pre_experts = tensor("input_layernorm.weight"), tensor("post_attention_layernorm.weight")
    return LayerWeights(
        qkv=torch.cat((_interleave(q, heads), _interleave(k, kv_heads), v)) * pre_attention,
        qk_norm=torch.cat((q_norm.expand(heads, -1), k_norm.expand(kv_heads, -1))),
        out=tensor("self_attn.o_proj.weight"),
        gate=tensor("mlp.gate.weight") * pre_experts,
        gate_up=tensor("mlp.experts.gate_up_proj") * pre_experts,
        down=tensor("mlp.experts.down_proj"),
    )


def to_fp8(w: LayerWeights, *, fp8_inputs: bool) -> LayerWeights:
    """The layer with its large matrices in FP8; the router and the norms stay as they are."""
    qkv, out, gate_up, down = (
        quantize(m, fp8_inputs=fp8_inputs) if isinstance(m, Tensor) else m for m in (w.qkv, w.out, w.gate_up, w.down)
    )
    return w._replace(qkv=qkv, out=out, gate_up=gate_up, down=down)


def _interleave(weight: Tensor, heads: int) -> Tensor:
    """Rows of each head from (first half, second half) to pairs."""
    paired: Tensor = weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
    return paired


def rotations(config: ModelConfig) -> Tensor:
    """Unit complex numbers by which position p turns pair i of a head: [max_positions, D / 2] complex64."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    angles = torch.outer(torch.arange(config.max_positions, dtype=torch.float32), config.rope_theta**-exponents)
    return torch.polar(torch.ones_like(angles), angles)


def unit_rms(x: Tensor, eps: float) -> Tensor:
    """x / root mean square over the last dimension."""
    if not torch.is_grad_enabled():
        return _unit_rms(x, eps)[0]
    y: Tensor = _UnitRms.apply(x, eps)  # type: ignore[no-untyped-call]
    return y


def _unit_rms(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return x * scale, scale


class _UnitRms(torch.autograd.Function):
    """Gradient by hand: half as many passes over memory as autograd makes of the formula."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        y, scale = _unit_rms(x, eps)
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,), (y, scale) = grads, ctx.saved_tensors
        along = (grad * y).mean(-1, keepdim=True)
        return torch.addcmul(grad, y, along, value=-1).mul_(scale), None


def block(
    config: ModelConfig, layer: int, x: Tensor, w: LayerWeights, turn: Tensor, attend: Attend
) -> tuple[Tensor, Gate, Rows]:
    """One decoder layer over x [T, d]; `turn` [T, 1, D / 2] are the rotations of the tokens' positions."""
    x = x + attention(config, layer, unit_rms(x, config.rms_norm_eps), w, turn, attend)
    y = unit_rms(x, config.rms_norm_eps)
    gate = route(config, y, w)
    y, rows = mix(y, w, gate)
    return x + y, gate, rows


def attention(config: ModelConfig, layer: int, x: Tensor, w: LayerWeights, turn: Tensor, attend: Attend) -> Tensor:
    """What attention adds to the residual stream, [T, d], for x [T, d] after the norm."""
    heads = linear(x, w.qkv).unflatten(-1, (-1, config.head_dim))
    num_q_and_k = len(w.qk_norm)
    qk, v = heads.split((num_q_and_k, heads.shape[1] - num_q_and_k), dim=1)
    qk = unit_rms(qk, config.rms_norm_eps) * w.qk_norm
    qk = torch.view_as_real(torch.view_as_complex(qk.unflatten(-1, (-1, 2))) * turn).flatten(-2)
    q, k = qk.split((num_q_and_k - v.shape[1], v.shape[1]), dim=1)
    return linear(attend(layer, q, k, v), w.out)


def route(config: ModelConfig, x: Tensor, w: LayerWeights) -> Gate:
    """The experts of each token of x [T, d], after the norm."""
    return topk_gate(linear(x, w.gate), config.num_experts_per_tok, renormalize=config.norm_topk_prob)


def mix(x: Tensor, w: LayerWeights, gate: Gate) -> tuple[Tensor, Rows]:
    """What the chosen experts add to the residual stream, [T, d], for x [T, d] after the norm."""
    rows = align(gate.ids_TK, gate.probs_TE.shape[1])
    return experts(x, rows, gate.weights_TK, w), rows


def experts(x: Tensor, rows: Rows, weights_TK: Tensor, w: LayerWeights) -> Tensor:
    """What the pairs in `rows` add up to, [T, d]; experts are numbered as the weights hold them."""
    inner, up = grouped_linear(permute(x, rows, weights_TK.shape[1]), w.gate_up, rows.ends_E).chunk(2, dim=-1)
    return unpermute(grouped_linear(F.silu(inner) * up, w.down, rows.ends_E), rows, weights_TK)
