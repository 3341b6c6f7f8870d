"""A runner that computes a whole model by itself. Knows nothing of requests, sampling or versions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from ..model.block import rotations
from ..model.config import ModelConfig
from ..model.decode import DecoderWeights, check_weights, forward, fuse_weights, logits
from ..model.fixed import fixed_forward, fixed_logits
from ..model.paged import PagedCache
from .runner import Batch, Forward


class SingleRunner:
    """See runner.Runner. With `routes` it returns the experts of every token; with `fixed_shapes` no bit of a token's
    logits depends on the tokens beside it (model/fixed.py), which is for a CPU.
    """

    mixes = True

    def __init__(
        self,
        config: ModelConfig,
        *,
        num_pages: int,
        page_tokens: int,
        routes: bool = False,
        fixed_shapes: bool = False,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.config = config
        self.num_pages = num_pages
        self.page_tokens = page_tokens
        self._device = torch.device(device)
        self._cache = PagedCache(config, num_pages=num_pages, page_tokens=page_tokens, device=device, dtype=dtype)
        self._rotations = rotations(config).to(device)
        self._fixed = fixed_shapes
        self._routes = (np.uint8 if config.num_experts < 256 else np.uint16) if routes else None

    def prepare(self, tensors: Mapping[str, np.ndarray]) -> DecoderWeights:
        check_weights(self.config, tensors)
        return fuse_weights(self.config, tensors, self._device)

    def load(self, weights: DecoderWeights) -> Any:
        old, self._weights = getattr(self, "_weights", None), weights
        self._cache.expect(weights.layers)
        return old

    @torch.inference_mode()
    def run(self, batch: Batch) -> Forward:
        if self._fixed:
            return self._run_fixed(batch)
        attend = self._cache.attend(batch.positions, batch.counts, batch.tables, batch.num_decode)
        tokens = torch.from_numpy(batch.tokens).to(self._device)
        turn = self._rotations[torch.from_numpy(batch.positions).to(self._device)].unsqueeze(1)
        x, chosen = forward(self.config, self._weights, tokens, turn, attend)
        if len(batch.wanted) < len(x):
            x = x[torch.from_numpy(batch.lasts).to(self._device)]
        routes = None
        if self._routes is not None:
            routes = torch.stack(chosen, 1).cpu().numpy().astype(self._routes)
        return Forward(logits(self.config, self._weights, x), routes)

    def _run_fixed(self, batch: Batch) -> Forward:
        tables = batch.tables.repeat(batch.counts, 0)
        x, chosen = fixed_forward(self._weights, self._cache, self._rotations, batch.tokens, batch.positions, tables)
        routes = None if self._routes is None else chosen.numpy().astype(self._routes)
        last = x[torch.from_numpy(batch.lasts)]
        return Forward(fixed_logits(self.config, self._weights, last), routes)

    @torch.inference_mode()
    def copy_pages(self, sources: np.ndarray, targets: np.ndarray) -> None:
        self._cache.copy(sources, targets)

    @torch.inference_mode()
    def clear_pages(self, pages: np.ndarray) -> None:
        self._cache.clear(pages)
