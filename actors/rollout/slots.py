"""The live responses of an engine as arrays, one entry each, so that a step costs a few array operations.

Slots 0..num_live-1 are in use, without holes: when one is freed, the last slot takes its place. Tokens stay where they
were written, in the *row* of their response. Knows nothing of models, weights or queues.
"""

from __future__ import annotations

import numpy as np

from ..types import Finish
from .requests import Chunk, Request


class Slots:
    """Bookkeeping for up to `num_slots` live responses of up to `max_new_tokens` tokens."""

    def __init__(self, *, num_slots: int, max_new_tokens: int) -> None:
        self.num_slots = num_slots
        self.num_live = 0
        # By slot.
        self._row = np.arange(num_slots)
        self._key = np.zeros(num_slots, np.int64)
        self._member = np.zeros(num_slots, np.int64)
        self._temperature = np.zeros(num_slots, np.float32)
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
        self._by_slot = [array for array in vars(self).values() if isinstance(array, np.ndarray)]
        # By row.
        self._tokens = np.zeros((num_slots, max_new_tokens), np.int32)
        self._logprobs = np.zeros((num_slots, max_new_tokens), np.float32)
        self._uniforms = np.zeros((num_slots, max_new_tokens))

    @property
    def num_free(self) -> int:
        return self.num_slots - self.num_live

    def occupy(self, request: Request, indices: list[int], uniforms: np.ndarray) -> slice:
        """Gives the members at `indices` of `request` the next slots, which it returns.

        `uniforms`: float64 [members, at least max_new_tokens], random numbers for the positions of each response.
        """
        first, end = self.num_live, self.num_live + len(indices)
        new = slice(first, end)
        self.num_live = end
        self._key[new] = request.key
        self._member[new] = [request.members[index] for index in indices]
        self._temperature[new] = request.temperature
        self._last[new] = request.prompt[-1]
        self._position[new] = len(request.prompt) - 1
        self._length[new] = 0
        self._limit[new] = request.max_new_tokens
        self._uniforms[self._row[new], : request.max_new_tokens] = uniforms[:, : request.max_new_tokens]
        if request.prefixes:
            for slot, index in zip(range(first, end), indices, strict=True):
                self._continue(slot, request.prefixes[index])
        self._handed[new] = self._length[new]
        return new

    def _continue(self, slot: int, prefix: np.ndarray) -> None:
        if len(prefix):
            self._tokens[self._row[slot], : len(prefix)] = prefix
            self._last[slot] = prefix[-1]
            self._position[slot] += len(prefix)
            self._length[slot] = len(prefix)

    def feed(self) -> tuple[np.ndarray, np.ndarray]:
        """The newest token of each live response and its position in the sequence: two int64 [num_live], views."""
        return self._last[: self.num_live], self._position[: self.num_live]

    def randomness(self) -> tuple[np.ndarray, np.ndarray]:
        """Temperature, float32, and random number for the next token, float64, of each live response: [num_live]."""
        live = slice(self.num_live)
        return self._temperature[live], self._uniforms[self._row[live], self._length[live]]

    def append(self, tokens: np.ndarray, logprobs: np.ndarray) -> None:
        """Adds a token (int64 [num_live]) and its log-probability (float32 [num_live]) to each live response."""
        live = slice(self.num_live)
        row, length = self._row[live], self._length[live]
        self._tokens[row, length] = tokens
        self._logprobs[row, length] = logprobs
        self._last[live] = tokens
        self._position[live] += 1
        length += 1

    def used_up(self) -> np.ndarray:
        """Which live responses have all the tokens they may have, bool [num_live]."""
        return np.equal(self._length[: self.num_live], self._limit[: self.num_live])

    def num_held_back(self) -> np.ndarray:
        """Tokens of each live response that the caller does not have, int64 [num_live]."""
        return np.subtract(self._length[: self.num_live], self._handed[: self.num_live])

    def of(self, key: int) -> np.ndarray:
        """Slots of the request `key`, int64 [n], ascending."""
        return np.flatnonzero(self._key[: self.num_live] == key)

    def num_cached(self, slot: int) -> int:
        """Tokens of the sequence whose keys and values there are: all but the newest."""
        return int(self._position[slot])

    def hand_out(self, slot: int, version: int, finish: Finish) -> Chunk:
        """The tokens of a response that the caller does not have yet."""
        row, fresh = self._row[slot], slice(self._handed[slot], self._length[slot])
        self._handed[slot] = self._length[slot]
        return Chunk(
            key=int(self._key[slot]),
            member=int(self._member[slot]),
            version=version,
            tokens=self._tokens[row, fresh].copy(),
            logprobs=self._logprobs[row, fresh].copy(),
            finish=finish,
        )

    def response(self, slot: int) -> tuple[int, int, np.ndarray]:
        """Key, member and all tokens (int32 [n]) of a response."""
        return int(self._key[slot]), int(self._member[slot]), self._tokens[self._row[slot], : self._length[slot]].copy()

    def free(self, slots: np.ndarray) -> list[tuple[int, int]]:
        """Ends the responses in `slots`, int64 [n], ascending.

        Returns (from, to) of those that moved into the holes: the cache must follow.
        """
        num_left = self.num_live - len(slots)
        tail = np.ones(len(slots), bool)
        tail[slots[slots >= num_left] - num_left] = False
        movers, holes = np.flatnonzero(tail) + num_left, slots[slots < num_left]
        freed_rows = self._row[holes]
        for array in self._by_slot:
            array[holes] = array[movers]
        self._row[movers] = freed_rows
        self.num_live = num_left
        return list(zip(movers.tolist(), holes.tolist(), strict=True))
