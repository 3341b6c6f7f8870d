"""Ranks of a plan as actors, each in a process of its own. Holds no tests."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from headrace.actors.model.config import ModelConfig
from headrace.actors.model.shards import engine_holding, trainer_holding
from headrace.runtime import Actor, Lane, message
from headrace.runtime.exchange.buckets import Schedule
from headrace.runtime.exchange.header import stored
from headrace.runtime.exchange.plan import Plan, make_plan
from headrace.runtime.exchange.transfer import Transfer
from headrace.runtime.exchange.zmq_link import ZmqLink

MODEL = ModelConfig(
    vocab_size=32, hidden_size=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4, num_experts=4,
    moe_intermediate_size=16,
)  # fmt: skip

FSDP, EP, TP = 2, 2, 2
ENGINE_TP = 2
BUCKET_BYTES = 1024


def plan_for(engines: int) -> Plan:
    """Trainer ranks 0..3; engine ranks from 4 on, two for each engine."""
    source = trainer_holding(MODEL, fsdp=FSDP, ep=EP, tp=TP)
    return make_plan(source, engine_holding(MODEL, engines=engines, tp=ENGINE_TP, ep=ENGINE_TP, first=source.mesh.size))


def value(version: int, name: str) -> int:
    """What a whole tensor begins with in a version; it counts on from there."""
    return version * 1_000_000 + sum(map(ord, name)) * 100


@dataclass(kw_only=True)
class Rank(Actor):
    """Has its part of the trainer's weights, or two sets of an engine's."""

    rank: int
    dies_at: int = -1
    """Bucket with which it kills itself, in the epoch 1."""

    async def start(self) -> None:
        self.link = ZmqLink(self.rank, "tcp://127.0.0.1:0")
        self.weights: dict[str, np.ndarray] = {}

    async def stop(self, reason: BaseException | None) -> None:
        self.link.close()

    @message
    async def address(self) -> str:
        return self.link.address

    @message(thread=True, deadline_s=60.0)
    def transfer(self, version: int, epoch: int, engines: int, peers: dict[int, str]) -> int:
        """Takes part; an engine's rank swaps once all has come. Returns the number of its buckets."""
        plan = plan_for(engines)
        schedule = Schedule(plan, self.rank, bucket_bytes=BUCKET_BYTES)
        gives = self.rank < plan.dest.mesh.first
        source = trained(plan, self.rank, version) if gives else None
        dest = None if gives else {n: np.zeros(s, stored(d)) for n, (d, s) in plan.dest.local(self.rank).items()}
        self.link.begin(epoch, peers, deadline_s=30.0)
        link = _Dying(self.link, self.dies_at) if epoch == 1 and self.dies_at >= 0 else self.link
        Transfer(schedule, link, source, dest).run(version, epoch)
        self.weights = dest or {}
        return len(schedule.buckets)

    @message(concurrent=True, lane=Lane.CONTROL)
    async def abort(self, epoch: int) -> None:
        self.link.abort(epoch)

    @message(concurrent=True, lane=Lane.CONTROL)
    async def held(self) -> dict[str, np.ndarray]:
        return self.weights


class _Dying:
    """A link whose rank is killed when it has taken some buckets."""

    def __init__(self, link: ZmqLink, buckets: int) -> None:
        self._link = link
        self._left = buckets

    def send(self, dest: int, data: np.ndarray) -> Callable[[], None]:
        self._count()
        return self._link.send(dest, data)

    def receive(self, source: int, into: np.ndarray) -> Any:
        self._count()
        return self._link.receive(source, into)

    def _count(self) -> None:
        self._left -= 1
        if self._left < 0:
            os.kill(os.getpid(), signal.SIGKILL)


def wholes(plan: Plan, version: int) -> dict[str, np.ndarray]:
    """All tensors of a version."""
    return {
        whole.name: (value(version, whole.name) + np.arange(np.prod(whole.shape), dtype="<f4")).reshape(whole.shape)
        for whole in plan.wholes
    }


def trained(plan: Plan, rank: int, version: int) -> dict[str, np.ndarray]:
    """What a rank of the trainer has of a version, cut by hand: q and k by heads, experts by number, then by rows."""
    from test_exchange_plan import held_by

    return held_by(plan.source, wholes(plan, version), rank - plan.source.mesh.first)


def served(plan: Plan, rank: int, version: int) -> dict[str, np.ndarray]:
    """What a rank of an engine is to have of a version."""
    from test_exchange_plan import held_by

    return held_by(plan.dest, wholes(plan, version), rank - plan.dest.mesh.first)
