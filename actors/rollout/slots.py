"""The live responses of an engine as arrays, one entry each, so that a step costs a few array operations.

Slots 0..num_live-1 are in use, without holes: when one is freed, the last slot takes its place. Tokens stay where they
were written, in the *row* of their response, and so do the pages of its keys and values. Knows nothing of models,
weights or queues.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ..types import Finish, Origin
from .requests import Chunk, Request


class Slots:
    """Bookkeeping for up to `num_slots` live responses of up to `max_new_tokens` tokens and `max_pages` pages."""

    def __init__(self, *, num_slots: int, max_new_tokens: int, max_pages: int, page_tokens: int) -> None:
        self.num_slots = num_slots
        self.num_live = 0
        self._page_tokens = page_tokens
        self._num_admitted = 0
        self._ever_truncated = self._ever_watched = False
        """Whether any request has asked for truncation or stops: until then no step looks"""
        # By slot.
        self._row = np.arange(num_slots)
        self._key = np.zeros(num_slots, np.int64)
        self._member = np.zeros(num_slots, np.int64)
        self._serial = np.zeros(num_slots, np.int64)
        """Number of its admission"""
        self._temperature = np.zeros(num_slots, np.float32)
        self._top_k = np.zeros(num_slots, np.int64)
        self._top_p = np.ones(num_slots, np.float32)
        self._min_p = np.zeros(num_slots, np.float32)
        self._watched = np.zeros(num_slots, bool)
        """Whether there are stop sequences or texts to look for"""
        self._begun = np.zeros(num_slots, bool)
        """Whether a chunk has been handed out from this slot"""
        self._told = np.zeros(num_slots, bool)
        """Whether its newest origin has been"""
        self._last = np.zeros(num_slots, np.int64)
        """Newest token: of the prompt while the response is empty"""
        self._position = np.zeros(num_slots, np.int64)
        """Where `_last` stands in the sequence"""
        self._length = np.zeros(num_slots, np.int64)
        """Response tokens there are"""
        self._handed = np.zeros(num_slots, np.int64)
        """Response tokens that the caller has"""
        self._limit = np.zeros(num_slots, np.int64)
        """Response tokens there may be"""
        self._num_pages = np.zeros(num_slots, np.int64)
        self._by_slot = [array for array in vars(self).values() if isinstance(array, np.ndarray)]
        # By row.
        self._tokens = np.zeros((num_slots, max_new_tokens), np.int32)
        self._logprobs = np.zeros((num_slots, max_new_tokens), np.float32)
        self._uniforms = np.zeros((num_slots, max_new_tokens))
        self._tables = np.zeros((num_slots, max_pages), np.int32)
        self._asked: list[Request | None] = [None] * num_slots
        self._routes: np.ndarray | None = None
        """[rows, max_new_tokens, L, K]: experts of the input before each token, if anybody keeps them"""
        self._prompt_routes: list[np.ndarray | None] = [None] * num_slots
        """[P - 1, L, K], until the first chunk has taken them"""

    @property
    def num_free(self) -> int:
        return self.num_slots - self.num_live

    def occupy(
        self,
        request: Request,
        indices: list[int],
        uniforms: np.ndarray,
        pages: np.ndarray,
        routes: np.ndarray | None = None,
    ) -> slice:
        """Gives the members at `indices` of `request` the next slots, which it returns.

        `uniforms`: float64 [members, at least max_new_tokens], random numbers for the positions of each response;
        `pages`: int64 [members, n], which hold all but the tokens to come. `routes`: [tokens so far, L, K].
        """
        first, end = self.num_live, self.num_live + len(indices)
        new = slice(first, end)
        self.num_live = end
        self._key[new] = request.key
        self._member[new] = [request.members[index] for index in indices]
        self._serial[new] = np.arange(self._num_admitted, self._num_admitted + len(indices))
        self._num_admitted += len(indices)
        self._temperature[new] = request.temperature
        self._top_k[new], self._top_p[new], self._min_p[new] = request.top_k, request.top_p, request.min_p
        self._watched[new] = watched = bool(request.stop or request.stop_strings)
        self._ever_watched |= watched
        self._ever_truncated |= bool(request.top_k) or request.top_p < 1 or request.min_p > 0
        self._begun[new] = self._told[new] = False
        self._last[new] = request.prompt[-1]
        self._position[new] = len(request.prompt) - 1
        self._length[new] = 0
        self._limit[new] = request.max_new_tokens
        self._num_pages[new] = pages.shape[1]
        rows = self._row[new]
        self._tables[rows, : pages.shape[1]] = pages
        self._uniforms[rows, : request.max_new_tokens] = uniforms[:, : request.max_new_tokens]
        if request.prefixes:
            for slot, index in zip(range(first, end), indices, strict=True):
                self._continue(slot, request.prefixes[index])
        self._handed[new] = self._length[new]
        for slot, row in zip(range(first, end), rows.tolist(), strict=True):
            self._asked[row] = request
            if routes is not None:
                self._begin_routes(slot, row, routes)
        return new

    def _begin_routes(self, slot: int, row: int, routes: np.ndarray) -> None:
        if self._routes is None:
            self._routes = np.zeros((*self._tokens.shape, *routes.shape[1:]), routes.dtype)
        length = self._length[slot]
        self._routes[row, length] = routes[-1]
        self._prompt_routes[row] = routes[:-1] if length == 0 else None

    def _continue(self, slot: int, prefix: np.ndarray) -> None:
        if len(prefix):
            self._tokens[self._row[slot], : len(prefix)] = prefix
            self._last[slot] = prefix[-1]
            self._position[slot] += len(prefix)
            self._length[slot] = len(prefix)

    def feed(self) -> tuple[np.ndarray, np.ndarray]:
        """The newest token of each live response and its position in the sequence: two int64 [num_live], views."""
        return self._last[: self.num_live], self._position[: self.num_live]

    def tables(self) -> np.ndarray:
        """The pages of each live response, int32 [num_live, most pages of any]."""
        live = slice(self.num_live)
        return self._tables[self._row[live], : self._num_pages[live].max()]

    def full(self) -> np.ndarray:
        """Slots whose newest token has no page to go to, int64 [n], ascending."""
        live = slice(self.num_live)
        return np.flatnonzero(self._position[live] >= self._num_pages[live] * self._page_tokens)

    def last_pages(self, slots: np.ndarray) -> np.ndarray:
        """The last page of each of `slots`, int64 [n]."""
        return np.asarray(self._tables[self._row[slots], self._num_pages[slots] - 1], np.int64)

    def add_page(self, slots: np.ndarray, pages: np.ndarray) -> None:
        """Gives each of `slots` one more page."""
        self._tables[self._row[slots], self._num_pages[slots]] = pages
        self._num_pages[slots] += 1

    def pages(self, slot: int) -> np.ndarray:
        """The pages of a response, int64 [n]."""
        return self._tables[self._row[slot], : self._num_pages[slot]].astype(np.int64)

    def newest(self) -> int:
        """The slot that was given away last."""
        return int(self._serial[: self.num_live].argmax())

    @property
    def num_empty(self) -> int:
        """Places for tokens in the pages of live responses, beyond their tokens."""
        live = slice(self.num_live)
        return int((self._num_pages[live] * self._page_tokens - self._position[live]).sum())

    def randomness(self) -> tuple[np.ndarray, np.ndarray]:
        """Temperature, float32, and random number for the next token, float64, of each live response: [num_live]."""
        live = slice(self.num_live)
        return self._temperature[live], self._uniforms[self._row[live], self._length[live]]

    def truncation(self) -> dict[str, np.ndarray]:
        """top_k int64, top_p and min_p float32 of the live responses, each only if any of them asks for it."""
        if not self._ever_truncated:
            return {}
        live = slice(self.num_live)
        settings = (("top_k", self._top_k, 0), ("top_p", self._top_p, 1), ("min_p", self._min_p, 0))
        return {name: values[live] for name, values, off in settings if (values[live] != off).any()}

    def append(self, tokens: np.ndarray, logprobs: np.ndarray) -> None:
        """Adds a token (int64 [num_live]) and its log-probability (float32 [num_live]) to each live response."""
        live = slice(self.num_live)
        row, length = self._row[live], self._length[live]
        self._tokens[row, length] = tokens
        self._logprobs[row, length] = logprobs
        self._last[live] = tokens
        self._position[live] += 1
        length += 1

    def keep_routes(self, routes: np.ndarray) -> None:
        """The experts of the newest token of each live response, [num_live, L, K]."""
        if self._routes is not None:
            live = slice(self.num_live)
            self._routes[self._row[live], self._length[live]] = routes

    def watched(self) -> np.ndarray:
        """Slots of responses that stop sequences or texts may end, int64 [n]."""
        return np.flatnonzero(self._watched[: self.num_live]) if self._ever_watched else np.zeros(0, np.int64)

    def asked(self, slot: int) -> Request:
        """The request of a response; its prefixes are of the time it was given a slot."""
        request = self._asked[int(self._row[slot])]
        assert request is not None
        return request

    def key(self, slot: int) -> int:
        """Key of the request of a response."""
        return int(self._key[slot])

    def used_up(self) -> np.ndarray:
        """Which live responses have all the tokens they may have, bool [num_live]."""
        return np.equal(self._length[: self.num_live], self._limit[: self.num_live])

    def num_held_back(self) -> np.ndarray:
        """Tokens of each live response that the caller does not have, int64 [num_live]."""
        return np.subtract(self._length[: self.num_live], self._handed[: self.num_live])

    def of(self, key: int) -> np.ndarray:
        """Slots of the request `key`, int64 [n], ascending."""
        return np.flatnonzero(self._key[: self.num_live] == key)

    def hand_out(self, slot: int, version: int, finish: Finish, origin: Origin | None, refusal: str = "") -> Chunk:
        """The tokens of a response that the caller does not have yet; with `origin` if they are the first of here."""
        row, fresh = self._row[slot], slice(self._handed[slot], self._length[slot])
        self._handed[slot] = self._length[slot]
        before, self._prompt_routes[row] = self._prompt_routes[row], None
        routes = None if self._routes is None else self._routes[row, fresh].copy()
        if routes is not None and before is not None:
            routes = np.concatenate([before, routes])
        told = origin if not self._told[slot] else None
        if told is not None and self._begun[slot]:
            told = replace(told, afresh=False)
        self._begun[slot] = self._told[slot] = True
        return Chunk(
            key=int(self._key[slot]),
            member=int(self._member[slot]),
            version=version,
            tokens=self._tokens[row, fresh].copy(),
            logprobs=self._logprobs[row, fresh].copy(),
            finish=finish,
            refusal=refusal,
            routes=routes,
            origin=told,
        )

    def say_origins(self) -> None:
        """The next chunk of each live response says its origin again."""
        self._told[: self.num_live] = False

    def response(self, slot: int) -> tuple[int, int, np.ndarray]:
        """Key, member and all tokens (int32 [n]) of a response."""
        return int(self._key[slot]), int(self._member[slot]), self._tokens[self._row[slot], : self._length[slot]].copy()

    def after_free(self, slots: np.ndarray) -> np.ndarray:
        """Which slot each response that is left when `slots` (int64 [n], ascending) are freed is in now, int64 [m]."""
        kept = np.arange(self.num_live)
        num_left = self.num_live - len(slots)
        tail = np.ones(len(slots), bool)
        tail[slots[slots >= num_left] - num_left] = False
        kept[slots[slots < num_left]] = np.flatnonzero(tail) + num_left
        return kept[:num_left]

    def free(self, slots: np.ndarray) -> None:
        """Ends the responses in `slots`, int64 [n], ascending. The last ones move into the holes."""
        kept = self.after_free(slots)
        holes = slots[slots < len(kept)]
        movers, freed_rows = kept[holes], self._row[holes]
        for array in self._by_slot:
            array[holes] = array[movers]
        self._row[movers] = freed_rows
        self.num_live = len(kept)
