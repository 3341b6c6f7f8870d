"""Generates responses with continuous batching: every step adds one token to each live response.

    submit -> waiting -> prefilled, in a spare slot -> live, in a slot of its own -> ended: its last Chunk
                                                        |  flush: hands out what there is
                                                        |  load: new weights, the cache stays
                                                        '- cancel

A prompt is prefilled once, with others that wait, and copied to the members of its group as they get slots. Random
numbers are counter-based: a response depends on the weights, the seed, its prompt's ordinal, its member index and the
position, and not on what it is batched with, beyond rounding of the logits. Knows nothing of tokenizers, rewards,
actors or where weights come from. Not thread-safe: one thread drives it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..model.config import ModelConfig
from ..model.decode import Decoder, KvCache, fuse_weights
from ..philox import Stream, uniforms
from ..types import Finish
from .requests import Chunk, Request, check_request
from .sampling import sample
from .slots import Slots

NUM_SPARE_SLOTS = 8
"""Sequences that are prefilled together, ahead of need: a small prefill alone costs as much as a step."""


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


@dataclass(slots=True)
class _Prefilled:
    slot: int
    logits: Tensor
    """[V], after the last token of the sequence"""
    uniforms: np.ndarray
    """float64 [members, max_new_tokens]"""


@dataclass(slots=True)
class _Waiting:
    """A sequence and the members that wait to go on after it."""

    request: Request
    indices: list[int]
    """Of the members, into the lists of `request`."""
    tokens: np.ndarray
    """int32 [n]: the prompt and, if they have one, their prefix"""
    num_admitted: int = 0
    prefilled: _Prefilled | None = None

    @property
    def num_members(self) -> int:
        return len(self.indices) - self.num_admitted


class Engine:
    """See the module. Weights, here and in `load`, are fp32, by Hugging Face name, and of policy version `version`."""

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
    ) -> None:
        _check_finite(weights, version)
        self._config = config
        self._decoder = Decoder(config, weights)
        self._version = version
        self._max_prompt_tokens = max_prompt_tokens
        self._max_new_tokens = max_new_tokens
        self._eos_id = eos_id
        self._seed = seed
        self._chunk_tokens = chunk_tokens
        self._slots = Slots(num_slots=num_slots, max_new_tokens=max_new_tokens)
        self._spare_slots = range(num_slots, num_slots + NUM_SPARE_SLOTS)
        max_len = max_prompt_tokens + max_new_tokens
        self._cache = KvCache(config, num_slots=num_slots + NUM_SPARE_SLOTS, max_len=max_len)
        self._waiting: deque[_Waiting] = deque()
        self._open: dict[int, _Open] = {}
        self._outbox: list[Chunk] = []
        """What earlier versions left to be handed out."""
        self._stats = EngineStats()

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
        """Responses that wait for a slot. The queue has no bound of its own: whoever submits looks here."""
        return sum(waiting.num_members for waiting in self._waiting)

    @property
    def stats(self) -> EngineStats:
        return self._stats

    def check(self, request: Request) -> None:
        """Raises ValueError if `request` can't be generated as it is: see `check_request`."""
        check_request(
            request,
            vocab_size=self._config.vocab_size,
            max_prompt_tokens=self._max_prompt_tokens,
            max_new_tokens=self._max_new_tokens,
            eos_id=self._eos_id,
        )

    def submit(self, request: Request) -> None:
        """Queues a request. Raises ValueError, and changes nothing, if it can't be generated or its key is in use."""
        self.check(request)
        if request.key in self._open:
            raise ValueError(f"request key {request.key} is in use; wait for its responses, or cancel it")
        self._open[request.key] = _Open(request, len(request.members))
        self._waiting += _sequences(request)

    def cancel(self, key: int) -> None:
        """Forgets a request and all of it that was not handed out. A key that is not in use is fine."""
        cancelled = self._open.pop(key, None)
        if cancelled is None:
            return
        self._stats.num_cancelled += cancelled.num_open
        self._waiting = deque(waiting for waiting in self._waiting if waiting.request.key != key)
        self._outbox = [chunk for chunk in self._outbox if chunk.key != key]
        self._free(self._slots.of(key))

    def flush(self) -> list[Chunk]:
        """Hands out all tokens that were not handed out yet. Generation goes on after them."""
        chunks, self._outbox = self._outbox, []
        for slot in np.flatnonzero(self._slots.num_held_back()).tolist():
            chunks.append(self._slots.hand_out(slot, self._version, ""))
        return chunks

    def prepare(self, version: int, weights: Mapping[str, np.ndarray]) -> Prepared:
        """Brings weights into the form that `load` takes at once. From any thread, while another one steps.

        Raises FloatingPointError for weights that are not finite, ValueError for those of another model.
        """
        _check_finite(weights, version)
        return Prepared(version, fuse_weights(self._config, weights))

    def load(self, prepared: Prepared) -> None:
        """Swaps the weights, in no time: later tokens are of its version. Live responses go on over their old keys and
        values."""
        self._decoder.weights = prepared.weights
        self._outbox = self.flush()
        self._version = prepared.version
        self._forget_prefilled()

    @torch.inference_mode()
    def step(self) -> list[Chunk]:
        """Adds a token to every live response, admits waiting ones with their first, and returns what is due.

        Due are responses that ended, responses with `chunk_tokens` more tokens, and what an earlier version left.
        Raises FloatingPointError if log-probabilities are not finite: no response has changed then, and all are
        computed anew, from their tokens so far, at the next step.
        """
        logits = self._decode()
        if admitted := self._admit():
            logits = torch.cat([logits, *admitted])
        if len(logits) == 0:
            return self.flush()
        temperatures, randoms = self._slots.randomness()
        drawn, drawn_logprobs = sample(logits, torch.from_numpy(temperatures), torch.from_numpy(randoms))
        tokens, logprobs = drawn.numpy(), drawn_logprobs.numpy()
        if not np.isfinite(logprobs).all():
            self._start_again()
            raise FloatingPointError(f"policy version {self._version} gives log-probabilities that are not finite")
        self._slots.append(tokens, logprobs)
        self._stats.num_steps += 1
        self._stats.num_generated_tokens += len(tokens)
        return self._settle(stopped=tokens == self._eos_id)

    def _decode(self) -> Tensor:
        """Feeds the newest tokens of all live responses; logits [num_live, V]."""
        if self._slots.num_live == 0:
            return torch.empty(0, self._config.vocab_size)
        tokens, positions = self._slots.feed()
        return self._decoder.step(self._cache, torch.from_numpy(tokens), torch.from_numpy(positions))

    def _admit(self) -> list[Tensor]:
        """Gives free slots to those who wait, in order; the logits of their next tokens, [n, V] in all."""
        logits = []
        while self._waiting and self._slots.num_free:
            waiting = self._waiting[0]
            prefilled = waiting.prefilled or self._prefill()
            first = waiting.num_admitted
            waiting.num_admitted += min(waiting.num_members, self._slots.num_free)
            taken = slice(first, waiting.num_admitted)
            slots = self._slots.occupy(waiting.request, waiting.indices[taken], prefilled.uniforms[taken])
            self._cache.copy(prefilled.slot, slots, len(waiting.tokens))
            logits.append(prefilled.logits.expand(slots.stop - slots.start, -1))
            if waiting.num_members == 0:
                self._waiting.popleft()
        return logits

    def _prefill(self) -> _Prefilled:
        """Computes the sequences at the head of the queue, of which none is prefilled. Returns the first."""
        batch = list(islice(self._waiting, NUM_SPARE_SLOTS))
        slots = self._spare_slots[: len(batch)]
        tokens = torch.from_numpy(np.concatenate([waiting.tokens for waiting in batch]).astype(np.int64))
        lengths = [len(waiting.tokens) for waiting in batch]
        logits = self._decoder.prefill(self._cache, tokens, lengths, torch.tensor(slots))
        self._stats.num_prefilled_tokens += len(tokens)

        members = [waiting.request.members[index] for waiting in batch for index in waiting.indices]
        ordinals = [waiting.request.ordinal for waiting in batch for _ in waiting.indices]
        count = max(waiting.request.max_new_tokens for waiting in batch)
        drawn = uniforms(self._seed, Stream.SAMPLING, np.array(ordinals), np.array(members), count)
        ends = np.cumsum([len(waiting.indices) for waiting in batch])
        for waiting, slot, row, randoms in zip(batch, slots, logits, np.split(drawn, ends[:-1]), strict=True):
            waiting.prefilled = _Prefilled(slot, row, randoms)
        assert batch[0].prefilled is not None
        return batch[0].prefilled

    def _settle(self, stopped: np.ndarray) -> list[Chunk]:
        """Hands out what is due after a step and frees the slots of what ended. `stopped`: bool [num_live]."""
        chunks, self._outbox = self._outbox, []
        ended = stopped | self._slots.used_up()
        due = ended | (self._slots.num_held_back() >= self._chunk_tokens)
        if not due.any():
            return chunks
        for slot in np.flatnonzero(due).tolist():
            finish: Finish = "" if not ended[slot] else "stop" if stopped[slot] else "length"
            chunk = self._slots.hand_out(slot, self._version, finish)
            chunks.append(chunk)
            if finish:
                self._end(chunk.key)
        self._free(np.flatnonzero(ended))
        return chunks

    def _end(self, key: int) -> None:
        self._stats.num_finished += 1
        self._open[key].num_open -= 1
        if self._open[key].num_open == 0:
            del self._open[key]

    def _free(self, slots: np.ndarray) -> None:
        """`slots`: int64 [n], ascending."""
        for source, target in self._slots.free(slots):
            self._cache.copy(source, slice(target, target + 1), self._slots.num_cached(target))

    def _forget_prefilled(self) -> None:
        for waiting in self._waiting:
            waiting.prefilled = None

    def _start_again(self) -> None:
        """Puts all live responses back at the head of the queue, to go on after their tokens over a clean cache."""
        self._outbox = self.flush()
        self._forget_prefilled()
        live = [self._slots.response(slot) for slot in range(self._slots.num_live)]
        for key, member, tokens in reversed(live):
            request = replace(self._open[key].request, members=[member], prefixes=[tokens])
            self._waiting.extendleft(_sequences(request))
        self._slots.free(np.arange(len(live)))
        self._cache.data.zero_()


def _sequences(request: Request) -> list[_Waiting]:
    """One for all members that have written nothing, then one for each of the others."""
    prompt, prefixes = request.prompt, request.prefixes or [request.prompt[:0]] * len(request.members)
    fresh = [index for index, prefix in enumerate(prefixes) if len(prefix) == 0]
    return ([_Waiting(request, fresh, prompt)] if fresh else []) + [
        _Waiting(request, [index], np.concatenate([prompt, prefix]))
        for index, prefix in enumerate(prefixes)
        if len(prefix)
    ]


def _check_finite(weights: Mapping[str, np.ndarray], version: int) -> None:
    for name, tensor in weights.items():
        if not np.isfinite(tensor).all():
            raise FloatingPointError(f"{name} of policy version {version} is not finite; these weights are refused")
