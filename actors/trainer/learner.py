"""The policy's side of training: a step of imitation (SFT) or of RL at a time, deterministic, resumable to the bit.

    examples --sft_step--> metrics        state() -> load_state(): goes on as if it had not stopped
    update ----rl_step---> metrics        weights(): what is published

Knows nothing of algorithms (what a token is worth comes with the update), of actors, pools, versions or files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..algorithms.losses import imitation_loss, own_loss, policy_loss
from ..algorithms.updates import Objective, PolicyUpdate
from ..model.config import ModelConfig
from ..model.qwen3_moe import Qwen3Moe
from .batch import MicroBatch, Totals, check_lengths, imitated, rated
from .optim import Schedule
from .ranks import ALONE, Ranks
from .settings import RlSettings, SftSettings
from .tally import Tally, describe
from .updater import Updater, load_weights

Stage = Literal["sft", "rl"]


class Learner:
    """The policy and its optimizer. RL begins with a fresh optimizer; each stage counts its own steps."""

    def __init__(
        self, config: ModelConfig, sft: SftSettings, rl: RlSettings, *, seed: int, ranks: Ranks = ALONE
    ) -> None:
        """`ranks`: the learners of other processes that are shown the same, and do a part of it."""
        self._config = config
        self._ranks = ranks
        self._sft = sft
        self._rl = rl
        self._model = Qwen3Moe(config, seed=seed)
        self.expert_load = np.zeros((config.num_layers, config.num_experts), np.int64)
        """Pairs of each expert in the last RL step of this learner; zeros before it."""
        self._enter("sft")

    @property
    def stage(self) -> Stage:
        """Of the last step; "sft" before the first."""
        return self._stage

    @property
    def step(self) -> int:
        """Steps done in this stage."""
        return self._updater.step

    def sft_step(self, examples: Sequence[tuple[np.ndarray, np.ndarray]]) -> dict[str, float]:
        """Imitates (prompt, response) pairs, int32 [P] and [n]: cross-entropy per response token, one update.

        Returns metrics by the names of actors/report.py. Raises FloatingPointError: see Updater.update.
        """
        assert self._stage == "sft", "imitation comes before RL"
        tally = Tally(self._ranks)
        self._updater.update(imitated(examples), _imitation, tally)
        learning_rate = self._updater.learning_rate
        self._updater.step += 1
        return tally.metrics(learning_rate=learning_rate)

    def rl_step(self, update: PolicyUpdate) -> dict[str, float]:
        """One RL step: splits the groups, in their order, into mini-batches and updates on each.

        Responses without a verdict take no part. Returns metrics by the names of actors/report.py. Raises ValueError,
        with nothing changed, if a sample is longer than the model's positions or an own loss can't be loaded, and
        FloatingPointError: see Updater.update.
        """
        check_lengths(update.groups, self._config.max_positions)
        loss = _Surrogate(update.objective, self._rl.temperature)
        if self._stage != "rl":
            self._enter("rl")
        tally = Tally(self._ranks)
        groups = rated(update.groups, update.advantages)
        for part in np.array_split(np.arange(len(groups)), self._rl.mini_batches):
            if mini_batch := [sample for index in part for sample in groups[index]]:
                self._updater.update(mini_batch, loss, tally)
        learning_rate = self._updater.learning_rate
        self._updater.step += 1
        metrics = tally.metrics(learning_rate=learning_rate) | describe(update.groups)
        self.expert_load = tally.load
        return metrics

    def weights(self) -> dict[str, np.ndarray]:
        """The weights, fp32 by Hugging Face name. They are views: the next step changes them."""
        return self._updater.weights()

    def load_weights(self, tensors: Mapping[str, np.ndarray]) -> None:
        """Replaces the weights. Raises ValueError, with nothing changed, if names or shapes are not the model's."""
        load_weights(self._model, tensors)

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Everything that the next step depends on: arrays (copies) and plain values."""
        arrays, info = self._updater.state()
        return arrays, {"stage": self._stage, **info}

    def load_state(self, arrays: Mapping[str, np.ndarray], info: Mapping[str, Any]) -> None:
        """Takes what `state` gave, and goes on from there. Raises ValueError if it is of another model or optimizer."""
        self._enter(info["stage"])
        self._updater.load_state(arrays, info)

    def _enter(self, stage: Stage) -> None:
        settings: SftSettings | RlSettings = self._sft if stage == "sft" else self._rl
        schedule = Schedule(settings.steps, settings.warmup_steps, settings.decay_ratio, settings.final_ratio)
        self._stage: Stage = stage
        self._updater = Updater(self._model, settings, schedule, self._ranks)


class _Surrogate:
    """The loss of an RL update, for the updater."""

    def __init__(self, objective: Objective, temperature: float) -> None:
        self._objective = objective
        self._temperature = temperature
        self._own = own_loss(objective.function) if objective.function else None

    def __call__(self, logits: Tensor, batch: MicroBatch, totals: Totals) -> tuple[Tensor, dict[str, Tensor]]:
        log_softmax = torch.log_softmax(logits / self._temperature, dim=-1)
        logprobs = log_softmax.gather(1, batch.targets.unsqueeze(1)).squeeze(1)
        total, weight = totals.tokens, None
        if self._objective.mean == "response":
            sizes = torch.tensor(batch.sizes)
            total, weight = totals.responses, (1 / sizes).repeat_interleave(sizes)
        result = policy_loss(logprobs, batch.behaviour, batch.target, self._objective, total=total, weight=weight)
        detached = log_softmax.detach()
        loss, watched = result.loss, {
            "entropy_nats": -(detached.exp() * detached).sum(),
            "clip_ratio": result.num_clipped,
            "behaviour_kl_nats": result.kl_sum,
            "ratio_max": result.ratio_max,
        }  # fmt: skip
        if self._own is not None:
            loss = self._own(logprobs, batch.behaviour, batch.target, totals.tokens)
        if self._objective.imitation:
            imitation = imitation_loss(logprobs, batch.positive, num_positive=totals.positive_tokens)
            watched["imitation_loss"] = imitation * totals.tokens
            loss = loss + self._objective.imitation * imitation
        return loss, watched


def _imitation(logits: Tensor, batch: MicroBatch, totals: Totals) -> tuple[Tensor, dict[str, Tensor]]:
    loss = torch.nn.functional.cross_entropy(logits, batch.targets, reduction="sum") / totals.tokens
    return loss, {"accuracy_ratio": (logits.argmax(-1) == batch.targets).sum()}
