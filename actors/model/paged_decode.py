"""Attention of one new token of each of many sequences over pages, in the order of the pool: no key is copied.

    queries [S, H, D] --gathered to pages--> scores in each page --> partial sums --added up by owner--> [S, H * D]

A page that several sequences share is met by all their queries at once. A softmax is exp(score) / sum of exp(score):
where scores are known to be small (see PagedCache.expect) nothing is subtracted from them first, else the largest of
each query is. Work follows the tokens that there are, not the longest sequence. Knows nothing of layers' weights.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

SAFE_SCORE = 60.0
"""exp of it, summed over a million tokens, is far from the largest fp32 number, and exp of its negative from the
smallest normal one."""

DENSE_SHARE = 0.7
"""Pages are read where they lie if at least this share of the pool, up to the last that is used, has one reader."""

FEW_PAGES = 256
"""Up to so many reads of pages those that are shared are copied for each reader: an operation costs more than they."""

CLASS_RATIO = 4
"""Shared pages are read together if the one with the most readers has at most this many times those of the least."""


class DecodePlan:
    """For positions int64 [S] of the new tokens and tables [S, P], over the pool `data`."""

    def __init__(self, data: Tensor, positions: np.ndarray, tables: np.ndarray) -> None:
        self._data = data
        num, size = len(positions), data.shape[4]
        self._num = num
        held = positions // size + 1
        pages = tables[np.arange(tables.shape[1]) < held[:, None]].astype(np.int64)
        owners = np.repeat(np.arange(num), held)
        filled = np.full(len(pages), size)
        filled[np.cumsum(held) - 1] = positions % size + 1
        readers = np.bincount(pages)
        alone = readers[pages] == 1
        if len(pages) <= FEW_PAGES or alone.all():
            self._parts: list[_Alone | _Shared] = [_Alone(data, pages, owners, filled, num, in_place=bool(alone.all()))]
        else:
            self._parts = [
                _Alone(data, pages[alone], owners[alone], filled[alone], num, in_place=True),
                *_shared(data, pages[~alone], owners[~alone], readers, num),
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


class _Alone:
    """Pages with one reader each. Read in place, if they may be and lie close together: some are read in vain then."""

    def __init__(
        self, data: Tensor, pages: np.ndarray, owners: np.ndarray, filled: np.ndarray, num: int, *, in_place: bool
    ) -> None:
        self._data, self._gathered = data, None
        size, end = data.shape[4], int(pages.max()) + 1
        if in_place and len(pages) >= DENSE_SHARE * end and data.device.type == "cpu":
            of_page, in_page = np.full(end, num), np.zeros(end, np.int64)
            of_page[pages], in_page[pages] = owners, filled
            self._end = end
        else:
            of_page, in_page = owners, filled
            self._gathered = torch.from_numpy(pages).to(data.device)
        # For pages in vain, the query of nobody: its sums are added up beside those of the others, and forgotten.
        bias = np.where(np.arange(size) < in_page[:, None], np.float32(0), np.float32(-np.inf))
        bias[of_page == num] = 0
        self.owners = torch.from_numpy(of_page).to(data.device)
        self._queries = torch.from_numpy(np.minimum(of_page, num - 1)).to(data.device)
        self._bias = torch.from_numpy(np.repeat(bias, data.shape[3], 0)[:, None]).to(data.device)

    def _read(self, layer: int, which: int) -> Tensor:
        pool = self._data[layer, which]
        return (pool[: self._end] if self._gathered is None else pool.index_select(0, self._gathered)).flatten(0, 1)

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
    """Full pages that each have up to M readers."""

    def __init__(self, data: Tensor, pages: np.ndarray, readers_UM: np.ndarray, num: int) -> None:
        self._data = data
        self._pages = torch.from_numpy(pages).to(data.device)
        self._shape = readers_UM.shape
        self.owners = torch.from_numpy(readers_UM.reshape(-1)).to(data.device)
        self._queries = torch.from_numpy(np.minimum(readers_UM.reshape(-1), num - 1)).to(data.device)

    def _read(self, layer: int, which: int) -> Tensor:
        return self._data[layer, which].index_select(0, self._pages).flatten(0, 1)

    def scores(self, layer: int, q: Tensor) -> Tensor:
        """[U * G, M * H / G, page]"""
        (pages, most), (_, heads, width), groups = self._shape, q.shape, self._data.shape[3]
        queries = q.index_select(0, self._queries).view(pages, most, groups, heads // groups, width).transpose(1, 2)
        queries = queries.reshape(pages * groups, -1, width) * width**-0.5
        return torch.bmm(queries, self._read(layer, 0).transpose(1, 2))

    def by_query(self, scores: Tensor) -> Tensor:
        return self._back(scores).flatten(2, 3).flatten(0, 1)

    def subtract(self, scores: Tensor, largest: Tensor) -> None:
        (pages, most), groups = self._shape, self._data.shape[3]
        by_group = largest.view(pages, most, groups, -1).transpose(1, 2)
        scores.sub_(by_group.reshape(pages * groups, -1, 1))

    def values(self, layer: int, weights: Tensor) -> Tensor:
        return self._back(torch.bmm(weights, self._read(layer, 1))).flatten(2).flatten(0, 1)

    def _back(self, x: Tensor) -> Tensor:
        """[U * G, M * R, n] -> [U, M, G, R, n]"""
        (pages, most), groups = self._shape, self._data.shape[3]
        return x.view(pages, groups, most, -1, x.shape[-1]).transpose(1, 2)


def _shared(data: Tensor, pages: np.ndarray, owners: np.ndarray, readers: np.ndarray, num: int) -> list[_Shared]:
    order = np.argsort(pages, kind="stable")
    pages, owners = pages[order], owners[order]
    each = readers[pages]
    parts = []
    while len(pages):
        most = int(each.max())
        mine = each * CLASS_RATIO > most
        unique, first, counts = np.unique(pages[mine], return_index=True, return_counts=True)
        of_page = np.full((len(unique), most), num)
        column = np.arange(mine.sum()) - np.repeat(first, counts)
        of_page[np.repeat(np.arange(len(unique)), counts), column] = owners[mine]
        parts.append(_Shared(data, unique, of_page, num))
        pages, owners, each = pages[~mine], owners[~mine], each[~mine]
    return parts
