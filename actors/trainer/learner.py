"""The trained model: one step of imitation (SFT) or of DAPO at a time, deterministic, resumable to the bit.

    examples --sft_step--> metrics        state() -> load_state(): goes on as if it had not stopped
    groups ---rl_step----> metrics        weights(): what is published

A step packs its sequences into micro-batches, adds up their gradients and updates the weights: once, or for RL once per
mini-batch. Knows nothing of actors, pools, versions or files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..model.config import ModelConfig
from ..model.qwen3_moe import Qwen3Moe
from ..types import Group
from .batch import MicroBatch, Sample, collate, imitated, sampled
from .dapo import policy_loss
from .optim import Optimizer, Schedule
from .packing import pack
from .settings import RlSettings, SftSettings
from .tally import Tally, describe

Stage = Literal["sft", "rl"]

Loss = Callable[[Tensor, MicroBatch, int], tuple[Tensor, dict[str, Tensor]]]
"""(logits [N, V], their micro-batch, response tokens of the update) -> the micro-batch's share of the loss, and what
`Tally.add_micro_batch` watches"""


class Learner:
    """Model and optimizer. The first RL step begins with a fresh optimizer; each stage counts its own steps."""

    def __init__(self, config: ModelConfig, sft: SftSettings, rl: RlSettings, *, seed: int) -> None:
        self._sft = sft
        self._rl = rl
        self._model = Qwen3Moe(config, seed=seed)
        self._enter("sft")

    @property
    def stage(self) -> Stage:
        """Of the last step; "sft" before the first."""
        return self._stage

    @property
    def step(self) -> int:
        """Steps done in this stage."""
        return self._step

    def sft_step(self, examples: Sequence[tuple[np.ndarray, np.ndarray]]) -> dict[str, float]:
        """Imitates (prompt, response) pairs, int32 [P] and [n]: cross-entropy per response token, one update.

        Returns metrics by the names of actors/report.py. Raises FloatingPointError, with nothing changed, if the loss
        or the gradient is not finite.
        """
        assert self._stage == "sft", "imitation comes before RL"
        tally = Tally()
        scale = self._schedule.scale(self._step)
        self._update(imitated(examples), _imitation, scale, tally)
        self._step += 1
        return tally.metrics(learning_rate=self._sft.learning_rate * scale)

    def rl_step(self, groups: Sequence[Group]) -> dict[str, float]:
        """One DAPO step: splits `groups`, in their order, into mini-batches and updates on each.

        Responses without a verdict take no part. Returns metrics by the names of actors/report.py. Raises
        FloatingPointError if a reward or log-probability is not finite, with nothing changed, or if a loss or gradient
        is not: then this update is not made, while those of earlier mini-batches stay.
        """
        if self._stage != "rl":
            self._enter("rl")
        tally = Tally()
        scale = self._schedule.scale(self._step)
        samples = [sampled(group) for group in groups]
        for part in np.array_split(np.arange(len(groups)), self._rl.mini_batches):
            if mini_batch := [sample for index in part for sample in samples[index]]:
                self._update(mini_batch, self._dapo, scale, tally)
        self._step += 1
        return tally.metrics(learning_rate=self._rl.learning_rate * scale) | describe(groups)

    def weights(self) -> dict[str, np.ndarray]:
        """The weights, fp32 by Hugging Face name. They are views: the next step changes them."""
        return {name: parameter.detach().numpy() for name, parameter in self._model.named_parameters()}

    @torch.no_grad()
    def load_weights(self, tensors: Mapping[str, np.ndarray]) -> None:
        """Replaces the weights. Raises ValueError, with nothing changed, if names or shapes are not the model's."""
        parameters = dict(self._model.named_parameters())
        wanted = {name: tuple(p.shape) for name, p in parameters.items()}
        given = {name: tensor.shape for name, tensor in tensors.items()}
        wrong = sorted(name for name in wanted.keys() | given.keys() if wanted.get(name) != given.get(name))
        if wrong:
            raise ValueError(
                f"weights are of another model: {wrong[0]} has shape {given.get(wrong[0])}, expected "
                f"{wanted.get(wrong[0])} ({len(wrong)} tensors differ); check the [model] table"
            )
        for name, parameter in parameters.items():
            parameter.copy_(torch.tensor(tensors[name]))

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Everything that the next step depends on: arrays (copies) and plain values."""
        arrays = {f"weights/{name}": value.copy() for name, value in self.weights().items()}
        arrays |= {f"optimizer/{name}": value for name, value in self._optimizer.state().items()}
        return arrays, {"stage": self._stage, "step": self._step}

    def load_state(self, arrays: Mapping[str, np.ndarray], info: Mapping[str, Any]) -> None:
        """Takes what `state` gave, and goes on from there. Raises ValueError if it is of another model or optimizer."""
        self.load_weights(_below("weights/", arrays))
        self._enter(info["stage"])
        self._optimizer.load_state(_below("optimizer/", arrays))
        self._step = int(info["step"])

    def _enter(self, stage: Stage) -> None:
        settings: SftSettings | RlSettings = self._sft if stage == "sft" else self._rl
        self._stage: Stage = stage
        self._step = 0
        self._settings = settings
        self._schedule = Schedule(settings.steps, settings.warmup_steps, settings.decay_ratio, settings.final_ratio)
        self._optimizer: Optimizer = Optimizer(
            self._model.named_parameters(),
            learning_rate=settings.learning_rate,
            muon_learning_rate=settings.muon_learning_rate,
            weight_decay=settings.weight_decay,
            clip_norm=settings.clip_norm,
        )

    def _update(self, samples: Sequence[Sample], loss_of: Loss, scale: float, tally: Tally) -> None:
        """One optimizer step on all `samples`. The loss is a mean over their tokens, however they are packed."""
        num_tokens = sum(len(s.response) for s in samples)
        num_inputs = sum(s.num_inputs for s in samples)
        for part in pack([s.num_inputs for s in samples], self._settings.micro_batch_tokens):
            batch = collate([samples[i] for i in part])
            out = self._model(batch.tokens, batch.positions, batch.lengths)
            loss, watched = loss_of(self._model.logits(out.hidden[batch.rows]), batch, num_tokens)
            total = loss + self._settings.aux_weight * out.aux_loss * (len(batch.tokens) / num_inputs)
            if not total.isfinite():
                self._optimizer.drop_gradients()
                raise FloatingPointError(f"the {self._stage} loss is {total.item()}; no weight was changed")
            total.backward()
            tally.add_micro_batch(
                num_tokens=len(batch.targets),
                num_inputs=len(batch.tokens),
                aux_loss=out.aux_loss,
                load=out.load,
                watched={"loss": loss * num_tokens, **watched},
            )
        tally.add_update(self._optimizer.step(scale))

    def _dapo(self, logits: Tensor, batch: MicroBatch, num_tokens: int) -> tuple[Tensor, dict[str, Tensor]]:
        log_softmax = torch.log_softmax(logits / self._rl.temperature, dim=-1)
        result = policy_loss(
            log_softmax.gather(1, batch.targets.unsqueeze(1)).squeeze(1),
            batch.behaviour,
            batch.advantage,
            num_tokens=num_tokens,
            clip_low=self._rl.clip_low,
            clip_high=self._rl.clip_high,
            dual_clip=self._rl.dual_clip,
        )
        detached = log_softmax.detach()
        return result.loss, {
            "entropy_nats": -(detached.exp() * detached).sum(),
            "clip_ratio": result.num_clipped,
            "behaviour_kl_nats": result.kl_sum,
            "ratio_max": result.ratio_max,
        }


def _imitation(logits: Tensor, batch: MicroBatch, num_tokens: int) -> tuple[Tensor, dict[str, Tensor]]:
    loss = torch.nn.functional.cross_entropy(logits, batch.targets, reduction="sum") / num_tokens
    return loss, {"accuracy_ratio": (logits.argmax(-1) == batch.targets).sum()}


def _below(prefix: str, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {key.removeprefix(prefix): array for key, array in arrays.items() if key.startswith(prefix)}
