"""Trains the policy: imitation first, then RL by the updates it is given; publishes and keeps its weights.

    start: newest checkpoint, or random weights
    warm_up(until) / step(n, groups)  -->  metrics        publish(version)  -->  Manifest of shared memory
    checkpoint(...)  -->  a folder that appears whole or not at all        rewind(): as a restart

Several ranks are replicas that share each update (ranks.py): all are shown the same, the first one speaks for all.

A deterministic state machine: the same checkpoint and the same updates give the same weights, bit for bit on a CPU.
Knows nothing of rollout, rewards, algorithms or the pool.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import numpy as np
from annotated_types import Ge

from ...runtime import message
from ...runtime.dispatch import ONE_TO_ALL, RANK_ZERO, SPMD, dispatch
from ...runtime.exchange import Manifest, Publisher
from ...runtime.exchange.fp8 import shrink
from ...runtime.exchange.intake import place_of
from ...runtime.rundir import RunSpec
from ...runtime.worker import Worker
from ..algorithms.updates import PolicyUpdate
from ..data.task import Task
from ..model.config import ModelConfig
from ..model.shards import matrices
from ..run_state import latest_checkpoint
from . import checkpoint as checkpoints
from .settings import RlSettings, SftSettings

if TYPE_CHECKING:
    from .learner import Learner
    from .ranks import Ranks


@dataclass(kw_only=True)
class Trainer(Worker):
    """One rank of the trainer, or all of it. Its torch runs on the actor's own thread, so its node answers."""

    run: RunSpec
    model: ModelConfig
    task: Task
    sft: SftSettings
    rl: RlSettings
    keep_checkpoints: Annotated[int, Ge(1)] = 2
    """Newest checkpoints that are kept."""
    snapshots_gib: Annotated[float, Ge(0)] = 0.0
    """Memory for published versions before the newest that somebody still needs; 0: as much as one of them takes. What
    would take more is refused."""
    publish_fp8: bool = False
    """Whether matrices travel to rollout as FP8, a quarter of their bytes; it generates with what arrives. Router,
    norms, embedding and head travel as they are."""

    async def start(self) -> None:
        """Loads the newest checkpoint. Raises ValueError or FileNotFoundError, saying what to do, if it is damaged."""
        self._publisher = Publisher("policy", budget_bytes=int(self.snapshots_gib * 2**30) or None)
        address, keys = place_of(self)
        if address:
            self._publisher.serve(address, keys)
        self._ranks: Ranks | None = None
        self._kept: tuple[str, int] = "sft", 0
        self._learner: Learner = await self.in_thread(self._open)

    async def stop(self, reason: BaseException | None) -> None:
        self._publisher.close()
        if self._ranks is not None:
            self._ranks.close()

    @dispatch(RANK_ZERO)
    @message(deadline_s=600.0)
    async def position(self) -> int:
        """RL steps that these weights have seen."""
        return self._learner.step if self._learner.stage == "rl" else 0

    @dispatch(RANK_ZERO)
    @message(deadline_s=600.0)
    async def expert_load(self) -> tuple[int, np.ndarray]:
        """RL steps done, and the (token, choice) pairs of each expert in the last one, int64 [layers, E]."""
        return await self.position(), self._learner.expert_load

    @dispatch(SPMD)
    @message(thread=True, deadline_s=600.0)
    def rewind(self) -> None:
        """Goes back to the newest checkpoint, as a restart does: for a controller that starts anew from there."""
        self._publisher.rewind()
        if (self._learner.stage, self._learner.step) != self._kept:
            self._learner = self._open()

    @dispatch(SPMD)
    @message(deadline_s=600.0)
    async def warm_up(self, until: int) -> dict[str, float]:
        """Goes on with the warm-up until it has done `until` steps; returns the metrics of the last of them, none if it
        had done as many, or RL has begun.

        Example number k of the run is always the same, so that a restart repeats and skips none.
        """
        metrics: dict[str, float] = await self.together(self._warm_up, until)
        return metrics

    def _warm_up(self, until: int) -> dict[str, float]:
        learner, settings = self._learner, self.sft
        metrics: dict[str, float] = {}
        while learner.stage == "sft" and learner.step < until:
            size = self.task.largest_size(learner.step, settings.steps)
            ordinals = np.arange(learner.step * settings.batch, (learner.step + 1) * settings.batch)
            examples = self.task.demonstrations(self.run.seed, ordinals, size)
            metrics = learner.sft_step([(e.prompt.tokens, e.response) for e in examples]) | {"max_size": size}
        return metrics

    @dispatch(ONE_TO_ALL)
    @message(thread=True, deadline_s=60.0)
    def digest(self) -> int:
        """A checksum of the weights: the same on all ranks."""
        checksum = 0
        for array in self._learner.weights().values():
            checksum = zlib.crc32(np.ascontiguousarray(array).data, checksum)
        return checksum

    @dispatch(SPMD)
    @message(deadline_s=600.0)
    async def step(self, number: int, update: PolicyUpdate) -> dict[str, float]:
        """RL step `number`, the next one. Raises ValueError if it is not, or a sample is too long, and
        FloatingPointError after too many updates without a finite gradient."""
        held = self._learner.step if self._learner.stage == "rl" else 0
        if number != held + 1:
            raise ValueError(f"RL step {number} can't follow {held}; show the trainer the batches in between")
        self._kept = "", 0  # A step that fails may have updated some mini-batches.
        metrics: dict[str, float] = await self.together(self._learner.rl_step, update)
        return metrics

    @dispatch(RANK_ZERO)
    @message(thread=True, deadline_s=60.0)
    def publish(self, version: int, keep: dict[int, list[str]] | None = None) -> Manifest:
        """Lays the weights out as `version`, where rollout can get them; older versions in `keep`, and who needs each,
        stay. Raises BadWeights if they are not finite, ExchangeFull if there is no memory for all of that.
        """
        weights = self._learner.weights()
        if self.publish_fp8:
            weights = shrink(weights, matrices(weights))
        return self._publisher.publish(version, weights, keep=keep)

    @dispatch(RANK_ZERO)
    @message(thread=True, deadline_s=120.0)
    def checkpoint(self, name: str, files: dict[str, bytes], parts: dict[str, str]) -> str:
        """Writes weights, optimizer, the controller's `files` and the `parts` of others as one checkpoint; returns the
        name that it got.

        Raises OSError if the disk is full; the previous checkpoint stays the latest.
        """
        arrays, info = self._learner.state()
        folder = checkpoints.write(
            self.run.path / "checkpoints", name, self.model, arrays, info, files, parts, keep=self.keep_checkpoints
        )
        self._kept = self._learner.stage, self._learner.step
        return folder.name

    def _open(self) -> Learner:
        import torch

        from .learner import Learner
        from .ranks import join_ranks

        torch.set_num_threads(1)
        self._ranks = self._ranks or join_ranks(self, self.run.path, self.model)
        learner = Learner(self.model, self.sft, self.rl, seed=self.run.seed, ranks=self._ranks)
        folder = latest_checkpoint(self.run.path)
        if folder is not None:
            config, arrays, info = checkpoints.read(folder)
            if config != self.model:
                raise ValueError(f"checkpoint {folder} is of another model than the [model] table: {config}")
            learner.load_state(arrays, info)
        self._kept = learner.stage, learner.step
        return learner
