"""What an algorithm is: settings, and a coroutine over roles.

    @dataclass(frozen=True, kw_only=True)
    class Mine(Algorithm):
        clip: float = 0.2                                            a key of the table [algorithm]

        async def step(self, batch, *, policy):                      the roles it names are the roles it gets:
            advantages = ...                                         policy, critic
            return await policy.update(batch, advantages, Objective(clip_high=self.clip))

A step updates the policy once, which makes the next policy version, and the critic as often as it likes. It has no
state of its own: everything that must survive is with the roles, which may be killed at any moment and are asked again.
Knows nothing of rollout, rewards or the pool.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeVar

import numpy as np

from ..types import Group
from .batch import Batch, Tokens
from .updates import Objective

T = TypeVar("T")

Metrics = dict[str, float]
"""By the names of actors/report.py."""


async def gather(*updates: Coroutine[Any, Any, T]) -> list[T]:
    """Waits for updates of several roles at the same time. If one fails the others are cancelled, and have ended,
    before its error goes on: none of them may reach a role that has gone back to its checkpoint meanwhile."""
    tasks = [asyncio.ensure_future(update) for update in updates]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


class Policy(Protocol):
    """The model that is trained."""

    async def update(
        self, batch: Batch, advantages: Sequence[np.ndarray | None], objective: Objective = ...
    ) -> Metrics:
        """One step on `advantages`, an array [n] for each response; with None in its place, it takes no part.

        Raises ValueError, naming the sample, if they don't fit the batch or are not finite.
        """


class Critic(Protocol):
    """The model that foresees returns."""

    async def values(self, batch: Batch) -> Tokens:
        """For each response float32 [n]: the expected return of the state before each token."""

    async def update(self, batch: Batch, returns: Sequence[np.ndarray]) -> Metrics:
        """One step of regression on `returns`, an array [n] for each response.

        Raises ValueError, naming the sample, if they don't fit the batch or are not finite.
        """


@dataclass(frozen=True, kw_only=True)
class Algorithm:
    """Base of all algorithms: frozen, keyword-only dataclasses whose fields are the keys of `[algorithm]`."""

    least_group: ClassVar[int] = 1
    """Fewest responses to a prompt that it can compare."""

    async def step(self, *args: Any, **roles: Any) -> Metrics:
        """`async def step(self, batch, *, policy)`, with `critic` as a further keyword if it needs one."""
        raise NotImplementedError

    async def pretrain(self, *args: Any, **roles: Any) -> Metrics:
        """`async def pretrain(self, batch, *, critic)`: one of the `value_steps`."""
        raise NotImplementedError

    @property
    def value_steps(self) -> int:
        """Steps between imitation and RL in which the policy stays as it is and only the critic learns."""
        return 0

    def keeps(self, group: Group) -> bool:
        """Whether a judged group is trained; if not, it is filtered and its slot given back."""
        return True
