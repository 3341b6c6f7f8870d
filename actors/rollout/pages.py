"""Which pages of the KV cache are in use, and by how many. Knows nothing of what is in them.

    | page page page page | page page page page | ...       pages are taken and counted one by one,
    '------- block -------'                                 attention reads whole blocks

A sequence whose pages fill blocks of their own costs least to read. So the page after its last is taken first, then one
of a block that nobody uses, the lowest: and only when there is none, a page beside somebody else's.
"""

from __future__ import annotations

import heapq

import numpy as np


class PagePool:
    """Pages 0..num_pages-1, each with a count of its users, in blocks of `pages_per_block`."""

    def __init__(self, num_pages: int, pages_per_block: int = 1) -> None:
        self.num_pages = num_pages
        self.num_free = num_pages
        self._per_block = pages_per_block
        self._users = np.zeros(num_pages, np.int32)
        self._used_in = np.zeros(-(-num_pages // pages_per_block), np.int32)
        """Pages in use, of each block"""
        self._empty = list(range(len(self._used_in)))
        """A heap of blocks that have been empty; some may not be any more"""

    @property
    def num_used(self) -> int:
        return self.num_pages - self.num_free

    def take(self, count: int, after: int = -1) -> np.ndarray:
        """`count` free pages, int64 [count], each with one user now: a run that goes on after page `after`.

        There must be as many.
        """
        assert count <= self.num_free, f"{count} pages are wanted, {self.num_free} are free"
        taken = []
        for _ in range(count):
            after = self._next(after)
            self._users[after] = 1
            self._used_in[after // self._per_block] += 1
            taken.append(after)
        self.num_free -= count
        return np.array(taken, np.int64)

    def take_each(self, after: np.ndarray) -> np.ndarray:
        """One free page after each of `after`, int64 [n], as `take`."""
        taken = after + 1
        inside = (taken % self._per_block > 0) & (taken < self.num_pages)
        goes_on = inside & (self._users[np.where(inside, taken, 0)] == 0)
        # Members of a group whose prompt fills its last page come from the same one: the first gets the next.
        first = np.zeros(len(taken), bool)
        first[np.unique(taken, return_index=True)[1]] = True
        goes_on &= first
        pages = taken[goes_on]
        self._users[pages] = 1
        np.add.at(self._used_in, pages // self._per_block, 1)
        self.num_free -= len(pages)
        for index in np.flatnonzero(~goes_on).tolist():
            taken[index] = self.take(1)[0]
        return taken

    def _next(self, after: int) -> int:
        following = after + 1
        if following % self._per_block and following < self.num_pages and not self._users[following]:
            return following
        while self._empty:
            block = heapq.heappop(self._empty)
            if not self._used_in[block]:
                return block * self._per_block
        return int((self._users == 0).argmax())

    def share(self, pages: np.ndarray, times: int = 1) -> None:
        """Counts `times` more users of each of `pages`, which are distinct and in use."""
        assert (self._users[pages] > 0).all(), "a free page can't be shared"
        self._users[pages] += times

    def give_back(self, pages: np.ndarray) -> np.ndarray:
        """Counts one user less of each of `pages`, int64 [n], as often as it is there. Returns what is free now."""
        np.subtract.at(self._users, pages, 1)
        left = self._users[pages]
        assert (left >= 0).all(), "a free page can't be given back"
        freed: np.ndarray = np.unique(pages[left == 0])
        self.num_free += len(freed)
        blocks = freed // self._per_block
        np.subtract.at(self._used_in, blocks, 1)
        for block in np.unique(blocks[self._used_in[blocks] == 0]).tolist():
            heapq.heappush(self._empty, block)
        return freed

    def users(self, pages: np.ndarray) -> np.ndarray:
        """Users of each page, int32 [n]."""
        return np.asarray(self._users[pages])
