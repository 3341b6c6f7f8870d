"""Qwen3-MoE for training: parameters under their Hugging Face names, and a forward pass over packed sequences.

Logits equal those of `transformers`. Sequences lie end to end, without padding: everything but attention works on the
flat tokens. Generation is in `decode`; files are in `checkpoint`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.reference import Gate, Rows
from .attention import PackedAttention
from .block import Attend, block, fuse, rotations, unit_rms
from .config import ModelConfig


class Output(NamedTuple):
    """What a forward pass gives for T tokens."""

    hidden: Tensor
    """[T, d], after the last norm"""
    aux_loss: Tensor
    """Scalar, differentiable: see `balance_loss`; the mean over layers"""
    load: Tensor
    """int64 [layers, E]: (token, choice) pairs of each expert"""


class Qwen3Moe(nn.Module):
    """The model. Its parameters are drawn from `seed` and nothing else; norms begin at one.

    With `num_outputs` the last layer has so many rows in the place of the vocabulary's, and is never the embedding.
    """

    rotations: Tensor

    def __init__(self, config: ModelConfig, *, seed: int = 0, num_outputs: int | None = None) -> None:
        super().__init__()
        self.config = config
        with torch.device("meta"):
            self.model = _Decoder(config)
            self.lm_head = _linear(config.hidden_size, num_outputs or config.vocab_size)
        self.to_empty(device="cpu")
        if config.tie_word_embeddings and num_outputs is None:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.register_buffer("rotations", rotations(config), persistent=False)
        random = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            if parameter.ndim == 1:
                nn.init.ones_(parameter)
            else:
                nn.init.normal_(parameter, std=config.initializer_range, generator=random)

    def forward(self, tokens: Tensor, positions: Tensor, lengths: Sequence[int]) -> Output:
        """Runs sequences of `lengths` tokens that lie end to end; tokens and positions are int64 [T].

        Positions count from 0 in each sequence. All lengths are at least 1 and sum to T.
        """
        attend = PackedAttention(lengths)
        turn = self.rotations[positions].unsqueeze(1)
        x = self.model.embed_tokens(tokens)
        aux_losses, loads = [], []
        for layer in self.model.layers:
            x, gate, rows = layer(x, turn, attend)
            aux_losses.append(balance_loss(gate, rows))
            loads.append(rows.load_E)
        hidden = unit_rms(x, self.config.rms_norm_eps) * self.model.norm.weight
        return Output(hidden, torch.stack(aux_losses).mean(), torch.stack(loads))

    def logits(self, hidden: Tensor) -> Tensor:
        """[N, d] -> [N, vocab_size or num_outputs]."""
        return F.linear(hidden, self.lm_head.weight)


def balance_loss(gate: Gate, rows: Rows) -> Tensor:
    """E * sum over experts of (share of the pairs) * (mean probability): 1 if the load is even, E / K at worst.

    Switch Transformers, arXiv 2101.03961, eq. 4, with the shares of K choices summing to one. (`transformers` lets them
    sum to K: its value is K times this one.)
    """
    num_pairs, num_experts = rows.pairs_N.numel(), gate.probs_TE.shape[1]
    return num_experts * (rows.load_E / num_pairs) @ gate.probs_TE.mean(0)


class _Decoder(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(_Layer(config, index) for index in range(config.num_layers))
        self.norm = nn.RMSNorm(config.hidden_size)


class _Layer(nn.Module):
    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.config = config
        self.index = index
        self.self_attn = _Attention(config)
        self.mlp = _Mixture(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size)

    def forward(self, x: Tensor, turn: Tensor, attend: Attend) -> tuple[Tensor, Gate, Rows]:
        return block(self.config, self.index, x, fuse(self.config, self.get_parameter), turn, attend)


class _Attention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d, width = config.hidden_size, config.head_dim
        self.q_proj = _linear(d, config.num_heads * width)
        self.k_proj = _linear(d, config.num_kv_heads * width)
        self.v_proj = _linear(d, config.num_kv_heads * width)
        self.o_proj = _linear(config.num_heads * width, d)
        self.q_norm = nn.RMSNorm(width)
        self.k_norm = nn.RMSNorm(width)


class _Mixture(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = _linear(config.hidden_size, config.num_experts)
        self.experts = _Experts(config)


class _Experts(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        num, d, f = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(num, 2 * f, d))
        self.down_proj = nn.Parameter(torch.empty(num, d, f))


def _linear(num_in: int, num_out: int) -> nn.Linear:
    return nn.Linear(num_in, num_out, bias=False)
