"""The trainer as the controller sees it: it may die at any moment and nothing that it had learned is lost.

    train(batch) --> kept --> trainer        checkpoint() --> what is kept so far is forgotten
                       '---> shown again to a trainer that came back from its checkpoint

That is exact since the trainer is a deterministic state machine. Knows nothing of tensors, or of why the trainer died.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from typing import TypeVar

from ...runtime import Ref
from ...runtime.exchange import Manifest
from ..patience import patiently
from ..run_state import RunState
from ..types import Group

T = TypeVar("T")


class DurableTrainer:
    """One question at a time to a trainer that holds all that `state` counts, whichever incarnation answers.

    It moves `state` on, so the two never disagree.
    """

    def __init__(self, trainer: Ref, state: RunState) -> None:
        self._trainer = trainer
        self._state = state
        self._since_checkpoint: deque[tuple[int, list[Group]]] = deque()
        self._lock = asyncio.Lock()

    @property
    def num_kept(self) -> int:
        """Batches that a trainer which comes back now is shown again."""
        return len(self._since_checkpoint)

    async def rewind(self) -> None:
        """Back to the newest checkpoint: a controller that failed does not know what it had the trainer do since."""
        async with self._lock:
            await patiently(self._trainer.rewind)

    async def warm_up(self, until: int) -> dict[str, float]:
        """Warm-up up to step `until`; returns the metrics of that step."""
        async with self._lock:
            metrics: dict[str, float] = await patiently(lambda: self._trainer.warm_up(until))
            self._state.sft_steps = until
        return metrics

    async def train(self, batch: list[Group]) -> dict[str, float]:
        """The next RL step; returns its metrics."""
        async with self._lock:
            self._since_checkpoint.append((self._state.rl_steps + 1, batch))
            metrics = await patiently(self._catch_up)
            self._state.rl_steps += 1
            self._state.version += 1
        return metrics

    async def publish(self) -> Manifest:
        """The newest version, laid out for rollout."""
        async with self._lock:
            manifest: Manifest = await self._ask(lambda: self._trainer.publish(self._state.version))
        return manifest

    async def checkpoint(self, name: str, files: dict[str, bytes]) -> str:
        """Keeps everything so far under `name`, or one like it if that is taken; returns the name."""
        async with self._lock:
            folder: str = await self._ask(lambda: self._trainer.checkpoint(name, files))
            self._since_checkpoint.clear()
        return folder

    async def _ask(self, question: Callable[[], Awaitable[T]]) -> T:
        async def ask() -> T:
            await self._catch_up()
            return await question()

        return await patiently(ask)

    async def _catch_up(self) -> dict[str, float]:
        """Has the trainer repeat what it has not seen; returns the metrics of the last step that it had to do."""
        metrics: dict[str, float] = {}
        await self._trainer.warm_up(self._state.sft_steps)
        held = await self._trainer.position()
        for step, batch in self._since_checkpoint:
            if step > held:
                metrics = await self._trainer.step(step, batch)
        return metrics
