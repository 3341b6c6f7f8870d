"""What one rank of a worker computes of a batch, and keeps of its keys and values. All ranks do the same at once.

    x [T, d], the same everywhere --> norm --> q, k, v of its heads, of all tokens or its share of them
      --> keys and values of all tokens into its pages --> attend --> columns of out --> sum --> +x
      --> norm --> gate of all tokens --> its experts, its width of them --> sum --> +x      logits of its words

Two sums a layer. What is summed has the same bits at every rank, so all gates choose alike. Knows nothing of where
batches or weights come from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ....kernels.placement import Placement
from ...model.block import Attend, LayerWeights, attention, experts, rotations, route, unit_rms
from ...model.config import ModelConfig
from ...model.decode import DecoderWeights
from ...model.paged import PagedCache
from ..runner import Batch
from .experts import Slots, move
from .link import Link
from .part import Part, fuse_part
from .shares import Share, share_of

SPLIT_TOKENS = 64
"""Attention divides the tokens of a step if each rank gets this many at least; fewer are not worth the exchange."""


@dataclass(frozen=True, slots=True)
class RankWeights:
    """One policy version at one rank."""

    ticket: int
    placements: Sequence[Placement]
    decoder: DecoderWeights


def prepare(link: Link, config: ModelConfig, part: Part) -> RankWeights:
    """Fuses a rank's part of the weights; for any thread. Raises ValueError, FloatingPointError; see `fuse_part`."""
    return RankWeights(part.ticket, part.placements, fuse_part(config, link.place, part, link.device))


class Rank:
    """One rank's share of the model and its pages. One thread drives it."""

    def __init__(
        self,
        link: Link,
        config: ModelConfig,
        *,
        num_pages: int,
        page_tokens: int,
        split_tokens: int = SPLIT_TOKENS,
    ) -> None:
        place = link.place
        self.link = link
        self.config = config
        self._place = place
        self._local = place.mesh.local(config)
        self._cache = PagedCache(self._local, num_pages=num_pages, page_tokens=page_tokens, device=link.device)
        self._rotations = rotations(config).to(link.device)
        self._split_tokens = split_tokens
        self.placements: Sequence[Placement] = ()

    def load(self, weights: RankWeights) -> None:
        """Takes what `prepare` gave; pages stay."""
        self._take(weights.decoder, weights.placements)

    def place_experts(self, placements: Sequence[Placement]) -> None:
        """Moves experts to other slots, from rank to rank. Raises RankLost."""
        layers = move(self.link, self._weights.layers, self.placements, placements)
        self._take(self._weights._replace(layers=layers), placements)

    def _take(self, weights: DecoderWeights, placements: Sequence[Placement]) -> None:
        self._weights = weights
        self._cache.expect(weights.layers)
        self.placements = placements
        self._slots = [Slots(placement, self._place.e, self.link.device) for placement in placements]

    @torch.inference_mode()
    def run(self, batch: Batch) -> tuple[list[Tensor], list[Tensor]]:
        """The logits of each rank's words after the wanted sequences, at the first rank, and the experts [T, K] that
        each layer chose. Raises RankLost."""
        device = self.link.device
        share = share_of(batch, self._place, self._split_tokens, device)
        attend = self._attend(batch, share)
        tokens = torch.from_numpy(batch.tokens).to(device)
        turn = self._rotations[torch.from_numpy(batch.positions).to(device)].unsqueeze(1)
        x, routes = self._weights.embed[tokens], []
        for index, weights in enumerate(self._weights.layers):
            x, ids_TK = self._layer(index, x, weights, turn, attend, share)
            routes.append(ids_TK)
        if not len(batch.wanted):
            return [x.new_empty(0, len(self._weights.head))] * self._place.mesh.size, routes
        last = x if len(batch.wanted) == len(x) else x[torch.from_numpy(batch.lasts).to(device)]
        logits = F.linear(unit_rms(last, self.config.rms_norm_eps), self._weights.head)
        return self.link.to_first(logits), routes

    @torch.inference_mode()
    def copy_pages(self, sources: np.ndarray, targets: np.ndarray) -> None:
        self._cache.copy(sources, targets)

    @torch.inference_mode()
    def clear_pages(self, pages: np.ndarray) -> None:
        self._cache.clear(pages)

    def _layer(
        self, index: int, x: Tensor, w: LayerWeights, turn: Tensor, attend: Attend, share: Share | None
    ) -> tuple[Tensor, Tensor]:
        config, link, eps = self._local, self.link, self.config.rms_norm_eps
        normed = unit_rms(x, eps)
        if share is None:
            x = x + link.sum("heads", attention(config, index, normed, w, turn, attend))
        else:
            rows = share.rows
            added = torch.zeros_like(x)
            added[rows] = attention(config, index, normed[rows], w, turn[rows], attend)
            x = x + link.sum("all", added)
        normed = unit_rms(x, eps)
        gate = route(config, normed, w)
        if share is None or self._place.mesh.sp == 1:
            added = experts(normed, self._slots[index].rows(gate.ids_TK), gate.weights_TK, w)
            return x + link.sum("experts", added), gate.ids_TK
        rows = share.expert_rows
        added = torch.zeros_like(x)
        mine = self._slots[index].rows(gate.ids_TK[rows])
        added[rows] = experts(normed[rows], mine, gate.weights_TK[rows], w)
        return x + link.sum("all", added), gate.ids_TK

    def _attend(self, batch: Batch, share: Share | None) -> Attend:
        if share is None:
            return self._cache.attend(batch.positions, batch.counts, batch.tables, batch.num_decode)
        write = self._cache.writer(batch.positions, batch.counts, batch.tables)
        own = share.batch
        read = self._cache.attend(own.positions, own.counts, own.tables, own.num_decode)
        return _exchanging(self.link, share, write, read)


def _exchanging(link: Link, share: Share, write: Callable[[int, Tensor, Tensor], None], read: Attend) -> Attend:
    """Keys and values of all tokens are written, queries of this rank's are answered."""

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        both = F.pad(torch.stack((k, v), 1), (0, 0, 0, 0, 0, 0, 0, share.width - len(k)))
        parts = link.hand_round("tokens", both)
        everything = torch.cat(parts).index_select(0, share.order)
        write(layer, everything[:, 0], everything[:, 1])
        return read(layer, q, k, v)

    return attend
