"""A forward pass in tiles of a constant shape, so that no bit of a token's result depends on the tokens beside it.

    T tokens --> tiles of 16, the last one filled up --> every operation has the same shapes for all of them

How a library multiplies two matrices, and in which order it adds, depends on their shapes. Here these are constant: a
tile has 16 tokens, whether they begin a sequence or go on with it, each expert has 16 rows, and attention reads as many
positions as the model has. It costs several times as much. Knows nothing of requests or versions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .config import ModelConfig
from .decode import DecoderWeights, forward, logits
from .linear import Weight, grouped_linear, linear
from .paged import PagedCache

TILE = 16


@torch.inference_mode()
def fixed_forward(
    weights: DecoderWeights,
    cache: PagedCache,
    rotations: Tensor,
    tokens: np.ndarray,
    positions: np.ndarray,
    tables: np.ndarray,
) -> tuple[Tensor, Tensor]:
    """Runs tokens, int64 [T], of which each has a row of `tables` [T, P] of its own; those of a sequence ascend.

    Returns the hidden states [T, d], before the last norm, and the experts [T, L, K].
    """
    layers = tuple(w._replace(gate_up=_Even(w.gate_up), down=_Even(w.down)) for w in weights.layers)
    even = weights._replace(layers=layers)
    hidden, chosen = [], []
    for begin in range(0, len(tokens), TILE):
        part = slice(begin, begin + TILE)
        x, routes = _tile(even, cache, rotations, tokens[part], positions[part], tables[part])
        hidden.append(x)
        chosen.append(routes)
    return torch.cat(hidden), torch.cat(chosen)


@torch.inference_mode()
def fixed_logits(config: ModelConfig, weights: DecoderWeights, x: Tensor) -> Tensor:
    """[N, d] -> [N, V]; see decode.logits."""
    parts = [logits(config, weights, _filled(part))[: len(part)] for part in x.split(TILE)]
    return torch.cat(parts)


def _tile(
    weights: DecoderWeights,
    cache: PagedCache,
    rotations: Tensor,
    tokens: np.ndarray,
    positions: np.ndarray,
    tables: np.ndarray,
) -> tuple[Tensor, Tensor]:
    config, num = cache.config, len(tokens)
    heads, groups, width = config.num_heads, config.num_kv_heads, config.head_dim
    write = cache.writer(positions, np.ones(num, np.int64), tables)
    at = _filled(torch.from_numpy(positions.copy()))
    pages = torch.zeros(TILE, -(-config.max_positions // cache.page_tokens), dtype=torch.int64)
    held = np.arange(tables.shape[1]) <= positions[:, None] // cache.page_tokens
    pages[:num, : tables.shape[1]] = torch.from_numpy(np.where(held, tables, 0))
    future = torch.arange(pages.shape[1] * cache.page_tokens) > at.unsqueeze(1)
    bias = torch.zeros(future.shape).masked_fill_(future, -torch.inf).repeat_interleave(groups, 0).unsqueeze(1)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        write(layer, k[:num], v[:num])
        keys, values = (x.flatten(0, 1) for x in cache.read(layer, pages))
        queries = q.reshape(TILE * groups, heads // groups, width)
        scores = torch.baddbmm(bias, queries, keys.transpose(1, 2), alpha=width**-0.5)
        return torch.bmm(torch.softmax(scores, -1), values).view(TILE, -1)

    fed = _filled(torch.from_numpy(tokens.copy()))
    x, routes = forward(config, weights, fed, rotations[at].unsqueeze(1), attend)
    return x[:num], torch.stack(routes, 1)[:num]


def _filled(x: Tensor) -> Tensor:
    """With rows of zeros up to TILE."""
    return torch.cat([x, x.new_zeros(TILE - len(x), *x.shape[1:])])


@dataclass(frozen=True, slots=True)
class _Even:
    """The weights of experts, of which each is given TILE rows, most of them empty. See linear.Held."""

    weight: Weight

    def linear(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)

    def grouped_linear(self, x: Tensor, ends: Tensor) -> Tensor:
        num_experts, rows = len(ends), torch.arange(len(x))
        expert = torch.searchsorted(ends.long(), rows, right=True)
        begins = torch.cat([ends.new_zeros(1), ends[:-1]]).long()
        where = expert * TILE + rows - begins[expert]
        even = x.new_zeros(num_experts * TILE, x.shape[1]).index_copy_(0, where, x)
        constant = torch.arange(TILE, (num_experts + 1) * TILE, TILE, dtype=torch.int32)
        return grouped_linear(even, self.weight, constant).index_select(0, where)
