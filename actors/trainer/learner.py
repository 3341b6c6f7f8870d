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

from ..algorithms.losses import decoupled_weights, imitation_loss, own_loss, policy_loss, truncated_weights
from ..algorithms.updates import Objective, PolicyUpdate
from ..model.config import ModelConfig
from ..model.qwen3_moe import Qwen3Moe
from .batch import MicroBatch, Sample, Totals, check_lengths, collate, imitated, rated
from .optim import Schedule
from .ranks import ALONE, Ranks
from .settings import Correction, RlSettings, SftSettings
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
        self._temperature = rl.temperature
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
        with nothing changed, if a sample is longer than the model's positions or an own loss can't be loaded or
        corrected, and FloatingPointError: see Updater.update.
        """
        check_lengths(update.groups, self._config.max_positions)
        self._temperature = update.temperature or self._rl.temperature
        loss = _Surrogate(update.objective, self._temperature, self._rl.correction, self._rl.truncation)
        if self._stage != "rl":
            self._enter("rl")
        self._updater.rate = update.learning_rate / self._rl.learning_rate if update.learning_rate else 1.0
        tally = Tally(self._ranks)
        groups = rated(update.groups, update.advantages)
        parts = np.array_split(np.arange(len(groups)), self._rl.mini_batches)
        mini_batches = [[sample for index in part for sample in groups[index]] for part in parts]
        if self._rl.correction != "none" and len(mini_batches) > 1:
            mini_batches = [self._with_proximal(samples) for samples in mini_batches]
        for mini_batch in filter(None, mini_batches):
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

    @torch.no_grad()
    def _with_proximal(self, samples: list[Sample]) -> list[Sample]:
        """With their log-probabilities as the weights are now: of those samples that this rank will train."""
        samples = list(samples)
        for part in self._ranks.micro_batches([s.num_inputs for s in samples], self._rl.micro_batch_tokens):
            batch = collate([samples[i] for i in part])
            out = self._model(batch.tokens, batch.positions, batch.lengths)
            log_softmax = _log_softmax(self._model.logits(out.hidden[batch.rows]), self._temperature)
            rows = log_softmax.gather(1, batch.targets.unsqueeze(1)).squeeze(1).split(batch.sizes)
            for i, row in zip(part, rows, strict=True):
                samples[i] = samples[i]._replace(proximal=row.numpy())
        return samples

    def _enter(self, stage: Stage) -> None:
        settings: SftSettings | RlSettings = self._sft if stage == "sft" else self._rl
        schedule = Schedule(settings.steps, settings.warmup_steps, settings.decay_ratio, settings.final_ratio)
        self._stage: Stage = stage
        self._updater = Updater(self._model, settings, schedule, self._ranks)


class _Surrogate:
    """The loss of an RL update, for the updater.

    With a correction, tokens are compared with the policy that the step begins from: that is this policy itself, where
    the samples don't tell, for then they are all trained at once.
    """

    def __init__(
        self, objective: Objective, temperature: float, correction: Correction = "none", truncation: float = 2.0
    ) -> None:
        self._objective = objective
        self._temperature = temperature
        self._bound = {"none": None, "tis": truncation, "decoupled": float("inf")}[correction]
        self._own = own_loss(objective.function) if objective.function else None
        if self._own is not None and self._bound is not None:
            raise ValueError(
                f"[rl] correction = {correction!r} corrects the surrogate, not the loss {objective.function}; set it "
                'to "none", and correct in that loss'
            )

    def __call__(self, logits: Tensor, batch: MicroBatch, totals: Totals) -> tuple[Tensor, dict[str, Tensor]]:
        log_softmax = _log_softmax(logits, self._temperature)
        logprobs = log_softmax.gather(1, batch.targets.unsqueeze(1)).squeeze(1)
        total, weight = totals.tokens, None
        if self._objective.mean == "response":
            sizes = torch.tensor(batch.sizes)
            total, weight = totals.responses, (1 / sizes).repeat_interleave(sizes)
        begun_from, corrected = batch.behaviour, dict[str, Tensor]()
        if self._bound is not None:
            begun_from = batch.proximal if len(batch.proximal) else logprobs.detach()
            correction, corrected = _correction(begun_from, batch.behaviour, self._bound)
            weight = correction if weight is None else weight * correction
        result = policy_loss(logprobs, begun_from, batch.target, self._objective, total=total, weight=weight)
        detached = log_softmax.detach()
        loss, watched = result.loss, {
            "entropy_nats": -(detached.exp() * detached).sum(),
            "clip_ratio": result.num_clipped,
            "behaviour_kl_nats": result.kl_sum,
            "ratio_max": result.ratio_max,
            **corrected,
        }  # fmt: skip
        if self._own is not None:
            loss = self._own(logprobs, batch.behaviour, batch.target, totals.tokens)
        if self._objective.imitation:
            imitation = imitation_loss(logprobs, batch.positive, num_positive=totals.positive_tokens)
            watched["imitation_loss"] = imitation * totals.tokens
            loss = loss + self._objective.imitation * imitation
        return loss, watched


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    return torch.log_softmax(logits / temperature, dim=-1)


def _correction(proximal: Tensor, behaviour: Tensor, bound: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Weights of the tokens, none above `bound`, and what is watched of them and of how far the two policies are."""
    ratio = decoupled_weights(proximal, behaviour)
    return truncated_weights(proximal, behaviour, bound), {
        "behaviour_kl_nats": (ratio - 1 - ratio.log()).sum(),
        "ratio_max": ratio.max(),
        "truncated_weight_ratio": (ratio > bound).sum(),
    }


def _imitation(logits: Tensor, batch: MicroBatch, totals: Totals) -> tuple[Tensor, dict[str, Tensor]]:
    loss = torch.nn.functional.cross_entropy(logits, batch.targets, reduction="sum") / totals.tokens
    return loss, {"accuracy_ratio": (logits.argmax(-1) == batch.targets).sum()}
