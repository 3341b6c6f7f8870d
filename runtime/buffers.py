"""Memory for large messages that arrive in pieces: reused warm, since fresh pages cost more than the bytes.

    take(size) -> a writable view -> filled -> views of it, as long as anybody holds one -> back in the pool

A block comes back by itself when the last view of it is gone. Knows nothing of messages.
"""

from __future__ import annotations

import mmap
import weakref
from collections import deque
from contextlib import suppress

import numpy as np

GRAIN_BYTES = 1 << 20
"""Blocks have a multiple of it, so that one fits the next message of about the same size."""

MAX_IDLE_BYTES = 128 << 20
"""Kept for later; beyond, what was kept longest is given back to the system."""


class BufferPool:
    """The memory of one node for what arrives in pieces."""

    def __init__(self) -> None:
        self._idle: deque[mmap.mmap] = deque()

    @property
    def idle_bytes(self) -> int:
        return sum(map(len, list(self._idle)))

    def take(self, size: int) -> memoryview:
        """A view of `size` bytes that nobody else has; what they hold is arbitrary."""
        block = self._fitting(size) or mmap.mmap(-1, -(-max(size, 1) // GRAIN_BYTES) * GRAIN_BYTES)
        # Every view of this array, and every view of such a view, keeps it alive.
        holder = np.frombuffer(block, np.uint8, size)
        weakref.finalize(holder, self._put_back, block).atexit = False
        return holder.data

    def _fitting(self, size: int) -> mmap.mmap | None:
        """A block that is large enough, but not more than twice: the rest would be wasted."""
        for block in list(self._idle):
            if size <= len(block) <= 2 * size + GRAIN_BYTES:
                try:
                    self._idle.remove(block)
                except ValueError:
                    continue  # Given back to the system meanwhile.
                return block
        return None

    def _put_back(self, block: mmap.mmap) -> None:
        # The last view may be dropped on any thread: each step here is one that a deque does at once.
        self._idle.append(block)
        while self.idle_bytes > MAX_IDLE_BYTES:
            with suppress(IndexError):
                self._idle.popleft()
