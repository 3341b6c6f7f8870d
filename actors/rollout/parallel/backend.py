"""The backends of a rollout worker that spans several ranks: one for the first, one for each of the others.

    controller --load(manifest)--> first --take_part(manifest, ticket, experts)--> others: their parts, prepared
                                     '--the engine loads: an order in its place among the steps--> all change over

Ranks meet when the first weights come. Each reads its own part of what was published, and only that. What ends one of
them ends all: the gang is started again as one, and answers go on from their last chunks. Knows nothing of layers.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from ....runtime.errors import ActorDied, TransferFailed
from ....runtime.exchange import Manifest, Receiver, Route, Seat
from ....runtime.exchange.header import host_id
from ....runtime.thread import WorkThread
from ....runtime.worker_group import rank_names
from ...meeting import meeting_file
from ..local import LocalBackend, _import_torch
from ..requests import Chunk, Request
from .lost import RankLost

if TYPE_CHECKING:
    from ..actor import Rollout
    from ..local import Weights
    from .balance import Balance
    from .link import Link
    from .part import Part
    from .runner import Follower, RanksRunner


class RanksBackend(LocalBackend):
    """That of the first rank: the engine of a worker alone, with a runner that has the others compute with it."""

    def __init__(self, worker: Rollout) -> None:
        super().__init__(worker)
        self._meeting = meeting_file(worker, worker.run.path)
        self._met: asyncio.Future[None] | None = None
        self._link: Link | None = None
        self._runner: RanksRunner | None = None
        self._balance: Balance | None = None
        self._others = [worker.find(name) for name in rank_names(worker.name, worker.mesh.size)[1:]]
        self._receiver = Receiver()
        self._reading = WorkThread(f"{worker.name}:reading")
        self._loading = asyncio.Lock()  # All ranks take versions in the same order.
        self._tickets = 0

    def seat(self) -> Seat:
        return Seat(host=host_id(), carriers=("shm",))

    async def load(self, manifest: Manifest, route: Route | None = None) -> None:
        try:
            async with self._loading:
                await super().load(manifest, route)
        except (RankLost, ActorDied) as error:
            await self._worker.fail(error)

    async def close(self) -> None:
        await super().close()
        self._reading.close()
        self._receiver.close()
        if self._runner is not None:
            self._runner.close()
        elif self._link is not None:
            self._link.close()

    def _make_runner(self) -> RanksRunner:
        from ..room import num_pages_of
        from .balance import Balance
        from .runner import RanksRunner

        assert self._link is not None
        worker = self._worker
        size = worker.page_tokens
        num_pages = num_pages_of(
            worker.num_slots, worker.task.max_prompt_tokens, worker.rl.max_new_tokens,
            page_tokens=size, kv_tokens=worker.kv_tokens,
        )  # fmt: skip
        self._balance = Balance(worker.mesh, worker.model) if worker.ep > 1 else None
        self._runner = RanksRunner(
            self._link, worker.model, num_pages=num_pages, page_tokens=size, routes=worker.routes, balance=self._balance
        )
        return self._runner

    def stats(self) -> dict[str, Any]:
        return {**super().stats(), "moved_experts": self._balance.moves if self._balance is not None else 0}

    async def _receive(self, manifest: Manifest, route: Route | None) -> Weights:
        """The part of this rank, prepared; the others have theirs, too."""
        from .part import as_arrays, first_placements

        if route is not None and route.carrier != "shm":
            raise TransferFailed(f"the ranks of a worker read from the memory of their host, not by {route.carrier!r}")
        self._tickets += 1
        ticket, worker = self._tickets, self._worker
        placements = self._runner.placements if self._runner else first_placements(worker.mesh, worker.model)
        experts = as_arrays(placements)
        parts: list[Awaitable[Any]] = [self._own(manifest, ticket, experts)]
        parts += [other.take_part(manifest, ticket, experts) for other in self._others]
        own, *_ = await _all(parts)
        return await self._intake.prepare(manifest.version, own)

    def _prepare(self, version: int, tensors: Mapping[str, np.ndarray]) -> Weights:
        return tensors if self._engine is None else super()._prepare(version, tensors)

    async def _own(self, manifest: Manifest, ticket: int, experts: np.ndarray) -> Part:
        if self._met is None:
            self._met = asyncio.get_running_loop().create_future()
            self._worker.background(self._meet(self._met), name="meet")
        await asyncio.shield(self._met)  # It is done once, whoever asked for these weights.
        return await self._reading.run(_read, self._worker, self._receiver, manifest, ticket, experts)

    async def _meet(self, met: asyncio.Future[None]) -> None:
        self._link = await self._worker.in_thread(_meet, self._worker, self._meeting)
        met.set_result(None)


class FollowerBackend:
    """That of another rank: it generates nothing by itself."""

    def __init__(self, worker: Rollout) -> None:
        self._worker = worker
        self._meeting = meeting_file(worker, worker.run.path)
        self._receiver = Receiver()
        self._weights = WorkThread(f"{worker.name}:weights")  # The actor's own thread follows the first rank.
        self._joined: asyncio.Future[Follower] | None = None

    async def open(self) -> None:
        await self._worker.in_thread(_import_torch)

    async def close(self) -> None:
        self._weights.close()
        self._receiver.close()

    async def take_part(self, manifest: Manifest, ticket: int, experts: np.ndarray) -> None:
        """Prepares this rank's part of the weights, to be loaded when the first rank says so."""
        if self._joined is None:
            self._joined = asyncio.get_running_loop().create_future()
            self._worker.background(self._live(self._joined), name="follow")
        follower = await asyncio.shield(self._joined)
        part = await self._weights.run(_read, self._worker, self._receiver, manifest, ticket, experts)
        await self._weights.run(_take, follower, part)

    def seat(self) -> Seat:
        self._refuse()

    async def load(self, manifest: Manifest, route: Route | None = None) -> None:
        self._refuse()

    def check(self, request: Request) -> None:
        self._refuse()

    def generate(self, requests: list[Request]) -> AsyncGenerator[list[Chunk], None]:
        self._refuse()

    def stats(self) -> dict[str, Any]:
        return {}

    def _refuse(self) -> NoReturn:
        first = self._worker.name.partition("/")[0]
        raise ValueError(f"{self._worker.name} is a rank of {first} and follows it; ask {first}")

    async def _live(self, joined: asyncio.Future[Follower]) -> None:
        """Joins the others and follows the first, until the end of either."""
        from .runner import Follower

        link = await self._worker.in_thread(_meet, self._worker, self._meeting)
        follower = Follower(link, self._worker.model)
        joined.set_result(follower)
        following = asyncio.ensure_future(self._worker.in_thread(follower.follow))
        try:
            await asyncio.shield(following)
        finally:
            link.close()
            await asyncio.wait([following])


