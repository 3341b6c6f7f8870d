"""Counter-based random numbers: the same number whenever, wherever and in whatever order it is asked for.

Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011, section 3.3),
vectorised in numpy. The key is (seed, stream), the counter (block, lane, ordinal), so nothing has state that a
crash could lose. Knows nothing of what the numbers are used for, but lists the streams so that no two uses share one.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np

_MULTIPLIER = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)
_ROUNDS = 10


class Stream(IntEnum):
    """Uses of random numbers under one seed."""

    PROBLEM = 1
    DEMONSTRATION = 2
    SIZE = 3
    ADAPTATION = 4
    SAMPLING = 5
    PUZZLE = 6


def uniforms(seed: int, stream: int, ordinals: int | np.ndarray, lanes: int | np.ndarray, count: int) -> np.ndarray:
    """Numbers strictly inside (0, 1), float64 [..., count], for each pair of `ordinals` and `lanes` (broadcast).

    `seed` and `lanes` count modulo 2**32, `ordinals` modulo 2**64 (negative ones are fine).
    """
    ordinal = np.asarray(ordinals, np.int64)[..., None].astype(np.uint64)
    lane = np.asarray(lanes, np.int64)[..., None].astype(np.uint64) & _LOW
    block = np.arange(-(-count // 4), dtype=np.uint64)
    words = philox4x32((block, lane, ordinal & _LOW, ordinal >> _SHIFT), (seed & 0xFFFFFFFF, stream))
    drawn = np.stack(words, axis=-1).reshape(*words[0].shape[:-1], -1)[..., :count]
    return (drawn.astype(np.float64) + 0.5) * 2.0**-32


def philox4x32(counter: tuple[np.ndarray, ...], key: tuple[int, int]) -> tuple[np.ndarray, ...]:
    """Four words of 32 bits for each counter of four words; all are uint64 arrays that hold 32-bit values."""
    c0, c1, c2, c3 = np.broadcast_arrays(*counter)
    k0, k1 = key
    for _ in range(_ROUNDS):
        product0, product1 = _MULTIPLIER[0] * c0, _MULTIPLIER[1] * c2
        c0, c1 = (product1 >> _SHIFT) ^ c1 ^ np.uint64(k0), product1 & _LOW
        c2, c3 = (product0 >> _SHIFT) ^ c3 ^ np.uint64(k1), product0 & _LOW
        k0, k1 = (k0 + _WEYL[0]) & 0xFFFFFFFF, (k1 + _WEYL[1]) & 0xFFFFFFFF
    return c0, c1, c2, c3
