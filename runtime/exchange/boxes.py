"""Boxes: what of an array is meant, a half-open range per dimension. Many at once are two arrays [n, dimensions].

Knows nothing of names, ranks and memory.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Box(NamedTuple):
    """`array[box.slices]`"""

    start: tuple[int, ...]
    stop: tuple[int, ...]

    @property
    def slices(self) -> tuple[slice, ...]:
        return tuple(map(slice, self.start, self.stop))

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(stop - start for start, stop in zip(self.start, self.stop, strict=True))


def volume(start: np.ndarray, stop: np.ndarray) -> np.ndarray:
    """Elements of each box [..., dimensions]; zero if any side is empty."""
    elements: np.ndarray = np.maximum(stop - start, 0).prod(-1)
    return elements


def overlaps(
    start: np.ndarray, stop: np.ndarray, other_start: np.ndarray, other_stop: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Which of the boxes [n, D] meet which of the others [m, D]: two columns of row numbers, ordered."""
    meet = np.ones((len(start), len(other_start)), bool)
    for d in range(start.shape[1]):
        meet &= np.maximum(start[:, None, d], other_start[:, d]) < np.minimum(stop[:, None, d], other_stop[:, d])
    rows, others = np.nonzero(meet)
    return rows, others


def cut(shape: np.ndarray, limit: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cuts boxes of `shape` [n, D] into pieces of at most `limit` [n] elements (>= 1), across the outermost dimension
    that does it: (row of each piece, start, stop), relative to its box, in the order of memory.
    """
    row, start, stop = np.arange(len(shape)), np.zeros_like(shape), shape.copy()
    for d in range(shape.shape[1]):
        inner = (stop - start)[:, d + 1 :].prod(1)
        step = np.minimum(np.maximum(limit[row] // np.maximum(inner, 1), 1), stop[:, d])
        num = -(-stop[:, d] // step)
        index = np.arange(num.sum()) - np.repeat(np.cumsum(num) - num, num)
        row, start, stop, step = (np.repeat(column, num, axis=0) for column in (row, start, stop, step))
        start[:, d] = index * step
        stop[:, d] = np.minimum(start[:, d] + step, stop[:, d])
    return row, start, stop
