"""Trainer and critic as the controller sees them: they may die at any moment and nothing they had learned is lost.

    update --> kept --> actor        checkpoint --> what is kept so far is forgotten
                 '---> shown again to an incarnation that came back from its checkpoint

That is exact since both are deterministic state machines, and are shown the very updates that they were given before,
advantages and returns included. Knows nothing of tensors, or of why an actor died.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

import numpy as np

from ...runtime import Ref
from ...runtime.exchange import Manifest
from ...runtime.worker_group import WorkerGroup
from ..algorithms.algorithm import Metrics
from ..algorithms.batch import Batch, Tokens
from ..algorithms.updates import Objective, PolicyUpdate, ValueUpdate
from ..patience import patiently
from ..run_state import RunState
from .settings import RlSettings

T = TypeVar("T")
U = TypeVar("U", PolicyUpdate, ValueUpdate)


class _Durable(Generic[U]):
    """One question at a time to an actor that holds all that `state` counts, whichever incarnation answers."""

    def __init__(self, actor: Ref | WorkerGroup, state: RunState) -> None:
        self._actor = actor
        self._state = state
        self._since_checkpoint: deque[tuple[int, U]] = deque()
        self._lock = asyncio.Lock()

    @property
    def num_kept(self) -> int:
        """Updates that an incarnation which comes back now is shown again."""
        return len(self._since_checkpoint)

    async def rewind(self) -> None:
        """Back to the newest checkpoint: a controller that failed does not know what it had the actor do since."""
        async with self._lock:
            await patiently(self._actor.rewind)

    async def _ask(self, question: Callable[[], Awaitable[T]]) -> T:
        async def ask() -> T:
            await self._catch_up()
            return await question()

        return await patiently(ask)

    async def _catch_up(self) -> Metrics:
        """Has the actor repeat what it has not seen; returns the metrics of the last update that it had to do."""
        metrics: Metrics = {}
        held = await self._actor.position()
        for number, update in self._since_checkpoint:
            if number > held:
                metrics = await self._repeat(number, update)
        return metrics

    async def _repeat(self, number: int, update: U) -> Metrics:
        raise NotImplementedError


class DurableTrainer(_Durable[PolicyUpdate]):
    """The policy of an algorithm. It moves `state` on, so the two never disagree."""

    def __init__(self, actor: Ref | WorkerGroup, state: RunState, rl: RlSettings | None = None) -> None:
        super().__init__(actor, state)
        self.rl = rl
        """Its learning rate and temperature go with every update, as they are then: they may change, and an update that
        is shown again is the same. None: as the trainer was configured."""

    async def warm_up(self, until: int) -> Metrics:
        """Warm-up up to step `until`; returns the metrics of that step."""
        async with self._lock:
            metrics: Metrics = await patiently(lambda: self._actor.warm_up(until))
            self._state.sft_steps = until
        return metrics

    async def update(
        self, batch: Batch, advantages: Sequence[np.ndarray | None], objective: Objective | None = None
    ) -> Metrics:
        """The next RL step; see Policy."""
        batch.check(advantages, "advantages")
        given = [None if row is None else row.astype(np.float32, copy=False) for row in advantages]
        update = PolicyUpdate(
            groups=batch.groups, advantages=given, objective=objective or Objective(),
            **({} if self.rl is None else {"learning_rate": self.rl.learning_rate, "temperature": self.rl.temperature}),
        )  # fmt: skip
        async with self._lock:
            self._since_checkpoint.append((self._state.rl_steps + 1, update))
            metrics = await patiently(self._catch_up)
            self._state.rl_steps += 1
            self._state.version += 1
        return metrics

    async def publish(self, keep: dict[int, list[str]] | None = None) -> Manifest:
        """The newest version, laid out for rollout; what is in `keep`, and who needs it, stays."""
        async with self._lock:
            manifest: Manifest = await self._ask(lambda: self._actor.publish(self._state.version, keep))
        return manifest

    async def checkpoint(self, name: str, files: dict[str, bytes], parts: dict[str, str]) -> str:
        """Keeps everything so far under `name`, or one like it if that is taken; returns the name. `parts`:
        sub-folder -> draft that another actor has written."""
        async with self._lock:
            folder: str = await self._ask(lambda: self._actor.checkpoint(name, files, parts))
            self._since_checkpoint.clear()
        return folder

    async def _catch_up(self) -> Metrics:
        await self._actor.warm_up(self._state.sft_steps)
        return await super()._catch_up()

    async def _repeat(self, number: int, update: PolicyUpdate) -> Metrics:
        metrics: Metrics = await self._actor.step(number, update)
        return metrics


class DurableCritic(_Durable[ValueUpdate]):
    """The critic of an algorithm. It moves `state` on, so the two never disagree."""

    async def values(self, batch: Batch) -> Tokens:
        """See Critic."""
        async with self._lock:
            values: Tokens = await self._ask(lambda: self._actor.values(batch.groups))
        batch.check(values, "values")
        return values

    async def update(self, batch: Batch, returns: Sequence[np.ndarray]) -> Metrics:
        """The next update; see Critic."""
        batch.check(returns, "returns")
        given = [row.astype(np.float32, copy=False) for row in returns]
        async with self._lock:
            number = self._state.critic_updates + 1
            self._since_checkpoint.append((number, ValueUpdate(groups=batch.groups, returns=given)))
            metrics = await patiently(self._catch_up)
            self._state.critic_updates = number
        return metrics

    async def checkpoint(self, name: str) -> dict[str, str]:
        """A draft with everything so far, as a part for the trainer's checkpoint `name`; none before the first update.

        Call `forget` when that is written.
        """
        if not self._state.critic_updates:
            return {}
        async with self._lock:
            draft: str = await self._ask(lambda: self._actor.checkpoint(name))
        return {"critic": draft}

    def forget(self) -> None:
        """What is kept so far is in a checkpoint."""
        self._since_checkpoint.clear()

    async def _repeat(self, number: int, update: ValueUpdate) -> Metrics:
        metrics: Metrics = await self._actor.update(number, update)
        return metrics
