"""A model and its optimizer: one update at a time on any number of samples, deterministic, resumable to the bit.

    samples --> micro-batches --> loss, backward (gradients add up) --> clip, step, or skip if they are not finite

Policy and critic are both trained by it. Knows nothing of what is learned, of stages, actors or files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..model.qwen3_moe import Qwen3Moe
from .batch import MicroBatch, Sample, Totals, collate
from .optim import Optimizer, Schedule
from .ranks import ALONE, Ranks
from .settings import UpdateSettings
from .tally import Tally

Loss = Callable[[Tensor, MicroBatch, Totals], tuple[Tensor, dict[str, Tensor]]]
"""(outputs [N, V], their micro-batch, counts of the whole update) -> the micro-batch's share of the loss, and what
`Tally.add_micro_batch` watches"""


class Updater:
    """Updates `model` by `settings`, from a fresh optimizer on. The caller counts `step`: it may be several updates."""

    def __init__(self, model: Qwen3Moe, settings: UpdateSettings, schedule: Schedule, ranks: Ranks = ALONE) -> None:
        self.model = model
        self.ranks = ranks
        self.step = 0
        self.rate = 1.0
        """Factor of the learning rates; whoever updates sets it."""
        self._settings = settings
        self._schedule = schedule
        self._skipped_in_row = 0
        self._optimizer: Optimizer = Optimizer(
            model.named_parameters(),
            learning_rate=settings.learning_rate,
            muon_learning_rate=settings.muon_learning_rate,
            weight_decay=settings.weight_decay,
            clip_norm=settings.clip_norm,
        )

    @property
    def learning_rate(self) -> float:
        """AdamW's, at this step."""
        return self._settings.learning_rate * self.rate * self._schedule.scale(self.step)

    def update(self, samples: Sequence[Sample], loss_of: Loss, tally: Tally) -> None:
        """One optimizer step on all `samples`, of which each rank works on its share. The loss divides by the counts of
        all, however they are shared and packed.

        If the gradient is not finite the weights stay as they are, and the tally counts it. Raises FloatingPointError
        if that has happened more than `max_skipped` times in a row.
        """
        totals, last = Totals.of(samples), torch.zeros(())
        for part in self.ranks.micro_batches([s.num_inputs for s in samples], self._settings.micro_batch_tokens):
            batch = collate([samples[i] for i in part])
            out = self.model(batch.tokens, batch.positions, batch.lengths)
            loss, watched = loss_of(self.model.logits(out.hidden[batch.rows]), batch, totals)
            last = loss + self._settings.aux_weight * out.aux_loss * (len(batch.tokens) / totals.inputs)
            last.backward()
            tally.add_micro_batch(
                num_tokens=len(batch.targets),
                num_inputs=len(batch.tokens),
                aux_loss=out.aux_loss,
                load=out.load,
                watched={"loss": loss * totals.tokens, **watched},
            )
        self.ranks.sum_gradients(self.model.parameters())
        try:
            norm = self._optimizer.step(self.rate * self._schedule.scale(self.step))
        except FloatingPointError as error:
            self._skip(error, last.item())
            tally.add_skipped()
        else:
            self._skipped_in_row = 0
            tally.add_update(norm)

    def weights(self) -> dict[str, np.ndarray]:
        """The weights, fp32 by Hugging Face name. They are views: the next step changes them."""
        return {name: parameter.detach().numpy() for name, parameter in self.model.named_parameters()}

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Everything that the next update depends on: arrays (copies) and plain values."""
        arrays = {f"weights/{name}": value.copy() for name, value in self.weights().items()}
        arrays |= {f"optimizer/{name}": value for name, value in self._optimizer.state().items()}
        return arrays, {"step": self.step, "skipped_in_row": self._skipped_in_row}

    def load_state(self, arrays: Mapping[str, np.ndarray], info: Mapping[str, Any]) -> None:
        """Takes what `state` gave, and goes on from there. Raises ValueError if it is of another model or optimizer."""
        load_weights(self.model, _below("weights/", arrays))
        self._optimizer.load_state(_below("optimizer/", arrays))
        self.step = int(info["step"])
        self._skipped_in_row = int(info["skipped_in_row"])

    def _skip(self, error: FloatingPointError, loss: float) -> None:
        self._skipped_in_row += 1
        if self._skipped_in_row > self._settings.max_skipped:
            raise FloatingPointError(
                f"{self._skipped_in_row} updates in a row had no finite gradient, the last at step {self.step + 1} "
                f"with loss {loss:g}: {error}; go back to an earlier checkpoint with a lower learning_rate"
            ) from error


@torch.no_grad()
def load_weights(model: Qwen3Moe, tensors: Mapping[str, np.ndarray]) -> None:
    """Replaces the weights. Raises ValueError, with nothing changed, if names or shapes are not the model's."""
    parameters = dict(model.named_parameters())
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


def _below(prefix: str, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {key.removeprefix(prefix): array for key, array in arrays.items() if key.startswith(prefix)}
