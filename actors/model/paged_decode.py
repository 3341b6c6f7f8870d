"""Attention of one new token of each of many sequences over pages, in the order of the pool: no key is copied.

    queries [S, H, D] --gathered to blocks--> scores in each block --> partial sums --added up by owner--> [S, H * D]

Pages are read in blocks of a few; where in a block a key stands does not matter, a mask says whose it is. A block that
several sequences read is met by all their queries at once. A softmax is exp(score) / sum of exp(score): where scores
are known to be small (see PagedCache.expect) nothing is subtracted from them first, else the largest of each query is.
Work follows the tokens that there are, not the longest sequence. Knows nothing of layers' weights.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

SAFE_SCORE = 60.0
"""exp of it, summed over a million tokens, is far from the largest fp32 number, and exp of its negative from the
smallest normal one."""

DENSE_SHARE = 0.7
"""Blocks are read where they lie if at least this share of the pool, up to the last that is used, has one reader."""

FEW_BLOCKS = 256
"""Up to so many reads of blocks those that are shared are copied for each reader: an operation costs more than they."""

CLASS_RATIO = 4
"""Shared blocks are read together if the one with the most readers has at most this many times those of the least."""


class DecodePlan:
    """For positions int64 [S] of the new tokens and tables [S, P] of pages of `size` tokens, over the pool `data`,
    [layers, (k, v), blocks, G, tokens of a block, D]."""

    def __init__(self, data: Tensor, size: int, positions: np.ndarray, tables: np.ndarray) -> None:
        self._num = num = len(positions)
        blocks, owners, begins, ends = _runs(positions, tables, size, data.shape[4] // size)
        column = np.arange(data.shape[4])
        seen = (column >= begins[:, None]) & (column < ends[:, None])
        bias = np.where(seen, np.float32(0), np.float32(-np.inf))
        readers = np.bincount(blocks)
        alone = readers[blocks] == 1
        if alone.all():
            self._parts: list[_Alone | _Shared] = [_in_place(data, blocks, owners, bias, num)]
        elif len(blocks) <= FEW_BLOCKS:
            self._parts = [_Alone(data, blocks, owners, bias, num)]
        else:
            self._parts = [
                _in_place(data, blocks[alone], owners[alone], bias[alone], num),
                *_shared(data, blocks[~alone], owners[~alone], bias[~alone], num),
            ]

    def __call__(self, layer: int, q: Tensor, score_bound: float) -> Tensor:
        """q [S, H, D], of which no score is larger than `score_bound` in magnitude -> [S, H * D]."""
        _, heads, width = q.shape
        scores = [part.scores(layer, q) for part in self._parts]
        if score_bound > SAFE_SCORE:
            largest = q.new_full((self._num + 1, heads), -torch.inf)
            for part, its in zip(self._parts, scores, strict=True):
                where = part.owners.unsqueeze(1).expand(-1, heads)
                largest.scatter_reduce_(0, where, part.by_query(its).amax(-1), "amax")
            for part, its in zip(self._parts, scores, strict=True):
                part.subtract(its, largest.index_select(0, part.owners))
        out = q.new_zeros(self._num + 1, heads * width)
        total = q.new_zeros(self._num + 1, heads)
        for part, its in zip(self._parts, scores, strict=True):
            its.exp_()
            out.index_add_(0, part.owners, part.values(layer, its))
            total.index_add_(0, part.owners, part.by_query(its).sum(-1))
        return (out.view(-1, heads, width) / total.unsqueeze(-1))[: self._num].flatten(1)


def _runs(
    positions: np.ndarray, tables: np.ndarray, size: int, per_block: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Neighbouring pages that one sequence reads in one block: the block, who reads, from which token of it to which.

    int64 [N] each.
    """
    num, held = len(positions), positions // size + 1
    pages = tables[np.arange(tables.shape[1]) < held[:, None]].astype(np.int64)
    lasts = np.cumsum(held)
    first = np.empty(len(pages), bool)
    first[1:] = pages[1:] != pages[:-1] + 1
    first |= pages % per_block == 0
    first[lasts - held] = True
    starts = np.flatnonzero(first)
    begins = pages[starts] % per_block * size
    ends = begins + np.diff(starts, append=len(pages)) * size
    run = np.searchsorted(starts, lasts - 1, side="right")
    ends[run - 1] -= size - 1 - positions % size
    return pages[starts] // per_block, np.repeat(np.arange(num), np.diff(run, prepend=0)), begins, ends


def _in_place(data: Tensor, blocks: np.ndarray, owners: np.ndarray, bias: np.ndarray, num: int) -> _Alone:
    """Blocks that differ: all of the pool up to the last, if most of them are among them."""
    end = int(blocks.max()) + 1
    if len(blocks) < DENSE_SHARE * end or data.device.type != "cpu":
        return _Alone(data, blocks, owners, bias, num)
    of_block, biases = np.full(end, num), np.zeros((end, bias.shape[1]), np.float32)
    of_block[blocks], biases[blocks] = owners, bias
    return _Alone(data, None, of_block, biases, num)


