"""Keys and values in pages of a few tokens, and attention over them. Knows nothing of which sequence owns which page.

    tables [S, P]   page ids of each sequence --> pool [layers, (k, v), blocks, G, pages of a block * page_tokens, D]

A page may be in the tables of several sequences, which share a beginning; who writes to one must be alone. Neighbouring
pages make a block, which attention reads as a whole: pages can be small, and little memory is lost at their ends.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import PackedAttention
from .block import Attend, LayerWeights
from .config import ModelConfig
from .paged_decode import DecodePlan

BLOCK_TOKENS = 16
"""Tokens of a block, if pages are smaller: an operation on fewer costs as much."""

Write = Callable[[int, Tensor, Tensor], None]
"""(layer, k [T, G, D], v [T, G, D]): keeps them."""


class PagedCache:
    """Pages of keys and values, of `dtype`, of the `num_kv_heads` heads of `config`.

    A rank that has some of the heads gives a config with those.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        num_pages: int,
        page_tokens: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.config = config
        self.num_pages = num_pages
        self.page_tokens = page_tokens
        self._per_block = pages_per_block(page_tokens)
        num_blocks, block_tokens = -(-num_pages // self._per_block), self._per_block * page_tokens
        self._data = torch.zeros(
            config.num_layers, 2, num_blocks, config.num_kv_heads, block_tokens, config.head_dim,
            device=device, dtype=dtype,
        )  # fmt: skip
        self._by_page = self._data.unflatten(4, (self._per_block, page_tokens))
        self._score_bounds = [math.inf] * config.num_layers
        self._key_norms = [0.0] * config.num_layers

    @property
    def by_page(self) -> Tensor:
        """[layers, (k, v), blocks, G, pages of a block, tokens of a page, D]: page p is page p % n of block p // n."""
        view: Tensor = self._by_page
        return view

    def expect(self, layers: Sequence[LayerWeights]) -> None:
        """Says with which weights queries and keys will be made from now on: it bounds how large their products are.

        Queries and keys are normalized, so |q| <= sqrt(D) max |norm's weight|, and likewise |k|, old ones included.
        """
        heads, width = self.config.num_heads, self.config.head_dim
        norms = torch.stack([layer.qk_norm for layer in layers]).abs().amax(-1)
        queries, keys = norms[:, :heads].amax(1).tolist(), norms[:, heads:].amax(1).tolist()
        for index, (query, key) in enumerate(zip(queries, keys, strict=True)):
            self._key_norms[index] = max(self._key_norms[index], key)
            self._score_bounds[index] = width**0.5 * query * self._key_norms[index]

    def copy(self, sources: np.ndarray, targets: np.ndarray) -> None:
        """Copies pages `sources` (int64 [n]) to `targets`, of which none is among `sources`."""
        a, b = self._on(sources), self._on(targets)
        k = self._per_block
        self._by_page[:, :, b // k, :, b % k] = self._by_page[:, :, a // k, :, a % k]

    def clear(self, pages: np.ndarray) -> None:
        """Zeroes pages, int64 [n]."""
        ids = self._on(pages)
        self._by_page[:, :, ids // self._per_block, :, ids % self._per_block] = 0.0

    def read(self, layer: int, pages: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of sequences that have pages int64 [..., n]: two [..., G, n * page_tokens, D], copied."""
        found = self._by_page[layer][:, pages // self._per_block, :, pages % self._per_block]
        keys, values = found.movedim(-4, 0).transpose(-4, -3).flatten(-3, -2)
        return keys, values

    def writer(self, positions: np.ndarray, counts: np.ndarray, tables: np.ndarray) -> Write:
        """Where the keys and values of the tokens of a batch (see rollout.runner.Batch) go."""
        heads, size, block = self.config.num_kv_heads, self.page_tokens, self._data.shape[4]
        owners = np.arange(len(counts)) if len(counts) == len(positions) else np.repeat(np.arange(len(counts)), counts)
        pages = tables[owners, positions // size].astype(np.int64)
        places = pages * size + positions % size
        rows = (places[:, None] // block * heads + np.arange(heads)) * block + places[:, None] % block
        where = self._on(rows.reshape(-1))

        def write(layer: int, k: Tensor, v: Tensor) -> None:
            # Where one sequence has NaN, its neighbours in the block must not: what is masked is multiplied by 0.
            for flat, new in zip(self._data[layer].flatten(1, 3), (k, v), strict=True):
                flat.index_copy_(0, where, new.flatten(0, 1).nan_to_num(0.0, torch.inf, -torch.inf))

        return write

    def attend(self, positions: np.ndarray, counts: np.ndarray, tables: np.ndarray, num_decode: int) -> Attend:
        """How the tokens of a batch meet keys: their own are kept, then each reads those of its sequence up to it."""
        write = self.writer(positions, counts, tables)
        decode = (
            DecodePlan(self._data, self.page_tokens, positions[:num_decode], tables[:num_decode])
            if num_decode
            else None
        )
        if decode is not None and num_decode == len(counts):

            def attend_decode(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                write(layer, k, v)
                return decode(layer, q, self._score_bounds[layer])

            return attend_decode
        chunks = self._chunks(positions, counts, tables, num_decode)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            write(layer, k, v)
            parts = [decode(layer, q[:num_decode], self._score_bounds[layer])] if decode is not None else []
            return torch.cat([*parts, *(chunk(layer, q, k, v) for chunk in chunks)])

        return attend

    def _chunks(self, positions: np.ndarray, counts: np.ndarray, tables: np.ndarray, first: int) -> list[Attend]:
        """One for each run of sequences that begin with their chunk, and for each sequence that goes on."""
        ends = np.cumsum(counts)
        starts = ends - counts
        chunks: list[Attend] = []
        while first < len(counts):
            last = first + 1
            if positions[starts[first]] == 0:
                while last < len(counts) and positions[starts[last]] == 0:
                    last += 1
                rows = slice(int(starts[first]), int(ends[last - 1]))
                chunks.append(_Fresh(rows, counts[first:last].tolist(), self._data.device))
            else:
                pages = self._on(tables[first, : -(-int(positions[ends[first] - 1] + 1) // self.page_tokens)])
                chunks.append(
                    _Continued(self, slice(int(starts[first]), int(ends[first])), pages, int(positions[starts[first]]))
                )
            first = last
        return chunks

    def _on(self, numbers: np.ndarray) -> Tensor:
        return torch.from_numpy(numbers.astype(np.int64, copy=False)).to(self._data.device, non_blocking=True)


def pages_per_block(page_tokens: int) -> int:
    """How many neighbouring pages attention reads at once."""
    return max(1, BLOCK_TOKENS // page_tokens)


class _Fresh:
    """Sequences whose tokens are all in the batch: their keys need not be read from pages."""

    def __init__(self, rows: slice, lengths: list[int], device: torch.device) -> None:
        self._rows = rows
        self._packed = PackedAttention(lengths, device)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self._packed(layer, q[self._rows], k[self._rows], v[self._rows])


class _Continued:
    """A further chunk of one sequence, from position `start` on, over all of it so far."""

    def __init__(self, cache: PagedCache, rows: slice, pages: Tensor, start: int) -> None:
        self._cache = cache
        self._rows = rows
        self._pages = pages
        self._end = start + rows.stop - rows.start
        ends = torch.arange(start, self._end, device=pages.device)
        self._causal = torch.arange(self._end, device=pages.device) <= ends.unsqueeze(1)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = (x[:, : self._end] for x in self._cache.read(layer, self._pages))
        queries = q[self._rows].transpose(0, 1)
        out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=self._causal, enable_gqa=True)
        flat: Tensor = out.transpose(0, 1).flatten(1)
        return flat
