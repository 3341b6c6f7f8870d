"""Between the engine, which decides what runs, and the model, which computes it: one forward pass at a time.

    Engine --Batch: some tokens of each of many sequences--> Runner --Forward: logits, expert choices--> Engine

A batch is plain numpy, so that a runner over several ranks can hand it to each of them. Keys and values live in pages
that the runner keeps and the engine counts: page p of a sequence holds its positions p * page_tokens and on. Knows
nothing of requests, sampling or versions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ..model.config import ModelConfig

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(slots=True)
class Batch:
    """One forward pass over the next tokens of S sequences, T in all, laid end to end.

    The first `num_decode` sequences have one token each; those after them any number (a prompt, or a chunk of one).
    """

    tokens: np.ndarray
    """int64 [T]"""
    positions: np.ndarray
    """int64 [T]: of each token in its sequence, ascending by one inside it"""
    counts: np.ndarray
    """int64 [S]: tokens of each sequence, at least 1; of sum T"""
    tables: np.ndarray
    """int32 [S, P]: the pages of each sequence, in order, as many as its positions up to here need; then anything"""
    num_decode: int
    wanted: np.ndarray
    """int64 [n], ascending: the sequences after whose last token logits are wanted"""

    @property
    def lasts(self) -> np.ndarray:
        """Where in `tokens` the last token of each wanted sequence is, int64 [n]."""
        return np.asarray((np.cumsum(self.counts) - 1)[self.wanted])


@dataclass(slots=True)
class Forward:
    """What a pass gave."""

    logits: Tensor
    """float32 [n, V], of the wanted sequences"""
    routes: np.ndarray | None = None
    """[T, L, K], uint8 or uint16: the experts of each token, layer and choice; None where nobody asked"""


class Runner(Protocol):
    """Computes batches with the newest weights it was given. All but `prepare` are called by one thread."""

    @property
    def config(self) -> ModelConfig: ...

    @property
    def num_pages(self) -> int: ...

    @property
    def page_tokens(self) -> int: ...

    @property
    def mixes(self) -> bool:
        """Whether a batch may hold decode tokens (the first `num_decode` sequences) and others; else all or none."""

    def prepare(self, tensors: Mapping[str, np.ndarray]) -> Any:
        """Brings weights, by Hugging Face name, into the form that `load` takes at once. From any thread; may be slow.

        Raises ValueError for names or shapes of another model, FloatingPointError for numbers that are not finite.
        """

    def load(self, weights: Any) -> Any:
        """Takes what `prepare` gave, in no time; pages stay as they are. Returns what it had: giving back the memory of
        a large model takes tens of milliseconds, and the caller's thread may have better things to do."""

    def run(self, batch: Batch) -> Forward:
        """Computes the tokens, and keeps their keys and values in the pages of their sequences."""

    def copy_pages(self, sources: np.ndarray, targets: np.ndarray) -> None:
        """Copies pages `sources` (int64 [n]) to `targets`."""

    def clear_pages(self, pages: np.ndarray) -> None:
        """Zeroes pages (int64 [n]) in which numbers that are not finite may stand."""
