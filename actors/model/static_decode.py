"""Attention of one new token of each of many sequences where shapes and addresses are fixed: for a CUDA graph.

    pages [B, P] --gathered--> keys, values [B * G, P * page_tokens, D] --scores, masked by position--> [B, H * D]

Work follows the widest sequence of the batch, and keys are copied once: paged_decode.py, whose plans are made on the
host for each step, does neither. Nothing here waits for the device. Knows nothing of layers' weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .block import Attend
from .paged import PagedCache


def static_attend(cache: PagedCache, positions: Tensor, pages: Tensor) -> Attend:
    """How new tokens at `positions`, int64 [B], of sequences with `pages`, int64 [B, P], meet keys: their own are kept
    first. Pages beyond a position may be any: what is in them is finite, and masked. Two sequences may write to the
    same place only if nobody reads what is there."""
    by_page, size = cache.by_page, cache.page_tokens
    per_block, (num, width) = by_page.shape[4], pages.shape
    own = pages.gather(1, (positions // size).unsqueeze(1)).squeeze(1)
    heads = torch.arange(by_page.shape[3], device=pages.device).view(1, -1, 1)
    blocks, places = (pages // per_block).unsqueeze(1), (pages % per_block).unsqueeze(1)
    future = torch.arange(width * size, device=pages.device) > positions.unsqueeze(1)
    future = future.repeat_interleave(by_page.shape[3], 0, output_size=num * by_page.shape[3]).unsqueeze(1)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        read = []
        for pool, new in zip(by_page[layer], (k, v), strict=True):
            # Where one sequence has NaN, others must not: what is masked is multiplied by 0.
            pool[own // per_block, :, own % per_block, positions % size] = new.to(pool.dtype).nan_to_num(
                0.0, torch.inf, -torch.inf
            )
            read.append(pool[blocks, heads, places].flatten(2, 3).flatten(0, 1))
        keys, values = read
        queries = q.to(keys.dtype).reshape(len(keys), -1, q.shape[2])
        scores = torch.bmm(queries, keys.transpose(1, 2)).float() * q.shape[2] ** -0.5
        shares = torch.softmax(scores.masked_fill_(future, -torch.inf), -1)
        return torch.bmm(shares.to(values.dtype), values).view(num, -1).to(v.dtype)

    return attend
