"""A runner with two forms of each version's weights, full and FP8, of which a schedule says which one a pass uses.

Both are there all the time: falling back takes effect with the next pass, and what measures FP8 needs the other one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..model.attention import PackedAttention
from ..model.block import to_fp8
from ..model.config import ModelConfig
from ..model.decode import DecoderWeights, forward, logits
from .precision import Kind, Schedule
from .runner import Batch, Forward
from .single import SingleRunner


class ScheduledRunner(SingleRunner):
    """See runner.Runner and single.SingleRunner, whose arguments it takes."""

    def __init__(self, config: ModelConfig, schedule: Schedule, **settings: Any) -> None:
        super().__init__(config, **settings)
        self._schedule = schedule
        self._forms: dict[Kind, DecoderWeights] = {}

    @property
    def mixes(self) -> bool:  # type: ignore[override]
        return self._schedule.mixes

    @torch.inference_mode()
    def prepare(self, tensors: Mapping[str, np.ndarray]) -> dict[Kind, DecoderWeights]:  # type: ignore[override]
        full = super().prepare(tensors)
        fp8_inputs = self._schedule.settings.activations == "fp8"
        layers = tuple(to_fp8(layer, fp8_inputs=fp8_inputs) for layer in full.layers)
        return {"full": full, "fp8": full._replace(layers=layers)}

    def load(self, weights: dict[Kind, DecoderWeights]) -> Any:  # type: ignore[override]
        old = getattr(self, "_forms", None), super().load(weights["full"])
        self._forms = weights
        return old

    def run(self, batch: Batch) -> Forward:
        self._weights = self._forms[self._schedule.of("decode" if batch.num_decode else "prefill")]
        return super().run(batch)

    @torch.inference_mode()
    def read(self, sequences: Sequence[np.ndarray], kind: Kind | None = None) -> Tensor:
        """Logits after every token of whole sequences, int [n] each: [T, V]; no page is touched.

        In what the schedule says of scoring, unless told.
        """
        weights = self._forms[kind or self._schedule.of("score")]
        tokens = torch.from_numpy(np.concatenate(sequences).astype(np.int64)).to(self._device)
        positions = torch.from_numpy(np.concatenate([np.arange(len(s)) for s in sequences])).to(self._device)
        attend = PackedAttention([len(s) for s in sequences], self._device)
        x, _ = forward(self.config, weights, tokens, self._rotations[positions].unsqueeze(1), attend)
        return logits(self.config, weights, x)
