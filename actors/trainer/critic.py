"""Trains the critic of VAPO and PPO: says what states are worth, and regresses on the returns it is given.

    start: the critic of the newest checkpoint, or one that begins as the policy in it, or as random weights
    values(groups)   update(n, update)  -->  metrics        checkpoint(name)  -->  a draft, for the trainer to take in

A deterministic state machine as the trainer is, and as mortal: see durable.py. Knows nothing of algorithms.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ...runtime import message
from ...runtime.dispatch import RANK_ZERO, SPMD, dispatch
from ...runtime.rundir import RunSpec
from ...runtime.worker import Worker
from ..algorithms.updates import ValueUpdate
from ..model.config import ModelConfig
from ..run_state import latest_checkpoint
from ..types import Group
from . import checkpoint as checkpoints
from .settings import CriticSettings

if TYPE_CHECKING:
    from .ranks import Ranks
    from .value_learner import ValueLearner

PART = "critic"
"""Sub-folder of a checkpoint."""


@dataclass(kw_only=True)
class Critic(Worker):
    """One rank of the critic, or all of it. Its torch runs on the actor's own thread, so its node answers."""

    run: RunSpec
    model: ModelConfig
    critic: CriticSettings

    async def start(self) -> None:
        """Loads the newest checkpoint. Raises ValueError or FileNotFoundError, saying what to do, if it is damaged."""
        self._ranks: Ranks | None = None
        self._learner: ValueLearner = await self.in_thread(self._open)

    async def stop(self, reason: BaseException | None) -> None:
        if self._ranks is not None:
            self._ranks.close()

    @dispatch(RANK_ZERO)
    @message(deadline_s=600.0)
    async def position(self) -> int:
        """Updates that these weights have seen."""
        return self._learner.step

    @dispatch(SPMD)
    @message(thread=True, deadline_s=600.0)
    def rewind(self) -> None:
        """Goes back to the newest checkpoint, as a restart does: to the policy in it, if there is no critic yet."""
        self._learner = self._open()

    @dispatch(RANK_ZERO)
    @message(thread=True, deadline_s=600.0)
    def values(self, groups: list[Group]) -> list[np.ndarray]:
        """For each judged response float32 [n]: the value of the state before each token."""
        return self._learner.values(groups)

    @dispatch(SPMD)
    @message(deadline_s=600.0)
    async def update(self, number: int, update: ValueUpdate) -> dict[str, float]:
        """Update `number`, the next one. Raises ValueError if it is not, or a sample is too long, and
        FloatingPointError after too many updates without a finite gradient."""
        if number != self._learner.step + 1:
            raise ValueError(f"update {number} can't follow {self._learner.step}; show the critic those in between")
        metrics: dict[str, float] = await self.together(self._learner.update, update)
        return metrics

    @dispatch(RANK_ZERO)
    @message(thread=True, deadline_s=120.0)
    def checkpoint(self, name: str) -> str:
        """Writes weights and optimizer as a draft of a checkpoint's part; returns its folder. Raises OSError."""
        arrays, info = self._learner.state()
        return checkpoints.write_part(self.run.path / "checkpoints", f"{name}-{PART}", arrays, info).name

    def _open(self) -> ValueLearner:
        import torch

        from ..model.qwen3_moe import Qwen3Moe
        from .ranks import join_ranks
        from .value_learner import ValueLearner

        torch.set_num_threads(1)
        ranks = self._ranks = self._ranks or join_ranks(self, self.run.path, self.model)
        folder = latest_checkpoint(self.run.path)
        if folder is None:
            random = Qwen3Moe(self.model, seed=self.run.seed)
            weights = {name: parameter.detach().numpy() for name, parameter in random.named_parameters()}
            return ValueLearner(self.model, self.critic, weights, ranks=ranks)
        config, policy = checkpoints.read_policy(folder)
        if config != self.model:
            raise ValueError(f"checkpoint {folder} is of another model than the [model] table: {config}")
        learner = ValueLearner(self.model, self.critic, policy, ranks=ranks)
        if (folder / PART).is_dir():
            learner.load_state(*checkpoints.read_part(folder / PART))
        return learner
