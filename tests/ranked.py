"""Ranks of a rollout worker as threads of one process: each has connections of its own, as a process has."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from headrace.actors.model.config import ModelConfig
from headrace.actors.rollout.parallel.link import Link
from headrace.actors.rollout.parallel.lost import RankLost
from headrace.actors.rollout.parallel.mesh import Mesh
from headrace.actors.rollout.parallel.part import Part, cut, first_placements
from headrace.actors.rollout.parallel.runner import Follower, RanksRunner
from headrace.kernels.placement import Placement

CPU = torch.device("cpu")


class Gang:
    """The runner of the first rank, and the others that follow it."""

    def __init__(self, config: ModelConfig, mesh: Mesh, meeting: Path, **settings: Any) -> None:
        self._config, self._mesh = config, mesh
        self._followers: list[Follower] = [None] * mesh.size  # type: ignore[list-item]
        self.errors: list[BaseException] = []
        here = threading.Barrier(mesh.size)
        self._threads = [
            threading.Thread(target=self._rank, args=(rank, meeting, here)) for rank in range(1, mesh.size)
        ]
        for thread in self._threads:
            thread.start()
        self.link = Link.meet(mesh.place(0), meeting, CPU, patience_s=20.0)
        here.wait(20.0)
        self.runner = RanksRunner(self.link, config, **settings)
        self._tickets = 0

    def part(self, tensors: Mapping[str, np.ndarray], placements: Sequence[Placement] | None = None) -> Part:
        """The first rank's part of weights, when all others have theirs."""
        self._tickets += 1
        parts = []
        for rank in range(self._mesh.size):
            where = placements or first_placements(self._mesh, self._config)
            parts.append(cut(self._config, self._mesh.place(rank), where, tensors))
            parts[rank].ticket = self._tickets
        for follower, part in zip(self._followers[1:], parts[1:], strict=True):
            follower.take(part)
        return parts[0]

    def leave(self, rank: int) -> None:
        """As if a rank had died."""
        self._followers[rank]._link.close()
        self._threads[rank - 1].join(20.0)

    def close(self) -> None:
        self.runner.close()
        for thread in self._threads:
            thread.join(20.0)
            assert not thread.is_alive()

    def _rank(self, rank: int, meeting: Path, here: threading.Barrier) -> None:
        link = Link.meet(self._mesh.place(rank), meeting, CPU, patience_s=20.0)
        self._followers[rank] = Follower(link, self._config)
        here.wait(20.0)
        try:
            self._followers[rank].follow()
        except RankLost:
            pass
        except BaseException as error:
            self.errors.append(error)
            raise
        finally:
            link.close()


@contextmanager
def gang(config: ModelConfig, mesh: Mesh, meeting: Path, **settings: Any) -> Iterator[Gang]:
    """Ranks that end with the block."""
    ranks = Gang(config, mesh, meeting, **settings)
    try:
        yield ranks
    finally:
        ranks.close()
    assert ranks.errors == []
