"""The live responses of an engine as arrays, one entry each, so that a step costs a few array operations.

Slots 0..num_live-1 are in use, without holes: when one is freed, the last slot takes its place. What is kept of a
response stays where it is, at its *row*; `rows[slot]` finds it. Knows nothing of models, weights or queues.
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
        self._rows = np.arange(num_slots)
        """A permutation: the first num_live are in use, the rest are free"""
        self._key = np.zeros(num_slots, np.int64)
        self._member = np.zeros(num_slots, np.int64)
        self._temperature = np.zeros(num_slots, np.float32)
        self._prompt_length = np.zeros(num_slots, np.int64)
        self._length = np.zeros(num_slots, np.int64)
        """Response tokens there are"""
        self._handed = np.zeros(num_slots, np.int64)
        """Response tokens that the caller has"""
        self._limit = np.zeros(num_slots, np.int64)
        """Response tokens there may be"""
        self._last = np.zeros(num_slots, np.int64)
        """Newest token: of the prompt while the response is empty"""
        self._tokens = np.zeros((num_slots, max_new_tokens), np.int32)
        self._logprobs = np.zeros((num_slots, max_new_tokens), np.float32)
        self._uniforms = np.full((num_slots, max_new_tokens), 0.5)

    @property
    def num_free(self) -> int:
        return self.num_slots - self.num_live

    def occupy(self, request: Request, indices: list[int], uniforms: np.ndarray) -> list[int]:
        """Gives the members at `indices` of `request` the next slots, which it returns.

        `uniforms`: float64 [members, at least max_new_tokens], random numbers for the positions of each response.
        """
        slots = range(self.num_live, self.num_live + len(indices))
        rows = self._rows[slots.start : slots.stop]
        self.num_live = slots.stop
        self._key[rows] = request.key
        self._member[rows] = [request.members[index] for index in indices]
        self._temperature[rows] = request.temperature
        self._prompt_length[rows] = len(request.prompt)
        self._limit[rows] = request.max_new_tokens
        self._uniforms[rows, : request.max_new_tokens] = uniforms[:, : request.max_new_tokens]
        self._length[rows] = 0
        self._last[rows] = request.prompt[-1]
        if request.prefixes:
            for row, index in zip(rows, indices, strict=True):
                prefix = request.prefixes[index]
                self._length[row] = len(prefix)
                self._tokens[row, : len(prefix)] = prefix
                self._last[row] = prefix[-1] if len(prefix) else request.prompt[-1]
        self._handed[rows] = self._length[rows]
        return list(slots)

    def feed(self) -> tuple[np.ndarray, np.ndarray]:
        """The newest token of each live response and its position in the sequence: two int64 [num_live]."""
        live = self._live()
        return self._last[live], self._prompt_length[live] + self._length[live] - 1

    def randomness(self) -> tuple[np.ndarray, np.ndarray]:
        """Temperature, float32, and random number for the next token, float64, of each live response: [num_live]."""
        live = self._live()
        return self._temperature[live], self._uniforms[live, self._length[live]]

    def append(self, tokens: np.ndarray, logprobs: np.ndarray) -> None:
        """Adds a token (int64 [num_live]) and its log-probability (float32 [num_live]) to each live response."""
        live = self._live()
        length = self._length[live]
        self._tokens[live, length] = tokens
        self._logprobs[live, length] = logprobs
        self._last[live] = tokens
        self._length[live] = length + 1

    def used_up(self) -> np.ndarray:
        """Which live responses have all the tokens they may have, bool [num_live]."""
        live = self._live()
        return np.asarray(self._length[live] == self._limit[live])

    def num_held_back(self) -> np.ndarray:
        """Tokens of each live response that the caller does not have, int64 [num_live]."""
        live = self._live()
        return np.asarray(self._length[live] - self._handed[live])

    def of(self, key: int) -> np.ndarray:
        """Slots of the request `key`, int64 [n], ascending."""
        return np.flatnonzero(self._key[self._live()] == key)

    def num_tokens(self, slot: int) -> int:
        """Length of the sequence, its prompt included."""
        row = self._rows[slot]
        return int(self._prompt_length[row] + self._length[row])

    def hand_out(self, slot: int, version: int, finish: Finish) -> Chunk:
        """The tokens of a response that the caller does not have yet."""
        row = self._rows[slot]
        fresh = slice(self._handed[row], self._length[row])
        self._handed[row] = self._length[row]
        return Chunk(
            key=int(self._key[row]),
            member=int(self._member[row]),
            version=version,
            tokens=self._tokens[row, fresh].copy(),
            logprobs=self._logprobs[row, fresh].copy(),
            finish=finish,
        )

    def response(self, slot: int) -> tuple[int, int, np.ndarray]:
        """Key, member and all tokens (int32 [n]) of a response."""
        row = self._rows[slot]
        return int(self._key[row]), int(self._member[row]), self._tokens[row, : self._length[row]].copy()

    def free(self, slots: np.ndarray) -> list[tuple[int, int]]:
        """Ends the responses in `slots` (int64 [n], ascending). Others move into the holes: (from, to), caches must follow."""
        num_left = self.num_live - len(slots)
        holes = slots[slots < num_left]
        movers = np.setdiff1d(np.arange(num_left, self.num_live), slots, assume_unique=True)
        self._rows[holes], self._rows[movers] = self._rows[movers], self._rows[holes]
        self.num_live = num_left
        return list(zip(movers.tolist(), holes.tolist(), strict=True))

    def _live(self) -> np.ndarray:
        return self._rows[: self.num_live]
