"""Which pages of the KV cache are in use, and by how many. Knows nothing of what is in them."""

from __future__ import annotations

import heapq

import numpy as np


class PagePool:
    """Pages 0..num_pages-1, each with a count of its users. The lowest free page is taken first, which keeps those in
    use together: attention reads them in the order of the pool."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._users = np.zeros(num_pages, np.int32)
        self._free = list(range(num_pages))

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_pages - len(self._free)

    def take(self, count: int) -> np.ndarray:
        """`count` free pages, int64 [count], each with one user now. There must be as many."""
        assert count <= len(self._free), f"{count} pages are wanted, {len(self._free)} are free"
        pages = np.array([heapq.heappop(self._free) for _ in range(count)], np.int64)
        self._users[pages] = 1
        return pages

    def share(self, pages: np.ndarray, times: int = 1) -> None:
        """Counts `times` more users of each of `pages`, which are distinct and in use."""
        assert (self._users[pages] > 0).all(), "a free page can't be shared"
        self._users[pages] += times

    def give_back(self, pages: np.ndarray) -> np.ndarray:
        """Counts one user less of each of `pages`, which are distinct. Returns those that are free now."""
        assert (self._users[pages] > 0).all(), "a free page can't be given back"
        self._users[pages] -= 1
        freed: np.ndarray = pages[self._users[pages] == 0]
        for page in freed.tolist():
            heapq.heappush(self._free, page)
        return freed

    def users(self, pages: np.ndarray) -> np.ndarray:
        """Users of each page, int32 [n]."""
        return np.asarray(self._users[pages])
