"""The critic's side of training: a step of regression at a time, deterministic, resumable to the bit.

    groups --values--> a number per token        state() -> load_state(): goes on as if it had not stopped
    update --step----> metrics

The model is the policy's with one output in the place of the vocabulary's. Knows nothing of actors or files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..algorithms.losses import value_loss
from ..algorithms.updates import ValueUpdate
from ..model.config import ModelConfig
from ..model.qwen3_moe import Qwen3Moe
from ..types import Group
from .batch import MicroBatch, Totals, check_lengths, collate, rated
from .optim import Schedule
from .packing import pack
from .ranks import ALONE, Ranks
from .settings import CriticSettings
from .tally import Tally
from .updater import Updater, load_weights

HEAD = "lm_head.weight"


class ValueLearner:
    """The critic and its optimizer. It begins as `policy`, its weights by name, and says zero of every state."""

    def __init__(
        self,
        config: ModelConfig,
        settings: CriticSettings,
        policy: Mapping[str, np.ndarray],
        *,
        ranks: Ranks = ALONE,
    ) -> None:
        """`ranks`: the learners of other processes that are shown the same, and do a part of it."""
        self._config = config
        self._settings = settings
        model = Qwen3Moe(config, num_outputs=1)
        load_weights(model, {**policy, HEAD: np.zeros((1, config.hidden_size), np.float32)})
        self._updater = Updater(model, settings, Schedule(0, settings.warmup_steps, 0.0, 1.0), ranks)

    @property
    def step(self) -> int:
        """Steps done."""
        return self._updater.step

    @torch.no_grad()
    def values(self, groups: Sequence[Group]) -> list[np.ndarray]:
        """For each judged response float32 [n]: the value of the state before each token.

        Raises ValueError if a sample is longer than the model's positions.
        """
        check_lengths(groups, self._config.max_positions)
        model = self._updater.model
        samples = [s for group in rated(groups) for s in group]
        result = [np.zeros(0, np.float32)] * len(samples)
        for part in pack([s.num_inputs for s in samples], self._settings.micro_batch_tokens):
            batch = collate([samples[i] for i in part])
            out = model(batch.tokens, batch.positions, batch.lengths)
            values = model.logits(out.hidden[batch.rows]).squeeze(1)
            for i, row in zip(part, values.split(batch.sizes), strict=True):
                result[i] = row.numpy().copy()
        return result

    def update(self, update: ValueUpdate) -> dict[str, float]:
        """One step: splits the groups, in their order, into mini-batches and updates on each.

        Returns metrics by the names of actors/report.py; those of the fit are of before each update. Raises ValueError,
        with nothing changed, if a sample is longer than the model's positions, and FloatingPointError: see
        Updater.update.
        """
        check_lengths(update.groups, self._config.max_positions)
        tally = Tally(self._updater.ranks)
        groups = rated(update.groups, update.returns)
        for part in np.array_split(np.arange(len(groups)), self._settings.mini_batches):
            if mini_batch := [sample for index in part for sample in groups[index]]:
                self._updater.update(mini_batch, _regression, tally)
        learning_rate = self._updater.learning_rate
        self._updater.step += 1
        return tally.critic_metrics(learning_rate=learning_rate)

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Everything that the next step depends on: arrays (copies) and plain values."""
        return self._updater.state()

    def load_state(self, arrays: Mapping[str, np.ndarray], info: Mapping[str, Any]) -> None:
        """Takes what `state` gave, and goes on from there. Raises ValueError if it is of another model or optimizer."""
        self._updater.load_state(arrays, info)


def _regression(outputs: Tensor, batch: MicroBatch, totals: Totals) -> tuple[Tensor, dict[str, Tensor]]:
    values, returns = outputs.squeeze(1), batch.target
    loss = value_loss(values, returns, num_tokens=totals.tokens)
    left = (returns - values).detach().double()
    target = returns.double()
    return loss, {
        "value": values.detach().double().sum(),
        "left": left.sum(),
        "left_squared": left.square().sum(),
        "return": target.sum(),
        "return_squared": target.square().sum(),
    }
