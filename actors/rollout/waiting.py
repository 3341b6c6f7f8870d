"""Sequences that wait for slots: a prompt, or a prompt and what a member has written. Knows nothing of queues."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from .requests import Request

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(slots=True, eq=False)
class Waiting:
    """A sequence and the members that go on after it: it is computed once for all of them."""

    request: Request
    indices: list[int]
    """Of the members, into the lists of `request`."""
    tokens: np.ndarray
    """int32 [n]: the prompt and, if they have one, their prefix"""
    num_admitted: int = 0
    pages: np.ndarray | None = None
    """int64 [n]: those of all tokens, from the moment the first is computed"""
    num_cached: int = 0
    """Tokens whose keys and values are in the pages"""
    logits: Tensor | None = None
    """[V], after the last token"""
    routes: list[np.ndarray] = field(default_factory=list)
    """[rows, L, K]: the experts of the cached tokens, if the engine keeps them"""
    uniforms: np.ndarray | None = None
    """float64 [members, max_new_tokens], from the moment there are logits"""

    @property
    def num_members(self) -> int:
        """Members without a slot."""
        return len(self.indices) - self.num_admitted

    @property
    def num_left(self) -> int:
        """Tokens that are to be computed."""
        return len(self.tokens) - self.num_cached

    def forget(self) -> np.ndarray:
        """Unlearns what was computed. Returns the pages that it held."""
        pages = np.zeros(0, np.int64) if self.pages is None else self.pages
        self.pages, self.num_cached, self.logits, self.routes = None, 0, None, []
        return pages


def sequences(request: Request) -> list[Waiting]:
    """One for all members that have written nothing, then one for each of the others."""
    prompt, prefixes = request.prompt, request.prefixes or [request.prompt[:0]] * len(request.members)
    fresh = [index for index, prefix in enumerate(prefixes) if len(prefix) == 0]
    return ([Waiting(request, fresh, prompt)] if fresh else []) + [
        Waiting(request, [index], np.concatenate([prompt, prefix]))
        for index, prefix in enumerate(prefixes)
        if len(prefix)
    ]
