"""An engine whose tokens stay on the device: the host reads those of one step while the next one runs.

    step():  launch n+1 for all that may go on      read n: ends, chunks, freed slots and pages
                 prompts, admission, random numbers         '-- who has ended was in n+1, too: that token is dropped

Budgets are known ahead, and cost no token. What must not be late waits for what is under way first (`land`): new
weights, so that each token carries the version that sampled it, and giving way, for who has ended leaves pages. Freed
rows and pages may be given away at once: the device does things in the order in which they were launched. Tokens are
those of engine.Engine. Knows nothing of graphs.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..model.config import ModelConfig
from .cuda_runner import Draws, GraphRunner, Pending
from .engine import Engine, Prepared
from .graphs import Capture
from .requests import Chunk, Request
from .room import enough_pages
from .slots import Slots


class AheadSlots(Slots):
    """Slots whose newest tokens may be known to the device alone: `_position` counts them, `_length` does not."""

    def __init__(self, **sizes: Any) -> None:
        super().__init__(**sizes)
        self._ahead = np.zeros(self.num_slots, np.int64)
        """Tokens that were launched and have not been read"""
        self._by_slot.append(self._ahead)

    def occupy(
        self,
        request: Request,
        indices: list[int],
        uniforms: np.ndarray,
        pages: np.ndarray,
        routes: np.ndarray | None = None,
    ) -> slice:
        new = super().occupy(request, indices, uniforms, pages, routes)
        self._ahead[new] = 0
        return new

    def _may_go_on(self) -> np.ndarray:
        live = slice(self.num_live)
        return np.asarray(self._length[live] + self._ahead[live] < self._limit[live])

    def going(self) -> np.ndarray:
        """Slots of responses that may have a token more than was launched, int64 [n], ascending."""
        return np.flatnonzero(self._may_go_on())

    def full(self) -> np.ndarray:
        live = slice(self.num_live)
        return np.flatnonzero((self._position[live] >= self._num_pages[live] * self._page_tokens) & self._may_go_on())

    def draws(self, slots: np.ndarray) -> Draws:
        """What the next token of each of `slots` is drawn with."""
        row = self._row[slots]
        return Draws(
            rows=row,
            positions=self._position[slots],
            uniforms=self._uniforms[row, self._length[slots] + self._ahead[slots]],
            temperatures=self._temperature[slots].astype(np.float64),
            top_k=self._top_k[slots],
            top_p=self._top_p[slots].astype(np.float64),
            min_p=self._min_p[slots].astype(np.float64),
        )

    def tables_of(self, slots: np.ndarray) -> np.ndarray:
        """The pages of `slots`, int32 [n, most pages of any]; there is at least one."""
        return self._tables[self._row[slots], : self._num_pages[slots].max()]

    def launched(self, slots: np.ndarray) -> np.ndarray:
        """Each of `slots` has a token more, which only the device knows. Returns their serials, int64 [n]."""
        self._position[slots] += 1
        self._ahead[slots] += 1
        return np.asarray(self._serial[slots])

    def still(self, serials: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Slots of those of `serials` that are live, and which of `serials` they have: two int64 [n]."""
        _, slots, which = np.intersect1d(
            self._serial[: self.num_live], serials, assume_unique=True, return_indices=True
        )
        return slots, which

    def arrived(self, slots: np.ndarray, tokens: np.ndarray, logprobs: np.ndarray) -> None:
        """The oldest token of each of `slots` that only the device knew, int64 [n], with its log-probability."""
        row, length = self._row[slots], self._length[slots]
        self._tokens[row, length] = tokens
        self._logprobs[row, length] = logprobs
        self._last[slots] = tokens
        self._length[slots] += 1
        self._ahead[slots] -= 1


@dataclass(slots=True)
class _Flight:
    """A step that was launched and has not been read."""

    serials: np.ndarray
    """int64 [n]: of the admissions of its responses"""
    pending: Pending


