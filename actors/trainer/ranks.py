"""How the ranks of a data-parallel trainer share an update: each works on its part, all end with the same gradients.

    micro_batches(lengths) -> mine      forward, backward        sum_gradients(parameters) -> the same step everywhere

Every rank holds the whole model and is shown the whole batch, so what it divides by is known to all. Sums are taken in
the order of the ranks: the same batches give the same bits, on every rank and in every run. Knows nothing of actors,
losses or optimizers, but for where a group of them meets.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...runtime.worker import Worker
from ..meeting import LOOPBACK, meeting_file
from ..model.config import ModelConfig
from .packing import pack, plan
from .workload import Workload, workload_of

MEET_S = 600.0
"""Longest wait of a rank for the others, when they start and in every sum: they may have as much work as a step brings.
That one has died is seen at once, by its connections; and the group's restart ends the others."""


class RankLost(RuntimeError):
    """The ranks can't work together any more: one has died, or is somewhere else in its work."""


class Ranks:
    """A trainer of one process: it does everything, and there is nobody to add up with."""

    rank = 0
    size = 1

    def micro_batches(self, lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
        """Which samples of a batch, by their numbers of tokens, this rank works on: packed as packing.py says."""
        return pack(lengths, max_tokens)

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Makes each gradient the sum of those of all ranks; for several ranks, a missing one counts as zeros.

        Raises RankLost.
        """

    def sum(self, values: np.ndarray) -> np.ndarray:
        """float64 [n]: the sum over ranks. Raises RankLost."""
        return values

    def max(self, values: np.ndarray) -> np.ndarray:
        """float64 [n]: the largest of all ranks. Raises RankLost."""
        return values

    def close(self) -> None:
        """Leaves the others."""


ALONE = Ranks()


class Gang(Ranks):
    """One of several processes on a host, joined by gloo on the loopback. They meet when they first have to."""

    def __init__(self, rank: int, size: int, meeting: Path, workload: Workload, *, meet_s: float = MEET_S) -> None:
        """`meeting`: a file that is new, and the same for all ranks."""
        self.rank = rank
        self.size = size
        self._meeting = meeting
        self._workload = workload
        self._patience = timedelta(seconds=meet_s)
        self._group: dist.ProcessGroup | None = None

    def micro_batches(self, lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
        """Balanced over the ranks by cost; none, if there are fewer samples than ranks."""
        shares = plan(lengths, self._workload.cost(lengths).tolist(), self.size, max_tokens)
        return [part for part in shares[self.rank] if part]

    @torch.no_grad()
    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        held = list(parameters)
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in held])
        total = self._guarded(lambda group: _sum(flat, group, self.size))
        for parameter, part in zip(held, total.split([p.numel() for p in held]), strict=True):
            parameter.grad = part.view_as(parameter).clone()

    def sum(self, values: np.ndarray) -> np.ndarray:
        rows = self._gathered(values)
        total: np.ndarray = rows[0].copy()
        for row in rows[1:]:
            total += row
        return total

    def max(self, values: np.ndarray) -> np.ndarray:
        return np.asarray(self._gathered(values).max(0))

    def close(self) -> None:
        if self._group is not None:
            self._group = None
            dist.destroy_process_group()

    def _gathered(self, values: np.ndarray) -> np.ndarray:
        """[ranks, n]"""
        own = torch.from_numpy(np.ascontiguousarray(values, np.float64))
        rows = [torch.empty_like(own) for _ in range(self.size)]
        self._guarded(lambda group: dist.all_gather(rows, own, group=group))
        gathered: np.ndarray = torch.stack(rows).numpy()
        return gathered

    def _guarded(self, work: Callable[[dist.ProcessGroup], Any]) -> Any:
        try:
            return work(self._met())
        except RuntimeError as error:
            first = str(error).partition("\n")[0]
            raise RankLost(f"rank {self.rank} of {self.size} can't go on with the others: {first}") from error

    def _met(self) -> dist.ProcessGroup:
        if self._group is None:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", LOOPBACK)
            self._meeting.parent.mkdir(parents=True, exist_ok=True)
            dist.init_process_group(
                "gloo",
                store=dist.FileStore(str(self._meeting), self.size),  # type: ignore[attr-defined]
                rank=self.rank,
                world_size=self.size,
                timeout=self._patience,
            )
            self._group = dist.group.WORLD
        assert self._group is not None
        return self._group


def join_ranks(worker: Worker, run: Path, model: ModelConfig) -> Ranks:
    """The ranks of a worker's group, in this epoch. Called as it starts: by the first rank before the others."""
    if worker.layout.size == 1:
        return ALONE
    return Gang(worker.rank, worker.layout.size, meeting_file(worker, run), workload_of(model))


def _sum(flat: Tensor, group: dist.ProcessGroup, size: int) -> Tensor:
    """Each rank adds up one slice of all, in the order of the ranks, and gives it to all."""
    width = -(-flat.numel() // size)
    mine = torch.nn.functional.pad(flat, (0, width * size - flat.numel()))
    slices = torch.empty_like(mine)
    dist.all_to_all_single(slices, mine, group=group)
    rows = slices.view(size, width)
    total = rows[0].clone()
    for row in rows[1:]:
        total += row
    whole = [torch.empty_like(total) for _ in range(size)]
    dist.all_gather(whole, total, group=group)
    return torch.cat(whole)[: flat.numel()]
