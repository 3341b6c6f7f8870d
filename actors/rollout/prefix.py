"""Pages of prompts that were computed under the present weights, for whoever begins with the same tokens.

    tokens --a chain of hashes, one for each full page--> pages

Cleared whenever weights change, so that keys and values of an older version are never served. Knows nothing of models.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from hashlib import blake2b

import numpy as np

from .pages import PagePool


class PrefixCache:
    """Is a user of its pages, and gives the longest unused ones back when the pool runs out."""

    def __init__(self, pool: PagePool, page_tokens: int) -> None:
        self._pool = pool
        self._page_tokens = page_tokens
        self._pages: OrderedDict[bytes, tuple[int, np.ndarray | None]] = OrderedDict()
        """Hash -> page and the routes of its tokens; the longest unused first"""

    def __len__(self) -> int:
        return len(self._pages)

    def match(self, tokens: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
        """The pages (int64 [n], of which the caller is a user now) of the longest known beginning of `tokens`, which
        leaves at least the last token to compute; and the routes of their tokens, if they were kept."""
        pages, routes = [], []
        for name in self._names(tokens[:-1]):
            if name not in self._pages:
                break
            self._pages.move_to_end(name)
            page, its_routes = self._pages[name]
            pages.append(page)
            if its_routes is not None:
                routes.append(its_routes)
        found = np.array(pages, np.int64)
        self._pool.share(found)
        return found, routes

    def add(self, tokens: np.ndarray, pages: np.ndarray, routes: np.ndarray | None) -> None:
        """Keeps the full pages of `tokens`; `routes` [len(tokens), L, K] or None."""
        size = self._page_tokens
        for i, name in enumerate(self._names(tokens)):
            if name not in self._pages:
                its_routes = None if routes is None else routes[i * size : (i + 1) * size]
                self._pages[name] = int(pages[i]), its_routes
                self._pool.share(pages[i : i + 1])

    def evict(self, count: int) -> None:
        """Gives pages back until `count` have become free, or none is left that is not in use elsewhere."""
        for name, (page, _) in list(self._pages.items()):
            if count <= 0:
                return
            if self._pool.users(np.array([page]))[0] == 1:
                del self._pages[name]
                count -= len(self._pool.give_back(np.array([page])))

    def num_evictable(self) -> int:
        """Pages that nobody else uses."""
        pages = np.array([page for page, _ in self._pages.values()], np.int64)
        return int((self._pool.users(pages) == 1).sum())

    def clear(self) -> np.ndarray:
        """Forgets all. Returns the pages that are free now, int64 [n]."""
        pages = np.array([page for page, _ in self._pages.values()], np.int64)
        self._pages.clear()
        return self._pool.give_back(pages)

    def _names(self, tokens: np.ndarray) -> Iterator[bytes]:
        name, size = b"", self._page_tokens
        for end in range(size, len(tokens) + 1, size):
            name = blake2b(name + tokens[end - size : end].astype("<i4").tobytes(), digest_size=16).digest()
            yield name
