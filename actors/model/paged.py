"""Keys and values in pages of a few tokens, and attention over them. Knows nothing of which sequence owns which page.

    tables [S, P]   page ids of each sequence --> pool [layers, (k, v), pages, G, page_tokens, D]

A page may be in the tables of several sequences (they share a beginning); who writes to it must be alone.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import PackedAttention
from .block import Attend
from .config import ModelConfig


class PagedCache:
    """Pages of keys and values, fp32. `num_kv_heads` of `config` are its heads: a rank that has some gives a config
    with those.
    """

    def __init__(
        self, config: ModelConfig, *, num_pages: int, page_tokens: int, device: torch.device | str = "cpu"
    ) -> None:
        self.config = config
        self.num_pages = num_pages
        self.page_tokens = page_tokens
        self.data = torch.zeros(
            config.num_layers, 2, num_pages, config.num_kv_heads, page_tokens, config.head_dim, device=device
        )

    def copy(self, sources: np.ndarray, targets: np.ndarray) -> None:
        """Copies pages `sources` (int64 [n]) to `targets`, of which none is among `sources`."""
        self.data[:, :, torch.from_numpy(targets)] = self.data[:, :, torch.from_numpy(sources)]

    def clear(self, pages: np.ndarray) -> None:
        """Zeroes pages, int64 [n]."""
        self.data[:, :, torch.from_numpy(pages)] = 0.0

    def attend(self, positions: np.ndarray, counts: np.ndarray, tables: np.ndarray, num_decode: int) -> Attend:
        """How the tokens of a batch (see rollout.runner.Batch) meet keys: theirs are written, then all are read."""
        write = self.writer(positions, counts, tables)
        parts = [self._over_pages(positions[:num_decode], tables[:num_decode])] if num_decode else []
        ends = np.cumsum(counts)
        fresh: list[int] = []
        later: list[int] = []
        for i in range(num_decode, len(counts)):
            (later if positions[ends[i] - counts[i]] else fresh).append(i)
        packed = PackedAttention(counts[fresh].tolist()) if fresh else None

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            write(layer, k, v)
            out = q.new_empty(len(q), q.shape[1] * q.shape[2])
            if parts:
                out[:num_decode] = parts[0](layer, q[:num_decode])
            if packed is not None:
                mine = torch.from_numpy(np.concatenate([np.arange(ends[i] - counts[i], ends[i]) for i in fresh]))
                out[mine] = packed(layer, q[mine], k[mine], v[mine])
            for i in later:
                own = slice(int(ends[i] - counts[i]), int(ends[i]))
                out[own] = self._continued(layer, q[own], tables[i], int(positions[own.start]))
            return out

        return attend

    def writer(
        self, positions: np.ndarray, counts: np.ndarray, tables: np.ndarray
    ) -> Callable[[int, Tensor, Tensor], None]:
        """How the keys and values [T, G, D] of a layer are kept for the tokens of a batch."""
        heads, size = self.config.num_kv_heads, self.page_tokens
        owner = np.repeat(np.arange(len(counts)), counts)
        pages = tables[owner, positions // size].astype(np.int64)
        rows = (pages[:, None] * heads + np.arange(heads)) * size + (positions % size)[:, None]
        where = torch.from_numpy(rows.reshape(-1)).to(self.data.device)

        def write(layer: int, k: Tensor, v: Tensor) -> None:
            for flat, new in zip(self.data[layer].flatten(1, 3), (k, v), strict=True):
                flat.index_copy_(0, where, new.flatten(0, 1))

        return write

    def _continued(self, layer: int, q: Tensor, table: np.ndarray, start: int) -> Tensor:
        """Attention of tokens start..start+n of one sequence over all of it so far: [n, H, D] -> [n, H * D]."""
        end = start + len(q)
        ids = torch.from_numpy(table[: -(-end // self.page_tokens)].astype(np.int64))
        k, v = self.data[layer][:, ids].transpose(1, 2).flatten(2, 3)[:, :, :end]
        causal = torch.arange(end) <= torch.arange(start, end).unsqueeze(1)
        out = F.scaled_dot_product_attention(q.transpose(0, 1), k, v, attn_mask=causal, enable_gqa=True)
        flat: Tensor = out.transpose(0, 1).flatten(1)
        return flat

    def _over_pages(self, positions: np.ndarray, tables: np.ndarray) -> Callable[[int, Tensor], Tensor]:
        config = self.config
        num, length = len(positions), int(positions.max()) + 1
        ids = torch.from_numpy(tables[:, : -(-length // self.page_tokens)].astype(np.int64))
        ids = ids.clamp(0, self.num_pages - 1)
        future = torch.arange(ids.shape[1] * self.page_tokens) > torch.from_numpy(positions).unsqueeze(1)
        bias = torch.zeros(future.shape).masked_fill_(future, -torch.inf).view(num, 1, 1, -1)

        def attend(layer: int, q: Tensor) -> Tensor:
            k, v = self.data[layer][:, ids].transpose(2, 3).flatten(3, 4)
            queries = q.unflatten(1, (config.num_kv_heads, -1))
            scores = (queries @ k.transpose(-1, -2)) * config.head_dim**-0.5 + bias
            out: Tensor = (torch.softmax(scores, -1) @ v).flatten(1)
            return out

        return attend
