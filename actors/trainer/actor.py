"""Trains the policy: imitation first, then DAPO on the batches it is given; publishes and keeps its weights.

    start: newest checkpoint, or random weights
    warm_up(until) / step(n, groups)  -->  metrics        publish(version)  -->  Manifest of shared memory
    checkpoint(...)  -->  a folder that appears whole or not at all        rewind(): as a restart

A deterministic state machine: the same checkpoint and the same batches give the same weights, bit for bit on a CPU.
Knows nothing of rollout, rewards or the pool.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import numpy as np
from annotated_types import Ge

from ...runtime import Actor, message
from ...runtime.exchange import Manifest, Publisher
from ...runtime.rundir import RunSpec
from ..data.task import Task
from ..model.config import ModelConfig
from ..run_state import latest_checkpoint
from ..types import Group
from . import checkpoint as checkpoints
from .settings import RlSettings, SftSettings

if TYPE_CHECKING:
    from .learner import Learner


@dataclass(kw_only=True)
class Trainer(Actor):
    """One trainer process. Its torch runs on the actor's own thread, so the node answers while a step computes."""

    run: RunSpec
    model: ModelConfig
    task: Task
    sft: SftSettings
    rl: RlSettings
    keep_checkpoints: Annotated[int, Ge(1)] = 2
    """Newest checkpoints that are kept."""

    async def start(self) -> None:
        """Loads the newest checkpoint. Raises ValueError or FileNotFoundError, saying what to do, if it is damaged."""
        self._publisher = Publisher("policy")
        self._kept: tuple[str, int] = "sft", 0
        self._learner: Learner = await self.in_thread(self._open)

    async def stop(self, reason: BaseException | None) -> None:
        self._publisher.close()

    @message(deadline_s=600.0)
    async def position(self) -> int:
        """RL steps that these weights have seen."""
        return self._learner.step if self._learner.stage == "rl" else 0

    @message(thread=True, deadline_s=600.0)
    def rewind(self) -> None:
        """Goes back to the newest checkpoint, as a restart does: for a controller that starts anew from there."""
        if (self._learner.stage, self._learner.step) != self._kept:
            self._learner = self._open()

    @message(thread=True, deadline_s=600.0)
    def warm_up(self, until: int) -> dict[str, float]:
        """Goes on with the warm-up until it has done `until` steps; returns the metrics of the last of them, none if it
        had done as many, or RL has begun.

        Example number k of the run is always the same, so that a restart repeats and skips none.
        """
        learner, settings = self._learner, self.sft
        metrics: dict[str, float] = {}
        while learner.stage == "sft" and learner.step < until:
            size = self.task.largest_size(learner.step, settings.steps)
            ordinals = np.arange(learner.step * settings.batch, (learner.step + 1) * settings.batch)
            examples = self.task.demonstrations(self.run.seed, ordinals, size)
            metrics = learner.sft_step([(e.prompt.tokens, e.response) for e in examples]) | {"max_size": size}
        return metrics

    @message(thread=True, deadline_s=600.0)
    def step(self, number: int, groups: list[Group]) -> dict[str, float]:
        """RL step `number`, the next one. Raises ValueError if it is not, and FloatingPointError if the loss or its
        gradient is not finite."""
        held = self._learner.step if self._learner.stage == "rl" else 0
        if number != held + 1:
            raise ValueError(f"RL step {number} can't follow {held}; show the trainer the batches in between")
        return self._learner.rl_step(groups)

    @message(thread=True, deadline_s=60.0)
    def publish(self, version: int) -> Manifest:
        """Lays the weights out in shared memory as `version`. Raises BadWeights if they are not finite."""
        return self._publisher.publish(version, self._learner.weights())

    @message(thread=True, deadline_s=120.0)
    def checkpoint(self, name: str, files: dict[str, bytes]) -> str:
        """Writes weights, optimizer and the controller's `files` as one checkpoint; returns the name that it got.

        Raises OSError if the disk is full; the previous checkpoint stays the latest.
        """
        arrays, info = self._learner.state()
        folder = checkpoints.write(
            self.run.path / "checkpoints", name, self.model, arrays, info, files, keep=self.keep_checkpoints
        )
        self._kept = self._learner.stage, self._learner.step
        return folder.name

    def _open(self) -> Learner:
        import torch

        from .learner import Learner

        torch.set_num_threads(1)
        learner = Learner(self.model, self.sft, self.rl, seed=self.run.seed)
        folder = latest_checkpoint(self.run.path)
        if folder is not None:
            config, arrays, info = checkpoints.read(folder)
            if config != self.model:
                raise ValueError(f"checkpoint {folder} is of another model than the [model] table: {config}")
            learner.load_state(arrays, info)
        self._kept = learner.stage, learner.step
        return learner
