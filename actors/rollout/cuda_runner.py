"""A runner that keeps tokens on the device: a decode step is one graph, from the last tokens to the next ones.

    host:    launch n+1 (rows, positions, pages, random numbers; one copy)      read n (one copy, waited for by event)
    device:  [tokens of n]--> newest [rows] --model, sampling: captured--> newest [rows], tokens, log-probs of n+1

What a step needs beside tokens is known before it has run, so nothing waits for a token to travel. Steps are captured
per bucket: of rows, of pages of the longest row, and whether anybody truncates; rows that pad have a page and a row of
their own. New weights are copied over the old ones, at whose addresses all graphs read: a copy inside the device takes
about as long as a step, whose weights are read once, and another capture of every bucket would take seconds. Knows
nothing of requests or versions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..model.block import Attend, LayerWeights
from ..model.config import ModelConfig
from ..model.decode import DecoderWeights, forward, logits
from ..model.static_decode import static_attend
from .graphs import Capture, buckets
from .runner import Batch, Forward
from .sampling import sample_unseen
from .single import SingleRunner

MULTIPLE = 8
"""Of which widths are on a GPU: torch's grouped product wants rows of 16 bytes."""


@dataclass(slots=True)
class Draws:
    """What n responses draw their next tokens with, [n] each: as stored, as 8 bytes each."""

    rows: np.ndarray
    """int64, each once: where its newest token is kept"""
    positions: np.ndarray
    """int64: of that token"""
    uniforms: np.ndarray
    """float64"""
    temperatures: np.ndarray
    """float64, of float32 numbers, as are those below"""
    top_k: np.ndarray
    """int64"""
    top_p: np.ndarray
    min_p: np.ndarray

    def pack(self, into: np.ndarray) -> None:
        """To int64 [n, WIDTH]."""
        for column, name in enumerate(_NAMES):
            into[:, column] = getattr(self, name).view(np.int64)

    @property
    def truncated(self) -> bool:
        """Whether any has fewer than all tokens to draw from."""
        return bool(self.top_k.any() or (self.top_p < 1).any() or self.min_p.any())


_NAMES = tuple(field.name for field in fields(Draws))
WIDTH = len(_NAMES)


@dataclass(slots=True)
class _Step:
    """A captured step: what it reads and writes."""

    inputs: Tensor
    """int64 [B, WIDTH + P]: Draws, then pages"""
    tokens: Tensor
    """int64 [B]"""
    logprobs: Tensor
    """float32 [B]"""
    play: Callable[[], None]


class _Places:
    """Memory of the host for one launch: what goes to the device and what comes back."""

    def __init__(self, capture: Capture, num_rows: int, width: int) -> None:
        self.there = capture.host(2 * num_rows * width, torch.int64)
        self.tokens = capture.host(num_rows, torch.int64)
        self.logprobs = capture.host(num_rows, torch.float32)
        self.wait: Callable[[], None] = lambda: None


class Pending:
    """Tokens and log-probabilities on their way to the host."""

    def __init__(self, places: _Places, count: int) -> None:
        self._places, self._count = places, count

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """int64 [n] and float32 [n], once they have come. Only until two more launches."""
        self._places.wait()
        tokens, logprobs = self._places.tokens[: self._count], self._places.logprobs[: self._count]
        return tokens.numpy().copy(), logprobs.numpy().copy()


