"""Generates responses with continuous batching: every step adds one token to each live response.

    submit -> waiting -> prefilled, in chunks beside those that live -> live, in a slot -> ended: its last Chunk
                 ^                                                       |  flush: hands out what there is
                 '---------- no page left: the newest gives way ---------|  load: new weights, the cache stays
                                                                         '- cancel

Random numbers are counter-based: a response depends on the weights, the seed, its prompt's ordinal, its member index
and the position, and not on what it is batched with or whether it was interrupted, beyond rounding of the logits;
exactly so with fixed shapes. Knows nothing of rewards, actors or where weights come from. Not thread-safe, but for
`prepare`: one thread drives it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..model.config import ModelConfig
from ..philox import Stream, uniforms
from ..types import Finish, Origin
from .layout import lay_out
from .requests import Chunk, Request, check_request
from .room import check_room, num_pages_of
from .runner import Runner
from .sampling import sample
from .scheduler import Scheduler
from .single import SingleRunner
from .slots import Slots
from .stops import Detokenize, stops
from .waiting import Waiting, sequences


@dataclass(slots=True)
class EngineStats:
    """Counts since the engine was made."""

    num_steps: int = 0
    num_prefilled_tokens: int = 0
    """Tokens of prompts and prefixes that were computed; a prompt counts once for its group."""
    num_generated_tokens: int = 0
    num_finished: int = 0
    num_cancelled: int = 0
    """Responses, live or waiting, that a cancel ended."""
    refused: Counter[str] = field(default_factory=Counter)
    """Responses that were refused, by kind."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """The weights of a policy version, ready for `Engine.load`."""

    version: int
    weights: Any


@dataclass(slots=True)
class _Open:
    """A request of which `num_open` members have not ended."""

    request: Request
    num_open: int
    origin: Origin


class Engine:
    """See the module. Weights, here and in `prepare`, are fp32, by Hugging Face name, of policy version `version`."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, np.ndarray],
        *,
        version: int,
        num_slots: int,
        max_prompt_tokens: int,
        max_new_tokens: int,
        eos_id: int,
        seed: int,
        chunk_tokens: int = 32,
        page_tokens: int = 4,
        kv_tokens: int | None = None,
        prefill_tokens: int = 512,
        max_waiting: int = 65_536,
        routes: bool = False,
        fixed_shapes: bool = False,
        detokenize: Detokenize | None = None,
        runner: Runner | None = None,
        worker: str = "",
        precision: str = "float32",
    ) -> None:
        """`kv_tokens`: room for the keys and values of so many tokens (default: for all slots at their longest; less
        makes responses wait or give way). `prefill_tokens`: of prompts in one pass, at most, so that those that are
        live do not wait. `max_waiting`: responses; what is beyond is refused. `runner` has pages and precision of its
        own; without it the engine makes one. `worker` and `precision` are for the record (Origin).

        Raises ValueError if the memory or the model's max_positions are less than one response may need.
        """
        max_len = max_prompt_tokens + max_new_tokens
        if runner is None:
            num_pages = num_pages_of(
                num_slots, max_prompt_tokens, max_new_tokens, page_tokens=page_tokens, kv_tokens=kv_tokens or 0
            )
            runner = SingleRunner(
                config, num_pages=num_pages, page_tokens=page_tokens, routes=routes, fixed_shapes=fixed_shapes
            )
        max_pages = -(-max_len // runner.page_tokens)
        check_room(config, runner, max_len, max_pages)
        self._runner = runner
        self._config = config
        self._version = version
        self._max_prompt_tokens = max_prompt_tokens
        self._max_new_tokens = max_new_tokens
        self._eos_id = eos_id
        self._seed = seed
        self._chunk_tokens = chunk_tokens
        self._max_waiting = max_waiting
        self._detokenize = detokenize
        self._made_by = (
            f"headrace num_slots={num_slots} page_tokens={runner.page_tokens} pages={runner.num_pages} "
            f"prefill_tokens={prefill_tokens} max_prompt_tokens={max_prompt_tokens} max_new_tokens={max_new_tokens}"
        )
        self._worker, self._precision, self._exact = worker, precision, fixed_shapes
        self._slots = Slots(
            num_slots=num_slots, max_new_tokens=max_new_tokens, max_pages=max_pages, page_tokens=runner.page_tokens
        )
        self._scheduler = Scheduler(runner, self._slots, prefill_tokens=prefill_tokens)
        self._open: dict[int, _Open] = {}
        self._num_open = 0
        self._outbox: list[Chunk] = []
        """What earlier versions, and those that gave way, left to be handed out."""
        self._stats = EngineStats()
        runner.load(self.prepare(version, weights).weights)

    @property
    def version(self) -> int:
        """Policy version of the tokens that the next step samples."""
        return self._version

    @property
    def num_live(self) -> int:
        """Responses that have a slot."""
        return self._slots.num_live

    @property
    def num_waiting(self) -> int:
        """Responses that wait for a slot."""
        return self._num_open - self._slots.num_live

    @property
    def stats(self) -> EngineStats:
        return self._stats

    def kv_use(self) -> tuple[int, int]:
        """Distinct tokens whose keys and values are held, and how many the pages in use have room for."""
        room = self._scheduler.num_used_pages * self._runner.page_tokens
        return room - self._scheduler.num_empty, room

    @property
    def scheduler(self) -> Scheduler:
        """Its counts are worth a look: pages in use, places wasted, preemptions, the cap."""
        return self._scheduler

    def check(self, request: Request) -> None:
        """Raises ValueError if `request` can't be generated as it is: see `check_request`."""
        check_request(
            request,
            vocab_size=self._config.vocab_size,
            max_prompt_tokens=self._max_prompt_tokens,
            max_new_tokens=self._max_new_tokens,
            eos_id=self._eos_id,
            detokenize=self._detokenize,
        )

    def submit(self, request: Request) -> None:
        """Queues a request. Raises ValueError, and changes nothing, if it can't be generated or its key is in use.

        If too many wait already, all its members are refused in the chunks of the next step.
        """
        self.check(request)
        if request.key in self._open:
            raise ValueError(f"request key {request.key} is in use; wait for its responses, or cancel it")
        if self.num_waiting + len(request.members) > self._max_waiting:
            self._turn_away(request)
            return
        origin = Origin(
            engine=self._made_by, worker=self._worker, seed=self._seed, sampling=request.sampling(),
            precision=self._precision, exact=self._exact,
        )  # fmt: skip
        self._open[request.key] = _Open(request, len(request.members), origin)
        self._num_open += len(request.members)
        self._scheduler.waiting += sequences(request)

    def cancel(self, key: int) -> None:
        """Forgets a request and all of it that was not handed out. A key that is not in use is fine."""
        cancelled = self._open.pop(key, None)
        if cancelled is None:
            return
        self._num_open -= cancelled.num_open
        self._stats.num_cancelled += cancelled.num_open
        self._scheduler.cancel(key)
        self._outbox = [chunk for chunk in self._outbox if chunk.key != key]
        self._free(self._slots.of(key))

    def flush(self) -> list[Chunk]:
        """Hands out all tokens that were not handed out yet. Generation goes on after them."""
        chunks, self._outbox = self._outbox, []
        for slot in np.flatnonzero(self._slots.num_held_back()).tolist():
            chunks.append(self._hand_out(slot, ""))
        return chunks

    def prepare(self, version: int, weights: Mapping[str, np.ndarray]) -> Prepared:
        """Brings weights into the form that `load` takes at once. From any thread, while another one steps.

        Raises FloatingPointError for weights that are not finite, ValueError for those of another model.
        """
        try:
            return Prepared(version, self._runner.prepare(weights))
        except (FloatingPointError, ValueError) as error:
            raise type(error)(f"policy version {version}: {error}") from None

    def load(self, prepared: Prepared) -> Any:
        """Swaps the weights, in no time: later tokens are of its version. Live responses go on over their old keys and
        values. Returns the old weights, if the runner does: see Runner."""
        self._outbox = self.flush()
        old = self._runner.load(prepared.weights)
        self._version = prepared.version
        self._scheduler.forget_computed()
        return old

    def now_in(self, precision: str) -> None:
        """Says, for the record, what precision later tokens are computed in."""
        self._outbox = self.flush()
        self._precision = precision
        for opened in self._open.values():
            opened.origin = replace(opened.origin, precision=precision)
        self._slots.say_origins()

    @torch.inference_mode()
    def step(self) -> list[Chunk]:
        """Adds a token to every live response, admits waiting ones with their first, and returns what is due.

        Due are responses that ended, responses with `chunk_tokens` more tokens, and what an earlier version left.
        Responses whose log-probabilities are not finite are refused. Raises FloatingPointError if that are all of
        several: the weights are bad, not the requests. No response has changed then, and all are computed anew, from
        their tokens so far, at the next step.
        """
        self._scheduler.grow(self._preempt)
        logits = [*self._forward(), *self._admit()]
        if not logits:
            return self.flush()
        temperatures, randoms = self._slots.randomness()
        joined = logits[0] if len(logits) == 1 else torch.cat(logits)

        def beside(values: np.ndarray) -> Tensor:
            return torch.from_numpy(values).to(joined.device, non_blocking=True)

        truncation = {name: beside(values) for name, values in self._slots.truncation().items()}
        drawn, drawn_logprobs = sample(joined, beside(temperatures), beside(randoms), **truncation)
        tokens, logprobs = drawn.cpu().numpy(), drawn_logprobs.cpu().numpy()
        if not np.isfinite(logprobs).all():
            kept = self._refuse(~np.isfinite(logprobs))
            tokens, logprobs = tokens[kept], logprobs[kept]
        self._slots.append(tokens, logprobs)
        self._scheduler.cap.stepped()
        self._stats.num_steps += 1
        self._stats.num_generated_tokens += len(tokens)
        return self._settle(np.equal(tokens, self._eos_id))

    # A pass of the model ------------------------------------------------------------------------------------

    def _forward(self) -> list[Tensor]:
        """Runs the newest token of each live response and some of what waits. Returns the logits of the live ones."""
        chunks, live = self._scheduler.chunks(), self._slots.num_live
        if live and chunks and not self._runner.mixes:
            return [self._run(live, []), self._run(0, chunks)][:1]
        return [self._run(live, chunks)] if live else [self._run(0, chunks)][1:] if chunks else []

    def _run(self, live: int, chunks: Sequence[tuple[Waiting, int]]) -> Tensor:
        """One pass over the first `live` responses, all or none, and `chunks`; the logits of the former, [live, V]."""
        out = self._runner.run(lay_out(self._slots, live, chunks))
        if live and out.routes is not None:
            self._slots.keep_routes(out.routes[:live])
        done, row, token = [], live, live
        for waiting, count in chunks:
            if out.routes is not None:
                waiting.routes.append(out.routes[token : token + count])
            token += count
            waiting.num_cached += count
            self._stats.num_prefilled_tokens += count
            if not waiting.num_left:
                waiting.logits, row = out.logits[row], row + 1
                self._scheduler.computed(waiting)
                done.append(waiting)
        if done:
            self._draw_randoms(done)
        return out.logits[:live]

    def _draw_randoms(self, done: Sequence[Waiting]) -> None:
        members = [w.request.members[index] for w in done for index in w.indices]
        ordinals = [w.request.ordinal for w in done for _ in w.indices]
        count = max(w.request.max_new_tokens for w in done)
        drawn = uniforms(self._seed, Stream.SAMPLING, np.array(ordinals), np.array(members), count)
        ends = np.cumsum([len(w.indices) for w in done])
        for waiting, randoms in zip(done, np.split(drawn, ends[:-1]), strict=True):
            waiting.uniforms = randoms

    def _admit(self) -> list[Tensor]:
        """Gives slots to members of sequences whose logits are there, and returns those logits, a row for each."""
        logits = []
        for waiting, indices, tables in self._scheduler.admit():
            assert waiting.logits is not None and waiting.uniforms is not None
            first = waiting.num_admitted - len(indices)
            randoms = waiting.uniforms[first : first + len(indices)]
            routes = np.concatenate(waiting.routes) if waiting.routes else None
            self._slots.occupy(waiting.request, indices, randoms, tables, routes)
            logits.append(waiting.logits.expand(len(indices), -1))
        return logits

    # Ends ---------------------------------------------------------------------------------------------------

    def _settle(self, stopped: np.ndarray) -> list[Chunk]:
        """Hands out what is due after a step and frees the slots of what ended. `stopped`: bool [num_live]."""
        chunks, self._outbox = self._outbox, []
        for slot in self._slots.watched().tolist():
            asked = self._slots.asked(slot)
            written = self._slots.response(slot)[2]
            stopped[slot] |= stops(written, asked.stop, asked.stop_strings, self._detokenize)
        ended = stopped | self._slots.used_up()
        due = ended | (self._slots.num_held_back() >= self._chunk_tokens)
        if not due.any():
            return chunks
        for slot in np.flatnonzero(due).tolist():
            finish: Finish = "" if not ended[slot] else "stop" if stopped[slot] else "length"
            chunk = self._hand_out(slot, finish)
            chunks.append(chunk)
            if finish:
                self._stats.num_finished += 1
                self._end(chunk.key)
        self._free(np.flatnonzero(ended))
        return chunks

    def _hand_out(self, slot: int, finish: Finish, refusal: str = "") -> Chunk:
        origin = self._open[self._slots.key(slot)].origin
        return self._slots.hand_out(slot, self._version, finish, origin, refusal)

    def _end(self, key: int) -> None:
        self._num_open -= 1
        self._open[key].num_open -= 1
        if self._open[key].num_open == 0:
            del self._open[key]

    def _free(self, slots: np.ndarray) -> np.ndarray:
        """`slots`: int64 [n], ascending. Returns the pages that are free now."""
        pages = [self._slots.pages(slot) for slot in slots.tolist()]
        self._slots.free(slots)
        return self._scheduler.give_back(np.concatenate(pages)) if pages else np.zeros(0, np.int64)

    def _turn_away(self, request: Request) -> None:
        why = f"queue full: {self.num_waiting} responses wait, and max_waiting is {self._max_waiting}; ask again later"
        self._stats.refused["queue full"] += len(request.members)
        none = np.zeros(0, np.int32), np.zeros(0, np.float32)
        for member in request.members:
            self._outbox.append(
                Chunk(key=request.key, member=member, version=self._version, tokens=none[0], logprobs=none[1],
                      finish="refused", refusal=why)
            )  # fmt: skip

    def _refuse(self, bad: np.ndarray) -> np.ndarray:
        """Ends the responses `bad` (bool [num_live]). Returns which slot each of the others was in, int64 [n]."""
        if bad.all() and len(bad) > 1:
            self._start_again()
            raise FloatingPointError(f"policy version {self._version} gives log-probabilities that are not finite")
        why = f"nan logits: policy version {self._version} gives log-probabilities that are not finite"
        slots = np.flatnonzero(bad)
        for slot in slots.tolist():
            chunk = self._hand_out(slot, "refused", why)
            self._outbox.append(chunk)
            self._stats.refused["nan logits"] += 1
            self._end(chunk.key)
        kept = self._slots.after_free(slots)
        # Numbers that are not finite would spoil whoever gets these pages next, even where they are masked.
        freed = [self._free(slots), self._scheduler.forget_computed()]
        self._runner.clear_pages(np.concatenate(freed))
        return kept

    def _preempt(self, slot: int) -> None:
        """Puts a live response back to the head of the queue, to go on after its tokens when there is room."""
        if self._slots.num_held_back()[slot]:
            self._outbox.append(self._hand_out(slot, ""))
        key, member, tokens = self._slots.response(slot)
        request = replace(self._open[key].request, members=[member], prefixes=[tokens])
        self._scheduler.waiting.extendleft(sequences(request))
        self._free(np.array([slot]))

    def _start_again(self) -> None:
        """Puts all live responses back into the queue, to go on over a clean cache."""
        while self._slots.num_live:
            self._preempt(self._slots.newest())
        self._scheduler.forget_computed()
        self._runner.clear_pages(np.arange(self._runner.num_pages))
