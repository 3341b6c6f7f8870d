"""Lays out a forward pass: what lives, token by token, then what waits, in chunks. Knows nothing of models."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .runner import Batch
from .slots import Slots
from .waiting import Waiting


def lay_out(slots: Slots, live: int, chunks: Sequence[tuple[Waiting, int]]) -> Batch:
    """One pass over the newest tokens of the first `live` responses, all or none, and so many tokens of each chunk."""
    if not chunks:
        tokens, positions = slots.feed()
        return Batch(tokens, positions, np.ones(live, np.int64), slots.tables(), live, np.arange(live))
    fed = slots.feed() if live else (np.zeros(0, np.int64), np.zeros(0, np.int64))
    own = slots.tables() if live else np.zeros((0, 0), np.int32)
    width = max([own.shape[1], *(len(w.pages) for w, _ in chunks if w.pages is not None)])
    tables = np.zeros((live + len(chunks), width), np.int32)
    tables[:live, : own.shape[1]] = own
    for row, (waiting, _) in zip(tables[live:], chunks, strict=True):
        assert waiting.pages is not None
        row[: len(waiting.pages)] = waiting.pages
    ranges = [(w, w.num_cached, w.num_cached + count) for w, count in chunks]
    ends = [live + i for i, (w, _, end) in enumerate(ranges) if end == len(w.tokens)]
    return Batch(
        tokens=np.concatenate([fed[0], *(w.tokens[begin:end] for w, begin, end in ranges)], dtype=np.int64),
        positions=np.concatenate([fed[1], *(np.arange(begin, end) for _, begin, end in ranges)]),
        counts=np.array([1] * live + [count for _, count in chunks]),
        tables=tables,
        num_decode=live,
        wanted=np.array([*range(live), *ends], np.int64),
    )
