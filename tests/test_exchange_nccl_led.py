"""Exchange, convoy, intakes and the ends of the NCCL carrier together: only the library below them is of threads."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from host_gpu import HostFabric, HostGpu, Hub

from headrace.runtime.errors import ActorDied, CommunicatorHung, TransferFailed
from headrace.runtime.exchange import Exchange, Intake, Manifest, Receiver, Route, Seat
from headrace.runtime.exchange.communicator import Limits
from headrace.runtime.exchange.nccl import NcclEnd, NcclSink, NcclSource

LIMITS = Limits(init_s=1.0, connect_s=0.5, abort_s=0.3)


def tensors(version: int) -> dict[str, Any]:
    random = torch.Generator().manual_seed(version)
    return {"w": torch.randn(64, 32, generator=random), "b": torch.randn(32, generator=random).to(torch.bfloat16)}


def copied(version: int, received: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: np.array(value) for name, value in received.items()}


class Process:
    """What publishers and members have in common: a GPU of their own, and an end that may cost them their life."""

    def __init__(self, name: str, hub: Hub, end: type[NcclEnd]) -> None:
        self.name, self.dead = name, ""
        self.gpu = HostGpu(number=sum(name.encode()))
        self.end: Any = end(
            name, self.gpu, limits=LIMITS, make=lambda _: HostFabric(hub, name), bucket_bytes=1024, on_hung=self.die
        )

    def die(self, why: str) -> None:
        self.dead = why

    async def answer(self, function: Callable[..., Any], *args: Any) -> Any:
        if self.dead:
            raise ActorDied(self.dead)
        return await asyncio.to_thread(function, *args)


class Trainer(Process):
    """See convoy.Port; its unique ids are numbers."""

    def __init__(self, hub: Hub) -> None:
        super().__init__("trainer", hub, NcclSource)

    async def lay_out(self, version: int, keep: dict[int, list[str]]) -> Manifest:
        manifest: Manifest = await self.answer(self.end.publish, version, tensors(version))
        return manifest

    async def retire(self, epoch: int) -> None:
        await self.answer(self.end.abort, epoch)

    async def open(self, epoch: int) -> bytes:
        return b"%128d" % epoch

    async def transfer(self, manifest: Manifest, route: Route) -> None:
        await self.answer(self.end.send, manifest, route)


class Engine(Process):
    """A member with an intake, as a rollout worker has one."""

    def __init__(self, name: str, hub: Hub) -> None:
        super().__init__(name, hub, NcclSink)
        self.intake: Intake[dict[str, np.ndarray]] = Intake(copied, {"nccl": self.end})
        self.weights: dict[str, np.ndarray] = {}

    async def seat(self) -> Seat:
        return replace(self.intake.seat(), gpu=self.gpu.uuid)

    async def load(self, manifest: Manifest, route: Route) -> int:
        self.weights = await self.intake.load(manifest, route)
        return manifest.version

    async def retire(self, epoch: int) -> None:
        if self.dead:
            raise ActorDied(self.dead)
        await self.intake.retire(epoch)

    async def open(self, epoch: int) -> bytes:
        raise AssertionError("a member opens nothing")

    async def transfer(self, manifest: Manifest, route: Route) -> None:
        if self.dead:
            raise ActorDied(self.dead)
        await self.intake.transfer(manifest, route)

    def has(self, version: int) -> bool:
        return all(np.array_equal(HostGpu().adopt(t)[1], self.weights[name]) for name, t in tensors(version).items())


@pytest.mark.slow
async def test_versions_come_by_nccl_to_all_and_a_member_that_hangs_costs_only_itself():
    hub = Hub()
    trainer, a, b = Trainer(hub), Engine("a", hub), Engine("b", hub)
    weights = Exchange(trainer.lay_out, leads={"trainer": trainer})
    await weights.join("a", a)
    await weights.join("b", b)
    inits = []
    for version in (1, 2, 3, 4):
        await weights.publish(version)
        assert await weights.settled() == {"a": version, "b": version}, weights.lost
        assert a.has(version) and b.has(version)
        inits.append(hub.inits)
    assert inits[1:] == [inits[1]] * 3, "a communicator is kept from version to version"

    late = Engine("late", hub)
    await weights.join("late", late)
    assert late.has(4), "who joins late has the newest"

    hub.frozen = {"b"}
    await weights.publish(5)
    assert await weights.settled() == {"a": 5, "b": 4, "late": 5}
    assert a.has(5) and late.has(5) and b.has(4)
    assert "b, rank " in weights.lost["b"] and "nothing moved for" in weights.lost["b"]
    hub.frozen = set()
    b.die("killed")
    await weights.publish(6)
    assert (await weights.settled())["a"] == 6
    assert a.has(6) and late.has(6)
    assert "killed" in weights.lost["b"]
    await ended(weights, trainer, a, late)
    assert not (trainer.dead or a.dead or late.dead), "nobody else"


async def test_an_init_that_hangs_is_reported_by_all_that_hang_in_it_and_weights_stay_whole():
    hub = Hub()
    trainer, a = Trainer(hub), Engine("a", hub)
    weights = Exchange(trainer.lay_out, leads={"trainer": trainer})
    await weights.join("a", a)
    await weights.publish(1)
    assert await weights.settled() == {"a": 1}
    hub.mute = {1, 2}
    b = Engine("b", hub)
    joining = asyncio.create_task(weights.join("b", b))
    while not any(line.startswith("b takes version 1 by nccl") for line in weights.waits()):  # noqa: ASYNC110
        await asyncio.sleep(0)
    await weights.publish(2)
    assert (await weights.settled())["a"] == 1
    assert a.has(1)
    assert "init has not returned" in weights.lost["a"] and "this process must end" in weights.lost["a"]
    await asyncio.gather(joining, return_exceptions=True)
    await ended(weights, *[p for p in (trainer, a, b) if not p.dead])


async def ended(weights: Exchange, *processes: Process) -> None:
    await weights.close()
    for process in processes:
        if isinstance(process, Engine):
            await process.intake.close()
        else:
            await asyncio.to_thread(process.end.close)


async def test_an_intake_closes_all_its_sinks_on_a_loop_and_says_which_did_not() -> None:
    class Odd(Receiver):
        closed = False

        def close(self) -> None:
            super().close()
            self.closed = True
            raise TransferFailed("odd")

    odd, last = Odd(), Odd()
    sinks = {"odd": odd, "nccl": NcclSink("a", HostGpu(), limits=LIMITS), "last": last}
    with pytest.raises(TransferFailed, match="odd"):
        await Intake(copied, sinks).close()
    assert odd.closed and last.closed

    await Intake(copied, {"nccl": NcclSink("well", HostGpu(), limits=LIMITS)}).close()
    busy = NcclSink("busy", HostGpu(), limits=Limits(look_s=0.01, abort_s=0.01))
    with busy._one, pytest.raises(CommunicatorHung, match=r"busy: a transfer of epoch .* does not end"):
        await Intake(copied, {"nccl": busy}).close()
