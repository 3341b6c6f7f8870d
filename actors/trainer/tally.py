"""Metrics of one step, by the names of actors/report.py. Knows nothing of how a step works."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from ..algorithms.groups import judged
from ..types import Group

_MIN_VARIANCE = 1e-12


class Tally:
    """Begins when a step begins, is told of its micro-batches and updates, and ends with `metrics`."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._num_tokens = 0
        self._num_inputs = 0
        self._sums: dict[str, float] = defaultdict(float)
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
                self._sums[name] += float(value.detach())

    def add_update(self, grad_norm: float) -> None:
        self._norms.append(grad_norm)

    def add_skipped(self) -> None:
        """An update was not made, for its gradient was not finite."""
        self._num_skipped += 1

    def metrics(self, *, learning_rate: float) -> dict[str, float]:
        """What a step of the policy came to. There was at least one micro-batch."""
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

    def critic_metrics(self, *, learning_rate: float) -> dict[str, float]:
        """What a step of the critic came to: its fit, from the sums that value_learner.py watches."""
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
