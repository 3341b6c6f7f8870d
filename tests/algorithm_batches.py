"""Groups and roles for tests of algorithms, held in one process. Holds no tests."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from headrace.actors.algorithms import Batch, Metrics, Objective
from headrace.actors.algorithms.batch import Tokens
from headrace.actors.types import Finish, Group, Prompt, Segment, Trajectory, Verdict


def group(
    rewards: Sequence[float],
    lengths: Sequence[int] | None = None,
    *,
    ordinal: int = 0,
    finish: Finish = "stop",
    seed: int = 0,
    vocab: int = 11,
) -> Group:
    """One answer for each reward; above 0 it is correct."""
    random = np.random.default_rng([seed, ordinal])
    trajectories = []
    for member, reward in enumerate(rewards):
        n = lengths[member] if lengths is not None else int(random.integers(1, 9))
        tokens = random.integers(0, vocab, n).astype(np.int32)
        segment = Segment(version=1, tokens=tokens, logprobs=random.uniform(-3, -1.5, n).astype(np.float32))
        verdict = Verdict(correct=reward > 0)
        trajectories.append(
            Trajectory(member=member, segments=[segment], finish=finish, verdict=verdict, reward=reward)
        )
    prompt = Prompt(ordinal=ordinal, tokens=random.integers(0, vocab, 3).astype(np.int32), answer="", size=2)
    return Group(prompt=prompt, trajectories=trajectories)


def groups(count: int, *, size: int = 4, seed: int = 0) -> list[Group]:
    """Half of each group right."""
    return [group([1.0 if m % 2 else -1.0 for m in range(size)], ordinal=i, seed=seed) for i in range(count)]


class RecordedPolicy:
    """Remembers what it was asked."""

    def __init__(self) -> None:
        self.advantages: list[np.ndarray | None] = []
        self.objective = Objective()

    async def update(
        self, batch: Batch, advantages: Sequence[np.ndarray | None], objective: Objective | None = None
    ) -> Metrics:
        batch.check(advantages, "advantages")
        self.advantages, self.objective = [*advantages], objective or Objective()
        return {"loss": 0.5}


class RecordedCritic:
    """Says what it was told to say, and remembers what it was asked."""

    def __init__(self, said: Tokens) -> None:
        self.said = said
        self.returns: Tokens = []

    async def values(self, batch: Batch) -> Tokens:
        return self.said

    async def update(self, batch: Batch, returns: Sequence[np.ndarray]) -> Metrics:
        batch.check(returns, "returns")
        self.returns = [*returns]
        return {"value_loss": 0.25}