class DeviceEngine(Engine):
    """See engine.Engine; its `runner` is a GraphRunner. A step's tokens come with the next step."""

    _slots: AheadSlots
    _slots_class = AheadSlots
    _runner: GraphRunner
    _flight: _Flight | None = None

    @property
    def runner(self) -> GraphRunner:
        """What computes its steps."""
        return self._runner

    @torch.inference_mode()
    def step(self) -> list[Chunk]:
        """See Engine.step. Bad weights are noticed one step late, before newer ones are taken."""
        if len(self._slots.full()) > self._runner.num_pages - self._scheduler.num_used_pages:
            self._outbox = self._land()
        self._scheduler.grow(self._preempt)
        flight, self._flight = self._flight, self._launch()
        if flight is not None:
            return self._take(flight)
        if self._flight is None:
            return self.flush()
        chunks, self._outbox = self._outbox, []
        return chunks

    def load(self, prepared: Prepared) -> Any:
        """See Engine.load. What is under way comes first: it is of the old version."""
        with suppress(FloatingPointError):  # The old weights were bad: what is under way is computed anew with these.
            self._outbox = self._land()
        return super().load(prepared)

    def now_in(self, precision: str) -> None:
        self._outbox = self._land()
        super().now_in(precision)

    def _land(self) -> list[Chunk]:
        """Reads what is under way. Returns what is due."""
        flight, self._flight = self._flight, None
        if flight is not None:
            return self._take(flight)
        chunks, self._outbox = self._outbox, []
        return chunks

    def _launch(self) -> _Flight | None:
        """The next token of every response that may have one, and some of what waits."""
        slots, live = self._slots, self._slots.num_live
        going, chunks = slots.going(), self._scheduler.chunks()
        if chunks:
            self._run(0, chunks)
        firsts = self._admit()
        which = np.concatenate([going, np.arange(live, slots.num_live)])
        if not len(which):
            return None
        tables = slots.tables_of(going) if len(going) else np.zeros((0, 1), np.int32)
        pending = self._runner.launch(slots.draws(which), tables, torch.cat(firsts) if firsts else None)
        return _Flight(slots.launched(which), pending)

    def _take(self, flight: _Flight) -> list[Chunk]:
        """Reads a step: waits for it, and leaves out whoever has ended since. Returns what is due."""
        tokens, logprobs = flight.pending.read()
        slots, which = self._slots.still(flight.serials)
        finite = np.isfinite(logprobs[which])
        if not finite.all():
            self._refuse_some(slots, finite)
            good = which[finite]
            slots, left = self._slots.still(flight.serials[good])
            which = good[left]
        self._slots.arrived(slots, tokens[which], logprobs[which])
        if len(slots):
            self._scheduler.cap.stepped()
            self._stats.num_steps += 1
            self._stats.num_generated_tokens += len(slots)
        stopped = np.zeros(self._slots.num_live, bool)
        stopped[slots] = tokens[which] == self._eos_id
        return self._settle(stopped)

    def _refuse_some(self, slots: np.ndarray, finite: np.ndarray) -> None:
        bad = np.zeros(self._slots.num_live, bool)
        bad[slots[~finite]] = True
        if not finite.any() and len(finite) > 1:
            bad[:] = True
        self._refuse(bad)


def graph_runner(
    config: ModelConfig,
    capture: Capture,
    *,
    num_slots: int,
    max_prompt_tokens: int,
    max_new_tokens: int,
    page_tokens: int,
    kv_tokens: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> GraphRunner:
    """What a DeviceEngine of these limits computes with. Raises ValueError as GraphRunner."""
    num_pages = enough_pages(num_slots, max_prompt_tokens, max_new_tokens, page_tokens)
    return GraphRunner(
        config,
        num_pages=num_pages if kv_tokens is None else min(num_pages, kv_tokens // page_tokens),
        page_tokens=page_tokens,
        num_rows=num_slots,
        max_pages=-(-(max_prompt_tokens + max_new_tokens) // page_tokens),
        capture=capture,
        dtype=dtype,
    )
