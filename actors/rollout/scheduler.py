"""Who waits, whose pages are where, and who gives way when there are none: the KV memory of an engine.

    waiting --pages--> prefilled in chunks --pages shared, the last one copied--> live: a page more now and then
       ^                                                                            |
       '------------------- no page left: the newest gives way ---------------------'

A prompt is computed once for its group, and its full pages are kept for others that begin with it until weights change
(prefix.py). Knows nothing of logits, tokens' meaning or chunks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice

import numpy as np

from ..model.paged import pages_per_block
from .admission import LiveCap
from .pages import PagePool
from .prefix import PrefixCache
from .runner import Runner
from .slots import Slots
from .waiting import Waiting

NUM_AHEAD = 8
"""Sequences that are prefilled together, ahead of need: a small prefill costs almost as much as a larger one."""

RESERVE_SHARE = 1 / 8
"""Pages that are left free for the live responses, of their number, when a waiting one is given some."""


class Scheduler:
    """The queue and the pages. `slots` are the live responses; the engine changes those that it asks for."""

    def __init__(self, runner: Runner, slots: Slots, *, prefill_tokens: int) -> None:
        self.waiting: deque[Waiting] = deque()
        self.cap = LiveCap(slots.num_slots)
        self.num_preempted = 0
        self.num_prefix_tokens = 0
        """Tokens that were not computed because their pages were known"""
        self._runner = runner
        self._slots = slots
        self._size = runner.page_tokens
        self._prefill_tokens = prefill_tokens
        self._pool = PagePool(runner.num_pages, pages_per_block(runner.page_tokens))
        self._prefix = PrefixCache(self._pool, self._size)

    @property
    def num_used_pages(self) -> int:
        return self._pool.num_used

    @property
    def num_empty(self) -> int:
        """Places for tokens in used pages in which there is none yet: memory that pages waste."""
        waiting = (len(w.pages) * self._size - w.num_cached for w in self.waiting if w.pages is not None)
        return (self._slots.num_empty if self._slots.num_live else 0) + sum(waiting)

    # Prefill ------------------------------------------------------------------------------------------------

    def chunks(self) -> list[tuple[Waiting, int]]:
        """What is prefilled in the next pass, and how many tokens of it: nothing if it would wait for a slot then."""
        if not self.waiting or self.waiting[0].logits is not None or not self._num_open_slots:
            return []
        budget = self._prefill_tokens
        chosen: list[tuple[Waiting, int]] = []
        for waiting in islice(self.waiting, NUM_AHEAD):
            if waiting.logits is not None:
                continue
            if not budget or (waiting.pages is None and not self._begin(waiting, force=self._stuck and not chosen)):
                break
            count = min(budget, waiting.num_left)
            chosen.append((waiting, count))
            budget -= count
        return chosen

    def computed(self, waiting: Waiting) -> None:
        """All tokens of `waiting` are in its pages: those of its prompt may serve others."""
        prompt = waiting.request.prompt
        assert waiting.pages is not None
        routes = np.concatenate(waiting.routes)[: len(prompt)] if waiting.routes else None
        self._prefix.add(prompt, waiting.pages, routes)

    def _begin(self, waiting: Waiting, *, force: bool) -> bool:
        """Gives `waiting` its pages; False if there are too few of them now."""
        known, routes = self._prefix.match(waiting.tokens)
        wanted = -(-len(waiting.tokens) // self._size) - len(known)
        if not self._has_room(wanted, force=force):
            self._pool.give_back(known)
            return False
        waiting.pages = np.concatenate([known, self._pool.take(wanted, known[-1] if len(known) else -1)])
        waiting.num_cached = len(known) * self._size
        waiting.routes = routes
        self.num_prefix_tokens += waiting.num_cached
        return True

    @property
    def _num_open_slots(self) -> int:
        return min(self._slots.num_free, self.cap.limit - self._slots.num_live)

    @property
    def _stuck(self) -> bool:
        """Nothing is live: what is at the head of the queue must have its pages, whatever else is given up."""
        return not self._slots.num_live

    # Slots --------------------------------------------------------------------------------------------------

    def admit(self) -> Iterator[tuple[Waiting, list[int], np.ndarray]]:
        """Waiting sequences whose logits are there, the indices of the members that get slots now, and their pages,
        int64 [members, n]. The caller occupies the slots before it asks for the next."""
        while self.waiting and (waiting := self.waiting[0]).logits is not None:
            num = min(waiting.num_members, self._num_open_slots)
            while num > 0 and not self._has_room(num, force=self._stuck and num == 1):
                num //= 2
            if num <= 0:
                return
            indices = waiting.indices[waiting.num_admitted : waiting.num_admitted + num]
            waiting.num_admitted += num
            tables = self._fork(waiting, num)
            if not waiting.num_members:
                self.waiting.popleft()
            yield waiting, indices, tables

    def _fork(self, waiting: Waiting, num: int) -> np.ndarray:
        """Pages for `num` members; the last member of all takes those that `waiting` holds."""
        assert waiting.pages is not None
        last = not waiting.num_members
        tables = np.repeat(waiting.pages[None], num, 0)
        num_full, copies = len(waiting.tokens) // self._size, num - last
        if copies:
            self._pool.share(waiting.pages[:num_full], copies)
            if num_full < len(waiting.pages):
                tables[:copies, -1] = self._pool.take_each(np.full(copies, -1))
                self._runner.copy_pages(np.full(copies, waiting.pages[-1]), tables[:copies, -1])
        if last:
            waiting.pages = None
        return tables

    def grow(self, preempt: Callable[[int], None]) -> None:
        """Gives every live response a page for its newest token; where there is none, `preempt` the newest response.

        `preempt(slot)` puts it back into the queue, and frees its slot and pages.
        """
        full = self._slots.full()
        while len(full) > self._pool.num_free:
            self._make_room(len(full), spare=0)
            if len(full) <= self._pool.num_free:
                break
            assert self._slots.num_live > 1, "one response alone must fit"
            preempt(self._slots.newest())
            self.num_preempted += 1
            self.cap.preempted(self._slots.num_live)
            full = self._slots.full()
        if len(full):
            self._slots.add_page(full, self._pool.take_each(self._slots.last_pages(full)))

    # Pages --------------------------------------------------------------------------------------------------

    def give_back(self, pages: np.ndarray) -> np.ndarray:
        """Pages of a response that ended or gave way, or of a sequence that was forgotten. Returns what is free now."""
        return self._pool.give_back(pages)

    def cancel(self, key: int) -> None:
        """Forgets what waits of a request."""
        for waiting in self.waiting:
            if waiting.request.key == key:
                self._pool.give_back(waiting.forget())
        self.waiting = deque(waiting for waiting in self.waiting if waiting.request.key != key)

    def forget_computed(self) -> np.ndarray:
        """Unlearns all that was computed for sequences without a slot: weights have changed, or were bad. Returns the
        pages that are free now."""
        freed = [self._prefix.clear()] + [self._pool.give_back(waiting.forget()) for waiting in self.waiting]
        return np.concatenate(freed)

    def _has_room(self, count: int, *, force: bool) -> bool:
        """Whether `count` pages can be taken, with some left for those that live; with `force` all else is given up."""
        reserve = 0 if force else int(self._slots.num_live * RESERVE_SHARE)
        if self._pool.num_free < count + reserve:
            self._prefix.evict(count + reserve - self._pool.num_free)
        if force:
            self._make_room(count)
        return self._pool.num_free >= count + reserve

    def _make_room(self, count: int, spare: int = 1) -> None:
        """Gives up, until `count` pages are free: known beginnings, then what waits, but for the first `spare`."""
        self._prefix.evict(count - self._pool.num_free)
        for waiting in reversed(list(islice(self.waiting, spare, None))):
            if self._pool.num_free >= count:
                return
            self._pool.give_back(waiting.forget())
