"""Metrics of one step, by the names of actors/report.py. Knows nothing of how a step works."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..algorithms.groups import judged
from ..types import Group
from .ranks import ALONE, Ranks

_MIN_VARIANCE = 1e-12
_TEXT_BYTES = 4096
"""Room for the names of what is watched."""


class Tally:
    """Begins when a step begins, is told of its micro-batches and updates, and ends with `metrics`."""

    def __init__(self, ranks: Ranks = ALONE) -> None:
        """`ranks`: who else works on the step, and has a tally of its own part."""
        self._ranks = ranks
        self._began = time.perf_counter()
        self._num_tokens = 0
        self._num_inputs = 0
        self._sums: dict[str, float] = {}
        self._maxima: dict[str, float] = {}
        self._aux_sum = 0.0
        self._norms: list[float] = []
        self._num_skipped = 0
        self._load: Tensor | None = None

    def add_micro_batch(
        self, *, num_tokens: int, num_inputs: int, aux_loss: Tensor, load: Tensor, watched: dict[str, Tensor]
    ) -> None:
        """`watched` are sums over the response tokens; names that end in `_max` are maxima. `load` is [layers, E]."""
        self._num_tokens += num_tokens
        self._num_inputs += num_inputs
        self._aux_sum += num_inputs * float(aux_loss.detach())
        self._load = load if self._load is None else self._load + load
        for name, value in watched.items():
            if name.endswith("_max"):
                self._maxima[name] = max(float(value), self._maxima.get(name, -np.inf))
            else:
                self._sums[name] = self._sums.get(name, 0.0) + float(value.detach())

    def add_update(self, grad_norm: float) -> None:
        self._norms.append(grad_norm)

    def add_skipped(self) -> None:
        """An update was not made, for its gradient was not finite."""
        self._num_skipped += 1

    def metrics(self, *, learning_rate: float) -> dict[str, float]:
        """What a step of the policy came to, on all ranks together. There was at least one micro-batch."""
        self._merge()
        assert self._load is not None
        train_s = time.perf_counter() - self._began
        load = self._load.double()
        return {
            **{name: value / self._num_tokens for name, value in self._sums.items()},
            **self._maxima,
            "aux_loss": self._aux_sum / self._num_inputs,
            **({"grad_norm": float(np.mean(self._norms))} if self._norms else {}),
            "learning_rate": learning_rate,
            "skipped_updates": self._num_skipped,
            "trained_tokens": self._num_tokens,
            "trained_tokens_per_s": self._num_tokens / train_s,
            "train_s": train_s,
            "expert_load": float((load.amax(1) / load.mean(1)).max()),
        }

    @property
    def load(self) -> np.ndarray:
        """(token, choice) pairs of each expert, int64 [layers, E]: of all ranks, once `metrics` was asked for."""
        assert self._load is not None
        return self._load.numpy().astype(np.int64)

    def critic_metrics(self, *, learning_rate: float) -> dict[str, float]:
        """What a step of the critic came to: its fit, from the sums that value_learner.py watches."""
        self._merge()
        mean = {name: value / self._num_tokens for name, value in self._sums.items()}
        variance = mean["return_squared"] - mean["return"] ** 2
        left = mean["left_squared"] - mean["left"] ** 2
        return {
            "value_loss": mean["loss"],
            "value_mean": mean["value"],
            "return_mean": mean["return"],
            "explained_variance": 1 - left / variance if variance > _MIN_VARIANCE else 0.0,
            **({"critic_grad_norm": float(np.mean(self._norms))} if self._norms else {}),
            "critic_learning_rate": learning_rate,
            "critic_skipped_updates": self._num_skipped,
            "critic_train_s": time.perf_counter() - self._began,
        }

    def _merge(self) -> None:
        """Adds what the other ranks have counted; one that had no samples learns from them what was counted."""
        if self._ranks.size == 1:
            return
        shape = [] if self._load is None else list(self._load.shape)
        text = json.dumps([sorted(self._sums), sorted(self._maxima), shape]).encode() if shape else b""
        padded = np.frombuffer(text.ljust(_TEXT_BYTES, b"\0"), np.uint8)
        agreed = self._ranks.max(padded).astype(np.uint8).tobytes().rstrip(b"\0")
        names, maxima, shape = json.loads(agreed)
        load = np.zeros(shape) if self._load is None else self._load.double().numpy()
        counts = [self._num_tokens, self._num_inputs, self._aux_sum, *(self._sums.get(name, 0.0) for name in names)]
        total = self._ranks.sum(np.concatenate([counts, load.reshape(-1)]))
        largest = self._ranks.max(np.array([self._maxima.get(name, -np.inf) for name in maxima]))
        self._num_tokens, self._num_inputs, self._aux_sum = int(total[0]), int(total[1]), float(total[2])
        self._sums = dict(zip(names, total[3:].tolist(), strict=False))
        self._maxima = dict(zip(maxima, largest.tolist(), strict=True))
        self._load = torch.from_numpy(total[3 + len(names) :].reshape(shape))


def describe(groups: Sequence[Group]) -> dict[str, float]:
    """Metrics of the responses that take part in a step, whatever the step does with them."""
    trained = [(group, t) for group in groups for t in judged(group)]
    sizes = [t.num_tokens for _, t in trained]
    return {
        "reward_mean": float(np.mean([t.reward for _, t in trained])),
        "truncated_ratio": float(np.mean([t.finish == "length" for _, t in trained])),
        "response_tokens_mean": float(np.mean(sizes)),
        "response_tokens_max": max(sizes),
        "groups": len(groups),
        "responses": len(trained),
        "prompt_size_mean": float(np.mean([group.prompt.size for group, _ in trained])),
    }
