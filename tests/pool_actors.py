"""Actors for test_copies and test_rollout_pool, which live in processes of their own and need no torch."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from headrace.actors.rollout.pool import RolloutPool
from headrace.actors.rollout.requests import Chunk, Request
from headrace.actors.types import Group, Prompt, Trajectory
from headrace.runtime import Actor, Lane, message
from headrace.runtime.exchange import Manifest, Route, Seat
from headrace.runtime.worker import Worker


@dataclass(kw_only=True)
class Clerk(Actor):
    """One of several that are alike."""

    office: str = ""

    async def start(self) -> None:
        if self.office == "closed" and "_" in self.name:
            raise RuntimeError("no room for a second one")

    @message
    async def who(self) -> tuple[str, str, int]:
        return self.name, self.office, os.getpid()


@dataclass(kw_only=True)
class Rank(Worker):
    """One rank of a worker group."""

    @message
    async def who(self) -> tuple[str, int, int]:
        return self.name, self.rank, self.epoch


@dataclass(kw_only=True)
class Chief(Actor):
    """Asks for more or fewer of them."""

    @message(deadline_s=60.0)
    async def resize(self, of: str, count: int) -> list[str]:
        return await self.copies(of).resize(count)


@dataclass(kw_only=True)
class Scribe(Actor):
    """A rollout worker that writes its name's number, a token every few milliseconds, with the version it holds."""

    pause_s: float = 0.005

    async def start(self) -> None:
        self.version = -1
        self.stream = 0

    @message(concurrent=True, lane=Lane.CONTROL)
    async def seat(self) -> Seat:
        return Seat()

    @message(concurrent=True, lane=Lane.CONTROL)
    async def load(self, manifest: Manifest, route: Route) -> int:
        self.version = manifest.version
        return self.version

    @message(concurrent=True, lane=Lane.CONTROL)
    async def stats(self) -> dict[str, Any]:
        return {"version": self.version, "tokens": 1, "pid": os.getpid(), "refused": {self.name: 1, "both": 2}}

    @message(concurrent=True)
    async def generate(self, requests: list[Request]) -> AsyncIterator[list[Chunk]]:
        assert self.version >= 0, "asked before it had weights"
        number = int(self.name.partition("_")[2] or 1)
        (request,) = requests
        written = [len(prefix) for prefix in request.prefixes]
        while any(n < request.max_new_tokens for n in written):
            await asyncio.sleep(self.pause_s)
            chunks = []
            for index, member in enumerate(request.members):
                if written[index] < request.max_new_tokens:
                    written[index] += 1
                    chunks.append(
                        Chunk(
                            key=0, member=member, version=self.version, tokens=np.array([number], np.int32),
                            logprobs=np.zeros(1, np.float32),
                            finish="length" if written[index] == request.max_new_tokens else "",
                        )
                    )  # fmt: skip
            yield chunks


def group(ordinal: int, members: int = 2) -> Group:
    prompt = Prompt(ordinal=ordinal, tokens=np.array([1], np.int32), answer="", size=1)
    return Group(prompt=prompt, trajectories=[Trajectory(member=m) for m in range(members)])


@dataclass(kw_only=True)
class Editor(Actor):
    """Owns a pool as the controller does."""

    async def start(self) -> None:
        self.halts = self.goings = 0
        self.version = 0
        self.groups: list[Group] = []
        self.pool = RolloutPool(self, self, "scribe")
        await self.pool.open()
        await self.pool.publish(self.version)

    def halted(self, group: Group) -> None:
        self.halts += 1

    def continued(self, group: Group) -> None:
        self.goings += 1

    def armed(self, publish_s: float) -> None:
        assert publish_s >= 0

    async def lay_out(self, version: int, keep: dict[int, list[str]]) -> Manifest:
        return Manifest(
            name="policy", version=self.version, pid=1, fd=0, incarnation=1, generation=1, nbytes=0, bucket_bytes=1,
            tensors=[],
        )  # fmt: skip

    @message
    async def turn_a_deaf_ear(self) -> None:
        for watching in self.pool._watching.values():
            watching.cancel()

    @message(concurrent=True)
    async def publish(self, version: int) -> None:
        self.version = version
        await self.pool.publish(self.version)

    @message(concurrent=True, deadline_s=30.0)
    async def write(self, count: int, tokens: int, least: int = 0) -> list[Group]:
        groups = [group(ordinal) for ordinal in range(count)]
        self.groups = groups
        async with asyncio.TaskGroup() as tasks:
            for one in groups:
                tasks.create_task(self.pool.finish(one, least, max_new_tokens=tokens, temperature=1.0))
        return groups

    @message(concurrent=True)
    async def written(self) -> int:
        return sum(group.num_tokens for group in self.groups)

    @message(concurrent=True, deadline_s=60.0)
    async def resize(self, count: int) -> list[str]:
        return await self.pool.resize(count)

    @message(concurrent=True)
    async def state(self) -> tuple[list[dict[str, object]], list[str], int, int]:
        return self.pool.status(), self.pool.waits(), self.halts, self.goings

    @message(concurrent=True)
    async def stats(self) -> dict[str, Any]:
        return await self.pool.stats()
