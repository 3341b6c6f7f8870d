"""Which parts of a range of bytes are in use: first fit by address; neighbours that are free become one.

    | block 3 pages | free 1 | block 5 | free ... |      allocate(1 page) takes the lowest part that is large enough

Low addresses are used again first, so what was touched last is touched next, while it is in the cache. Knows nothing of
memory: these are numbers.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort

PAGE_BYTES = 4096
"""Blocks begin and end at multiples of it."""


class Blocks:
    """An allocator over [0, size), empty until it grows."""

    def __init__(self) -> None:
        self.size = 0
        self.used = 0
        """Bytes in blocks."""
        self._free: list[tuple[int, int]] = []
        """(start, bytes), sorted; no two touch."""
        self._starts: list[int] = []
        """Of the blocks, sorted."""
        self._bytes: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._starts)

    @property
    def tail(self) -> int:
        """Free bytes at the end: what a block that needs room for itself may count on as it grows."""
        return self._free[-1][1] if self._free and sum(self._free[-1]) == self.size else 0

    def grow(self, nbytes: int) -> None:
        """Adds `nbytes` (whole pages) at the end."""
        self._give(self.size, nbytes)
        self.size += nbytes

    def allocate(self, nbytes: int) -> int | None:
        """The start of a new block of at least `nbytes`; None if no free part is large enough."""
        needed = max(1, -(-nbytes // PAGE_BYTES)) * PAGE_BYTES
        for index, (start, free) in enumerate(self._free):
            if free >= needed:
                if free == needed:
                    del self._free[index]
                else:
                    self._free[index] = start + needed, free - needed
                insort(self._starts, start)
                self._bytes[start] = needed
                self.used += needed
                return start
        return None

    def free(self, start: int) -> None:
        """Gives back the block that begins at `start`."""
        nbytes = self._bytes.pop(start)
        del self._starts[bisect_left(self._starts, start)]
        self.used -= nbytes
        self._give(start, nbytes)

    def holding(self, offset: int, nbytes: int) -> int | None:
        """The start of the block that holds all of [offset, offset + nbytes), or None."""
        index = bisect_right(self._starts, offset) - 1
        if index < 0:
            return None
        start = self._starts[index]
        return start if offset + nbytes <= start + self._bytes[start] else None

    def _give(self, start: int, nbytes: int) -> None:
        index = bisect_left(self._free, (start, 0))
        if index < len(self._free) and self._free[index][0] == start + nbytes:
            nbytes += self._free.pop(index)[1]
        if index and sum(self._free[index - 1]) == start:
            index -= 1
            start, before = self._free.pop(index)
            nbytes += before
        self._free.insert(index, (start, nbytes))