class GraphRunner(SingleRunner):
    """See runner.Runner. `launch` decodes; `run` computes prompts, and whatever else, without a graph.

    `num_rows`: responses at once; `max_pages`: of one. Raises ValueError for a model whose widths a GPU can't take.
    """

    mixes = False

    def __init__(
        self,
        config: ModelConfig,
        *,
        num_pages: int,
        page_tokens: int,
        num_rows: int,
        max_pages: int,
        capture: Capture,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        if capture.device.type == "cuda" and (config.hidden_size % MULTIPLE or config.moe_intermediate_size % MULTIPLE):
            raise ValueError(
                f"on a GPU hidden_size and moe_intermediate_size are multiples of {MULTIPLE}, got {config.hidden_size} "
                f"and {config.moe_intermediate_size}; pad the model"
            )
        super().__init__(
            config, num_pages=num_pages + 1, page_tokens=page_tokens, device=capture.device, dtype=dtype
        )  # fmt: skip
        self.num_pages = num_pages  # Rows that pad have the last one.
        self._dtype = dtype
        self._capture = capture
        self._num_rows = num_rows
        self._row_buckets, self._page_buckets = buckets(num_rows), buckets(max_pages)
        self._steps: dict[tuple[int, int, bool], _Step] = {}
        self._newest = torch.zeros(num_rows + 1, dtype=torch.int64, device=capture.device)
        self._places = [_Places(capture, num_rows, WIDTH + max_pages) for _ in range(2)]
        self._padding = np.zeros(WIDTH, np.int64)
        one = np.ones(1)
        Draws(np.array([num_rows]), np.zeros(1, np.int64), one / 2, one, np.zeros(1, np.int64), one, 0 * one).pack(
            self._padding[None]
        )

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def num_captured(self) -> int:
        """Steps that have been captured."""
        return len(self._steps)

    # Weights ------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def prepare(self, tensors: Mapping[str, np.ndarray]) -> DecoderWeights:
        with self._capture.aside():
            full = super().prepare(tensors)
            layers = tuple(LayerWeights(*(self._held(name, w) for name, w in w._asdict().items())) for w in full.layers)
            return DecoderWeights(layers, full.embed.to(self._dtype), full.head.to(self._dtype))

    def _held(self, name: str, weight: Any) -> Tensor:
        held: Tensor = weight if name == "qk_norm" else weight.to(self._dtype)  # Rotations are in float32.
        return held

    @torch.inference_mode()
    def load(self, weights: DecoderWeights) -> Any:
        """Copies them, in the order of what was launched, over those that there are. Returns them: a copy is left."""
        if not hasattr(self, "_weights"):
            self._weights = weights
            return None
        for held, new in zip(_tensors(self._weights), _tensors(weights), strict=True):
            held.copy_(new, non_blocking=True)
            if new.is_cuda:
                new.record_stream(torch.cuda.current_stream(new.device))
        return weights

    # Passes without a graph ---------------------------------------------------------------------------------

    @torch.inference_mode()
    def run(self, batch: Batch) -> Forward:
        attend = self._attend(self._cache.attend(batch.positions, batch.counts, batch.tables, 0))
        tokens = torch.from_numpy(batch.tokens).to(self._device)
        turn = self._rotations[torch.from_numpy(batch.positions).to(self._device)].unsqueeze(1)
        x, _ = forward(self.config, self._weights, tokens, turn, attend)
        x = x[torch.from_numpy(batch.lasts).to(self._device)]
        return Forward(logits(self.config, self._weights, x).float())

    def _attend(self, attend: Attend) -> Attend:
        def typed(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attend(layer, q.to(self._dtype), k.to(self._dtype), v)

        return typed

    # Steps --------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def launch(self, draws: Draws, tables: np.ndarray, firsts: Tensor | None) -> Pending:
        """One token more for each of n responses: those of `tables`, int32 [m, P], go on after their newest token;
        the first of the n - m others is drawn from `firsts`, float32 [n - m, V]. Does not wait for the device."""
        places = self._places[0]
        self._places.reverse()
        places.wait()  # Long done, unless nobody has read it.
        num, total = len(tables), len(draws.rows)
        packed = np.empty((total, WIDTH), np.int64)
        draws.pack(packed)
        used = 0
        if num:
            step = self._step(num, int(draws.positions[:num].max()) // self.page_tokens + 1, draws.truncated)
            used = step.inputs.numel()
            there = places.there[:used].view(step.inputs.shape)
            self._fill(there.numpy(), packed[:num], tables)
            step.inputs.copy_(there, non_blocking=True)
            step.play()
            places.tokens[:num].copy_(step.tokens[:num], non_blocking=True)
            places.logprobs[:num].copy_(step.logprobs[:num], non_blocking=True)
        if firsts is not None:
            there = places.there[used : used + (total - num) * WIDTH].view(total - num, WIDTH)
            there.numpy()[:] = packed[num:]
            inputs = there.to(self._device, non_blocking=True)
            tokens, logprobs = _drawn(firsts, inputs, draws.truncated)
            self._newest.index_copy_(0, inputs[:, 0], tokens)
            places.tokens[num:total].copy_(tokens, non_blocking=True)
            places.logprobs[num:total].copy_(logprobs, non_blocking=True)
        places.wait = self._capture.mark()
        return Pending(places, total)

    def _fill(self, there: np.ndarray, packed: np.ndarray, tables: np.ndarray) -> None:
        num, width = len(packed), min(tables.shape[1], there.shape[1] - WIDTH)
        there[:num, :WIDTH] = packed
        there[num:, :WIDTH] = self._padding
        there[:, WIDTH:] = self.num_pages
        there[:num, WIDTH : WIDTH + width] = tables[:, :width]

    def _step(self, num: int, width: int, truncated: bool) -> _Step:
        rows = next(size for size in self._row_buckets if size >= num)
        pages = next(size for size in self._page_buckets if size >= width)
        key = rows, pages, truncated
        if key not in self._steps:
            self._steps[key] = self._captured(*key)
        return self._steps[key]

    def _captured(self, rows: int, pages: int, truncated: bool) -> _Step:
        device = self._device
        idle = np.empty((rows, WIDTH + pages), np.int64)
        self._fill(idle, np.empty((0, WIDTH), np.int64), np.empty((0, 0), np.int32))
        inputs = torch.from_numpy(idle).to(device)  # While it is captured, only rows that pad are computed.
        step = _Step(
            inputs=inputs,
            tokens=torch.zeros(rows, dtype=torch.int64, device=device),
            logprobs=torch.zeros(rows, device=device),
            play=lambda: None,
        )
        step.play = self._capture.capture(lambda: self._decode(step, truncated))
        return step

    def _decode(self, step: _Step, truncated: bool) -> None:
        rows, positions, pages = step.inputs[:, 0], step.inputs[:, 1], step.inputs[:, WIDTH:]
        attend = static_attend(self._cache, positions, pages)
        turn = self._rotations[positions].unsqueeze(1)
        x, _ = forward(self.config, self._weights, self._newest[rows], turn, attend)
        tokens, logprobs = _drawn(logits(self.config, self._weights, x).float(), step.inputs, truncated)
        self._newest.index_copy_(0, rows, tokens)
        step.tokens.copy_(tokens)
        step.logprobs.copy_(logprobs)


def _drawn(logits: Tensor, inputs: Tensor, truncated: bool) -> tuple[Tensor, Tensor]:
    """`inputs`: int64 [n, at least WIDTH], see Draws."""
    uniforms, temperatures, top_p, min_p = (inputs[:, column].view(torch.float64) for column in (2, 3, 5, 6))
    truncation = {"top_k": inputs[:, 4], "top_p": top_p.float(), "min_p": min_p.float()} if truncated else {}
    return sample_unseen(logits, temperatures.float(), uniforms, **truncation)


def _tensors(weights: DecoderWeights) -> list[Tensor]:
    layers = [tensor for layer in weights.layers for tensor in layer if isinstance(tensor, Tensor)]
    return [*layers, weights.embed, weights.head]
