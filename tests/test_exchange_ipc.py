"""CUDA IPC without a GPU: who may read which memory, when, and what becomes of it; the driver is a dictionary."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from host_gpu import HostGpu

from headrace.runtime.errors import BadWeights, CorruptWeights, ExchangeFull, StaleIncarnation, TransferFailed
from headrace.runtime.exchange import Exchange, Intake, Publisher, Seat, cuda, device, together
from headrace.runtime.exchange.header import Manifest, Route
from headrace.runtime.exchange.ipc import HANDLE_BYTES, CudaMemory, IpcSink, IpcSource


class Driver:
    """See ipc.Memory. What is freed while somebody has it mapped is said."""

    def __init__(self) -> None:
        self.allocations: dict[bytes, Any] = {}
        self.mapped: list[int] = []

    def allocate(self, num_bytes: int) -> tuple[int, bytes]:
        memory = (ctypes.c_uint8 * num_bytes)()
        handle = os.urandom(HANDLE_BYTES)
        self.allocations[handle] = memory
        return ctypes.addressof(memory), handle

    def free(self, address: int) -> None:
        assert address not in self.mapped, "freed while it is mapped"
        self.allocations = {h: m for h, m in self.allocations.items() if ctypes.addressof(m) != address}

    def open(self, handle: bytes) -> int:
        if handle not in self.allocations:
            raise TransferFailed("can't map the publisher's memory: invalid resource handle")
        address = ctypes.addressof(self.allocations[handle])
        assert address not in self.mapped, "mapped twice"
        self.mapped.append(address)
        return address

    def close(self, address: int) -> None:
        self.mapped.remove(address)


class Pair:
    """A publisher and a member on one GPU."""

    def __init__(self) -> None:
        self.driver = Driver()
        self.source = IpcSource("trainer", HostGpu(), self.driver)
        self.sink = IpcSink("engine", HostGpu(), self.driver)

    def route(self, epoch: int = 0) -> Route:
        return Route(
            carrier="ipc", epoch=epoch, members=("trainer", "engine"), rank=1, token=self.source.open(epoch)[1]
        )

    def receive(self, manifest: Manifest, **options: Any) -> Any:
        return self.sink.receive(manifest, self.route(), **options)


def tensors(seed: int) -> dict[str, Any]:
    random = torch.Generator().manual_seed(seed)
    return {
        "a": torch.randn(5, 7, generator=random),
        "b": torch.randn(3, 3, generator=random).to(torch.bfloat16),
        "c": torch.randn(4, generator=random).numpy(),
    }


def test_versions_come_whole_into_new_tensors_or_given_ones():
    pair = Pair()
    into = tensors(9)
    for version in range(1, 6):
        sent = tensors(version)
        got = pair.receive(pair.source.publish(version, sent), into=into if version % 2 else None)
        for name in sent:
            assert np.array_equal(HostGpu().adopt(got[name])[1], HostGpu().adopt(sent[name])[1])
    assert len(pair.driver.mapped) == 1, "it is mapped once"
    pair.sink.close()
    pair.source.close()
    assert pair.driver.mapped == []
    assert pair.driver.allocations == {}


def test_the_version_before_can_still_be_read_and_an_older_one_is_refused():
    pair = Pair()
    manifests = [pair.source.publish(version, tensors(version)) for version in (1, 2, 3)]
    for version in (2, 3):
        assert np.array_equal(pair.receive(manifests[version - 1])["c"], tensors(version)["c"])
    with pytest.raises(StaleIncarnation, match="version 1 of trainer was overwritten by a newer one"):
        pair.receive(manifests[0])


def test_a_version_that_is_overwritten_while_it_is_read_is_refused():
    pair = Pair()
    pair.source.publish(1, tensors(1))
    manifest = pair.source.publish(2, tensors(2))
    assert manifest.fd == 0
    words = HostGpu().wrap(ctypes.addressof(next(iter(pair.driver.allocations.values()))), 4096)

    class Slow(HostGpu):
        def checksum(self, data: np.ndarray, out: np.ndarray) -> None:
            super().checksum(data, out)
            words[8:16].view(np.uint64)[0] += 2  # The publisher begins the version after the next.

    with pytest.raises(StaleIncarnation, match="overwritten"):
        IpcSink("slow", Slow(), pair.driver).receive(manifest, pair.route())


def test_memory_that_changed_does_not_match_its_checksums():
    pair = Pair()
    manifest = pair.source.publish(1, tensors(1))
    assert pair.source._shared is not None
    pair.source._shared.payload(manifest.fd, manifest.nbytes)[3] ^= 1
    with pytest.raises(CorruptWeights, match="does not match its checksums"):
        pair.receive(manifest)


def test_boxes_are_copied_where_they_are_wanted():
    from headrace.runtime.exchange.boxes import Box
    from headrace.runtime.exchange.plan import Copy

    pair = Pair()
    mine = {"half": np.zeros((5, 3), np.float32)}
    copy = Copy(0, "a", Box((0, 4), (5, 7)), 1, "half", Box((0, 0), (5, 3)))
    pair.receive(pair.source.publish(1, tensors(1)), into=mine, copies=[copy])
    assert np.array_equal(mine["half"], tensors(1)["a"].numpy()[:, 4:])


def test_a_publisher_whose_process_has_ended_is_not_read_and_its_memory_is_given_back():
    pair = Pair()
    manifest = pair.source.publish(1, tensors(1))
    pair.receive(manifest)
    gone = subprocess.Popen([sys.executable, "-c", "pass"])
    gone.wait()
    with pytest.raises(StaleIncarnation, match=f"its process {gone.pid} has ended"):
        pair.receive(replace(manifest, pid=gone.pid))
    assert pair.driver.mapped == []


def test_a_publisher_that_comes_back_has_other_memory_and_the_old_mapping_is_closed():
    pair = Pair()
    pair.receive(pair.source.publish(7, tensors(7)))
    pair.source = IpcSource("trainer", HostGpu(), pair.driver)
    assert np.array_equal(pair.receive(pair.source.publish(3, tensors(3)))["c"], tensors(3)["c"])
    assert len(pair.driver.mapped) == 1


def test_mistakes_are_refused_and_the_last_version_stays():
    pair = Pair()
    with pytest.raises(TransferFailed, match="publish, then open"):
        pair.source.open(0)
    good = pair.source.publish(2, tensors(2))
    with pytest.raises(BadWeights, match="a of version 3 has values that are not finite"):
        pair.source.publish(3, tensors(3) | {"a": torch.full((5, 7), torch.nan)})
    with pytest.raises(BadWeights, match="versions rise"):
        pair.source.publish(2, tensors(3))
    with pytest.raises(BadWeights, match="d was not there, is <f4"):
        pair.source.publish(3, tensors(3) | {"d": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"into\['c'\] must be float32 \[4\], got nothing"):
        pair.receive(good, into={"a": torch.zeros(5, 7), "b": torch.zeros(3, 3, dtype=torch.bfloat16)})
    pair.sink.abort(4)
    with pytest.raises(TransferFailed, match="epoch 4 is over here"):
        pair.sink.receive(good, pair.route(4))
    with pytest.raises(TransferFailed, match="must be a handle of 64 bytes, got 1"):
        pair.sink.receive(good, replace(pair.route(5), token=b"x"))
    assert np.array_equal(pair.sink.receive(good, pair.route(5))["c"], tensors(2)["c"])


async def test_what_a_publisher_has_on_its_gpu_and_on_its_host_comes_to_each_member_by_what_fits() -> None:
    def copied(version: int, received: Mapping[str, Any]) -> dict[str, Any]:
        return {name: np.array(value) for name, value in received.items()}

    class Member:
        def __init__(self, sinks: Mapping[str, Any]) -> None:
            self.intake: Intake[dict[str, Any]] = Intake(copied, sinks)

        async def seat(self) -> Seat:
            return self.intake.seat()

        async def load(self, manifest: Manifest, route: Route) -> int:
            self.carrier, self.weights = route.carrier, await self.intake.load(manifest, route)
            return manifest.version

    driver, host = Driver(), Publisher("trainer")
    gpu = IpcSource("trainer", HostGpu(), driver)

    async def lay_out(version: int, keep: dict[int, list[str]]) -> Manifest:
        sent = {"w": np.full((7, 30), version, np.float32)}
        return together(host.publish(version, sent, keep=keep), gpu.publish(version, sent))

    near, far = IpcSink("near", HostGpu(), driver), IpcSink("far", HostGpu(number=1), driver)
    members = {"near": Member({"ipc": near}), "far": Member({"ipc": far}), "plain": Member({})}
    weights = Exchange(lay_out)
    for name, member in members.items():
        await weights.join(name, member)
    for version in (1, 2, 3):
        await weights.publish(version)
        assert await weights.settled() == dict.fromkeys(members, version), weights.lost
        assert all((member.weights["w"] == version).all() for member in members.values())
        assert [member.carrier for member in members.values()] == ["ipc", "shm", "shm"]
    with pytest.raises(
        BadWeights, match=r"one name, host and version, .* trainer version 3 by ipc; .* version 3 by ipc"
    ):
        together(gpu.manifest, gpu.manifest)
    await weights.close()
    for member in members.values():
        await member.intake.close()
    assert driver.mapped == []
    gpu.close()
    host.close()


def test_cupys_runtime_has_what_the_carrier_calls():
    runtime = pytest.importorskip("cupy").cuda.runtime
    for name, signature in {
        "ipcGetMemHandle": "ipcGetMemHandle(intptr_t devPtr)",
        "ipcOpenMemHandle": "ipcOpenMemHandle(bytes handle, unsigned int flags=cudaIpcMemLazyEnablePeerAccess)",
        "ipcCloseMemHandle": "ipcCloseMemHandle(intptr_t devPtr)",
    }.items():
        assert getattr(runtime, name).__doc__.splitlines()[0] == signature
    if cuda.why_no_gpu():
        with pytest.raises(TransferFailed, match="can't map the publisher's memory on GPU 0"):
            CudaMemory(device.Gpu()).open(bytes(HANDLE_BYTES))
        with pytest.raises(ExchangeFull, match="can't get 1 MiB on GPU 0 to share weights"):
            CudaMemory(device.Gpu()).allocate(1 << 20)