class _Alone:
    """Blocks with one reader each; `blocks` None reads the pool in place. Those in vain have the reader `num`, whose
    sums are added up beside those of the others, and forgotten."""

    def __init__(self, data: Tensor, blocks: np.ndarray | None, owners: np.ndarray, bias: np.ndarray, num: int) -> None:
        self._data = data
        self._blocks = None if blocks is None else torch.from_numpy(blocks).to(data.device)
        self.owners = torch.from_numpy(owners).to(data.device)
        self._queries = torch.from_numpy(np.minimum(owners, num - 1)).to(data.device)
        self._bias = torch.from_numpy(np.repeat(bias, data.shape[3], 0)[:, None]).to(data.device)

    def _read(self, layer: int, which: int) -> Tensor:
        pool = self._data[layer, which]
        return (pool[: len(self.owners)] if self._blocks is None else pool.index_select(0, self._blocks)).flatten(0, 1)

    def scores(self, layer: int, q: Tensor) -> Tensor:
        keys = self._read(layer, 0)
        queries = q.index_select(0, self._queries).view(len(keys), -1, q.shape[2])
        return torch.baddbmm(self._bias, queries, keys.transpose(1, 2), alpha=q.shape[2] ** -0.5)

    def by_query(self, scores: Tensor) -> Tensor:
        return scores.view(len(self.owners), -1, scores.shape[-1])

    def subtract(self, scores: Tensor, largest: Tensor) -> None:
        scores.view(len(self.owners), -1, scores.shape[-1]).sub_(largest.unsqueeze(-1))

    def values(self, layer: int, weights: Tensor) -> Tensor:
        return torch.bmm(weights, self._read(layer, 1)).view(len(self.owners), -1)


class _Shared:
    """U blocks that each have up to M readers."""

    def __init__(self, data: Tensor, blocks: np.ndarray, readers_UM: np.ndarray, bias_UM: np.ndarray, num: int) -> None:
        self._data = data
        self._blocks = torch.from_numpy(blocks).to(data.device)
        self._shape = readers_UM.shape
        self.owners = torch.from_numpy(readers_UM.reshape(-1)).to(data.device)
        self._queries = torch.from_numpy(np.minimum(readers_UM.reshape(-1), num - 1)).to(data.device)
        self._bias = torch.from_numpy(bias_UM).to(data.device)
        """[U, M, tokens]"""

    def _read(self, layer: int, which: int) -> Tensor:
        return self._data[layer, which].index_select(0, self._blocks).flatten(0, 1)

    def scores(self, layer: int, q: Tensor) -> Tensor:
        """[U * G, M * H / G, tokens]"""
        (blocks, most), (_, heads, width), groups = self._shape, q.shape, self._data.shape[3]
        queries = q.index_select(0, self._queries).view(blocks, most, groups, heads // groups, width).transpose(1, 2)
        queries = queries.reshape(blocks * groups, -1, width) * width**-0.5
        scores = torch.bmm(queries, self._read(layer, 0).transpose(1, 2))
        scores.view(blocks, groups, most, heads // groups, -1).add_(self._bias[:, None, :, None])
        return scores

    def by_query(self, scores: Tensor) -> Tensor:
        return self._back(scores).flatten(2, 3).flatten(0, 1)

    def subtract(self, scores: Tensor, largest: Tensor) -> None:
        (blocks, most), groups = self._shape, self._data.shape[3]
        by_group = largest.view(blocks, most, groups, -1).transpose(1, 2)
        scores.sub_(by_group.reshape(blocks * groups, -1, 1))

    def values(self, layer: int, weights: Tensor) -> Tensor:
        return self._back(torch.bmm(weights, self._read(layer, 1))).flatten(2).flatten(0, 1)

    def _back(self, x: Tensor) -> Tensor:
        """[U * G, M * R, n] -> [U, M, G, R, n]"""
        (blocks, most), groups = self._shape, self._data.shape[3]
        return x.view(blocks, groups, most, -1, x.shape[-1]).transpose(1, 2)


def _shared(data: Tensor, blocks: np.ndarray, owners: np.ndarray, bias: np.ndarray, num: int) -> list[_Shared]:
    """Each block as often as it has readers."""
    order = np.argsort(blocks, kind="stable")
    blocks, owners, bias = blocks[order], owners[order], bias[order]
    each = np.bincount(blocks)[blocks]
    parts = []
    while len(blocks):
        most = int(each.max())
        mine = each * CLASS_RATIO > most
        unique, first, counts = np.unique(blocks[mine], return_index=True, return_counts=True)
        row, column = np.repeat(np.arange(len(unique)), counts), np.arange(mine.sum()) - np.repeat(first, counts)
        readers = np.full((len(unique), most), num)
        readers[row, column] = owners[mine]
        masks = np.zeros((len(unique), most, bias.shape[1]), np.float32)
        masks[row, column] = bias[mine]
        parts.append(_Shared(data, unique, readers, masks, num))
        blocks, owners, bias, each = blocks[~mine], owners[~mine], bias[~mine], each[~mine]
    return parts
