"""The runner of an engine whose model is on several ranks: the first tells the others what it does, and all do it.

    Engine -> RanksRunner.run(batch) --order--> follow(): the same batch at the others       logits end at the first

Between two steps it may move experts to where the load is (balance.py). Knows nothing of actors.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ....kernels.placement import Placement
from ...model.config import ModelConfig
from ..runner import Batch, Forward
from .balance import Balance
from .link import Link
from .part import Part, as_arrays, first_placements, from_arrays
from .rank import SPLIT_TOKENS, Rank, RankWeights, prepare

MOST_TAKEN = 3
"""Versions that a rank has prepared and not loaded: one is prepared while one before it waits for its turn."""


class RanksRunner:
    """See runner.Runner. `prepare` takes a Part, made by `cut` or received; the other ranks have prepared theirs, of
    the same ticket, when it is loaded."""

    mixes = True

    def __init__(
        self,
        link: Link,
        config: ModelConfig,
        *,
        num_pages: int,
        page_tokens: int,
        routes: bool = False,
        split_tokens: int = SPLIT_TOKENS,
        balance: Balance | None = None,
    ) -> None:
        self.config = config
        self.num_pages = num_pages
        self.page_tokens = page_tokens
        self._routes = (np.uint8 if config.num_experts < 256 else np.uint16) if routes else None
        self._link = link
        self._orders = link.orders
        self._balance = balance
        self._orders.give("open", num_pages, page_tokens, split_tokens)
        self._rank = Rank(link, config, num_pages=num_pages, page_tokens=page_tokens, split_tokens=split_tokens)

    @property
    def placements(self) -> Sequence[Placement]:
        """Of the experts, by layer: what parts of the next weights are to be cut by."""
        return self._rank.placements or first_placements(self._link.place.mesh, self.config)

    def prepare(self, tensors: Mapping[str, np.ndarray]) -> RankWeights:
        assert isinstance(tensors, Part), "a rank takes its part of the weights"
        return prepare(self._link, self.config, tensors)

    def load(self, weights: RankWeights) -> None:
        self._orders.give("load", weights.ticket)
        self._rank.load(weights)
        if self._balance is not None:
            self._balance.placed(weights.placements)

    def run(self, batch: Batch) -> Forward:
        if self._balance is not None and (placements := self._balance.wanted()) is not None:
            self.place_experts(placements)
        self._orders.give("run", *(getattr(batch, name) for name in Batch.__slots__))
        parts, chosen = self._rank.run(batch)
        routes = None
        if self._routes is not None or self._balance is not None:
            ids = torch.stack(chosen, 1).cpu().numpy()
            if self._balance is not None:
                self._balance.saw(ids)
            routes = None if self._routes is None else ids.astype(self._routes)
        return Forward(torch.cat(parts, 1)[:, : self.config.vocab_size], routes)

    def place_experts(self, placements: Sequence[Placement]) -> None:
        """Moves experts to other slots at all ranks: what is computed stays the same but for rounding."""
        self._orders.give("place", as_arrays(placements))
        self._rank.place_experts(placements)

    def copy_pages(self, sources: np.ndarray, targets: np.ndarray) -> None:
        self._orders.give("copy", sources, targets)
        self._rank.copy_pages(sources, targets)

    def clear_pages(self, pages: np.ndarray) -> None:
        self._orders.give("clear", pages)
        self._rank.clear_pages(pages)

    def close(self) -> None:
        """From any thread: the other ranks learn that there is nothing more to do."""
        if self._balance is not None:
            self._balance.close()
        self._link.close()


class Follower:
    """Another rank than the first. `take` is for any thread, `follow` occupies one."""

    def __init__(self, link: Link, config: ModelConfig) -> None:
        self._link = link
        self._config = config
        self._taken: dict[int, RankWeights] = {}
        self._lock = threading.Lock()

    def take(self, part: Part) -> None:
        """Prepares weights, and keeps them until the first rank says that they count, or newer ones do.

        Raises ValueError, FloatingPointError as `prepare`.
        """
        weights = prepare(self._link, self._config, part)
        with self._lock:
            self._taken[weights.ticket] = weights
            for ticket in sorted(self._taken)[:-MOST_TAKEN]:
                del self._taken[ticket]

    def _load(self, rank: Rank, ticket: int) -> None:
        with self._lock:
            weights = self._taken[ticket]
            self._taken = {later: others for later, others in self._taken.items() if later > ticket}
        rank.load(weights)

    def follow(self) -> None:
        """Does what the first rank does, until that is gone: RankLost, or this one is closed."""
        kind, values = self._link.orders.take()
        assert kind == "open"
        num_pages, page_tokens, split_tokens = values
        rank = Rank(self._link, self._config, num_pages=num_pages, page_tokens=page_tokens, split_tokens=split_tokens)
        mesh = self._link.place.mesh
        while True:
            kind, values = self._link.orders.take()
            if kind == "run":
                rank.run(Batch(*map(_own, values)))
            elif kind == "load":
                self._load(rank, *values)
            elif kind == "place":
                rank.place_experts(from_arrays(values[0], mesh, self._config))
            elif kind == "copy":
                rank.copy_pages(*map(_own, values))
            else:
                rank.clear_pages(*map(_own, values))


def _own(value: Any) -> Any:
    """What was received is read-only, which torch does not like."""
    return np.array(value) if isinstance(value, np.ndarray) else value