def _meet(worker: Rollout, meeting: Path) -> Link:
    """On a thread: joins the other ranks. Raises RankLost."""
    import torch

    from .link import Link

    return Link.meet(worker.mesh.place(worker.rank), meeting, torch.device("cpu"))


def _read(worker: Rollout, receiver: Receiver, manifest: Manifest, ticket: int, experts: np.ndarray) -> Part:
    """On a thread: this rank's part of what was published; nothing else is copied."""
    from ...model.decode import shapes
    from .part import check_shapes, cuts, empty_part, from_arrays

    check_shapes(shapes(worker.model), {spec.name: tuple(spec.shape) for spec in manifest.tensors})
    place, placements = worker.mesh.place(worker.rank), from_arrays(experts, worker.mesh, worker.model)
    part = empty_part(worker.model, place, placements)
    part.ticket = ticket
    receiver.receive(manifest, into=part, copies=list(cuts(worker.model, place, placements)))
    return part


def _take(follower: Follower, part: Part) -> None:
    """On the weights' thread, whose torch must not take the cores of those that compute."""
    _import_torch()
    follower.take(part)


async def _all(asked: Sequence[Awaitable[Any]]) -> list[Any]:
    """All answers; the first failure ends the others."""
    tasks = [asyncio.ensure_future(one) for one in asked]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
