"""Algorithms of users who did not read the manual, and one who did. Holds no tests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from headrace.actors.algorithms import Algorithm, Batch, Metrics, Policy


@dataclass(frozen=True, kw_only=True)
class Mine(Algorithm):
    async def step(self, batch: Batch, *, policy: Policy) -> Metrics:
        return {}


class NoAlgorithm:
    async def step(self, batch: Batch, *, policy: Policy) -> Metrics:
        return {}


class NoDataclass(Algorithm):
    beta: float = 0.1

    async def step(self, batch: Batch, *, policy: Policy) -> Metrics:
        return {}


@dataclass(frozen=True, kw_only=True)
class NoStep(Algorithm):
    pass


@dataclass(frozen=True, kw_only=True)
class PlainStep(Algorithm):
    def step(self, batch: Batch, *, policy: Policy) -> Metrics:  # type: ignore[override]
        return {}


@dataclass(frozen=True, kw_only=True)
class OtherRole(Algorithm):
    async def step(self, batch: Batch, *, actor: Any) -> Metrics:
        return {}


@dataclass(frozen=True, kw_only=True)
class NoPolicy(Algorithm):
    async def step(self, batch: Batch, *, critic: Any) -> Metrics:
        return {}


@dataclass(frozen=True, kw_only=True)
class NoPretrain(Mine):
    @property
    def value_steps(self) -> int:
        return 3


def plain(batch: Batch, *, policy: Policy) -> Metrics:
    return {}


async def no_policy(batch: Batch) -> Metrics:
    return {}


async def sound(batch: Batch, *, policy: Policy) -> Metrics:
    return await policy.update(batch, batch.spread(batch.rewards))
