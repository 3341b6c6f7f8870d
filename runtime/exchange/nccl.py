"""NCCL through cupy: weights from the GPUs of a publisher to those of its members, by a plan, all at once.

    NcclSource.open(epoch) -> unique id --Route--> NcclSource.send, NcclSink.receive: form (once), move, verify

Each end has a Communicator (communicator.py), whose threads make all the calls of NCCL, on a stream of their own;
whoever calls `send` and `receive` is its watchdog. Set NCCL_PROTO=Simple for nodes that exchange weights: an abort has
hung under others. What hangs even after an abort costs its process, which ends itself once that is reported; the
supervisor starts it again.

cupy's API, as of 14.2: init blocks; abort and destroy forget the handle, later calls then report an invalid argument;
there is no dtype of 8-bit floats, so that bytes are sent; non-blocking communicators do not work (an ncclInProgress
becomes KeyError). Not yet measured on a GPU.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar

from ..errors import BadWeights, CommunicatorHung, StaleIncarnation, TransferFailed
from .buckets import Schedule
from .carrier import Copy, Tensors
from .communicator import Communicator, Fabric, Limits
from .cuda import nccl, why_no_gpu, why_no_nccl
from .device import Gpu, refuse_non_finite
from .device_transfer import DeviceTransfer
from .header import ALIGN, Manifest, Route, Seat, TensorSpec, host_id
from .holding import Held, Holding, Part, Whole
from .last_resort import end_this_process
from .mesh import Mesh
from .plan import Plan, make_plan

BUCKET_BYTES = 32 << 20
"""Large enough for the rate of a link between GPUs; memory that each end needs beside the weights."""

UNIQUE_ID_BYTES = 128

NEVER = 1 << 63
"""An epoch after all others."""


class CupyFabric:
    """One communicator of NCCL. See communicator.Fabric."""

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        self._stream: Any = None
        self._comm: Any = None

    def init(self, size: int, token: bytes, rank: int) -> None:
        with self._reported("init"):
            self._stream = self._gpu.stream()
            self._comm = nccl().NcclCommunicator(size, token, rank)

    def run(self, work: Callable[[], None]) -> None:
        with self._gpu.here(self._stream):
            work()

    def group_start(self) -> None:
        with self._reported("group start"):
            nccl().groupStart()

    def send(self, address: int, num_bytes: int, peer: int) -> None:
        with self._reported("send"):
            self._comm.send(address, num_bytes, nccl().NCCL_UINT8, peer, self._stream.ptr)

    def receive(self, address: int, num_bytes: int, peer: int) -> None:
        with self._reported("receive"):
            self._comm.recv(address, num_bytes, nccl().NCCL_UINT8, peer, self._stream.ptr)

    def group_end(self) -> None:
        with self._reported("group end"):
            nccl().groupEnd()

    def record(self) -> Any:
        with self._reported("event"):
            return self._gpu.event(self._stream)

    def done(self, event: Any) -> bool:
        with self._reported("event query"):
            return bool(event.done)

    def check(self) -> None:
        with self._reported("look for asynchronous errors"):
            self._comm.check_async_error()

    def abort(self) -> None:
        if self._comm is not None:
            self._comm.abort()

    def finalize(self) -> None:
        with self._reported("destroy"):
            self._stream.synchronize()
            self._comm.destroy()

    @contextmanager
    def _reported(self, step: str) -> Iterator[None]:
        try:
            with self._gpu.on():
                yield
        except nccl().NcclError as error:
            raise TransferFailed(f"{step} on GPU {self._gpu.number}: {error}") from None


PlanFor = Callable[[Manifest, Route], Plan]
"""Ranks of the plan are places in `Route.members`: first those of the publisher's side, then the members."""


def whole_plan(manifest: Manifest, route: Route) -> Plan:
    """One publisher, and every member gets every tensor whole."""
    held = [Held(spec.name, (Part(Whole(spec.name, spec.dtype, tuple(spec.shape))),)) for spec in manifest.tensors]
    members = Mesh({"member": len(route.members) - 1}, first=1)
    return make_plan(Holding(Mesh({"publisher": 1}), held), Holding(members, held))


class NcclEnd:
    """What publisher and member have in common: a communicator, used by one transfer at a time."""

    def __init__(
        self,
        name: str,
        gpu: Gpu | None = None,
        *,
        plan: PlanFor = whole_plan,
        bucket_bytes: int = BUCKET_BYTES,
        quantized: Collection[str] = (),
        limits: Limits | None = None,
        make: Callable[[Gpu], Fabric] = CupyFabric,
        on_hung: Callable[[str], None] = end_this_process,
    ) -> None:
        """`plan`, `bucket_bytes` and `quantized`, names of tensors that travel as FP8, must be the same at all ends."""
        self.name = name
        self._gpu = gpu or Gpu()
        self._quantized = tuple(quantized)
        self._plan_for = plan
        self._bucket_bytes = bucket_bytes
        self._limits = limits or Limits()
        self._communicator = Communicator(name, lambda: make(self._gpu), self._limits)
        self._on_hung = on_hung
        self._one = threading.Lock()
        self._schedule: tuple[tuple[Any, ...], Schedule] | None = None

    @property
    def gpu(self) -> str:
        """The UUID of its GPU."""
        return self._gpu.uuid

    def abort(self, epoch: int) -> None:
        """Ends what goes on in this epoch or earlier ones; when it returns, nothing of them is left here.

        Raises CommunicatorHung: this process ends.
        """
        self._alone(epoch, lambda: self._communicator.retire(epoch))

    def close(self) -> None:
        """Ends what goes on, and gives the communicator back. Raises CommunicatorHung. Not on a thread with a loop."""
        self._alone(NEVER, self._communicator.close)

    def waits(self) -> list[dict[str, Any]]:
        """What it waits for, as waits.Waits.rows."""
        return self._communicator.waits()

    def _transfer(self, manifest: Manifest, route: Route, source: Mapping[str, Any], dest: Mapping[str, Any]) -> None:
        if len(route.token) != UNIQUE_ID_BYTES:
            raise TransferFailed(f"the route's token must be NCCL's unique id of 128 bytes, got {len(route.token)}")
        with self._one:
            schedule = self._scheduled(manifest, route)
            with self._gpu.here():
                transfer = DeviceTransfer(
                    self._gpu, schedule, source, dest, version=manifest.version, epoch=route.epoch
                )
                transfer.copy_local()
            self._blocking(
                self._communicator.transfer(
                    route.epoch, lambda _: transfer.waves(), rank=route.rank, size=len(route.members),
                    token=route.token, deadline_s=route.deadline_s, stall_s=route.stall_s,
                )
            )  # fmt: skip
            with self._gpu.here():
                transfer.verify()

    def _scheduled(self, manifest: Manifest, route: Route) -> Schedule:
        """Computed again only when the tensors or the members are others."""
        key = (tuple((s.name, s.dtype, tuple(s.shape)) for s in manifest.tensors), route.members, route.rank)
        if self._schedule is None or self._schedule[0] != key:
            plan = self._plan_for(manifest, route)
            self._schedule = key, Schedule(plan, route.rank, bucket_bytes=self._bucket_bytes, quantized=self._quantized)
        return self._schedule[1]

    def _alone(self, epoch: int, work: Callable[[], Any]) -> None:
        """Does it once the transfer of this epoch, or an earlier one, has ended."""
        self._communicator.tell(epoch, "the exchange ends this epoch")
        if not self._one.acquire(timeout=self._limits.look_s + 3 * self._limits.abort_s):
            raise CommunicatorHung(f"{self.name}: a transfer of epoch {epoch} does not end: {self.waits()}")
        try:
            self._blocking(work())
        finally:
            self._one.release()

    def _blocking(self, work: Any) -> None:
        try:
            asyncio.run(work)
        except CommunicatorHung as hung:
            self._on_hung(str(hung))
            raise


class NcclSource(NcclEnd):
    """The end of a publisher, or of one of its ranks. What it publishes stays where it is: it must not change until
    `send` has returned. The manifest that goes round is that of rank 0."""

    collective: ClassVar[bool] = True

    def __init__(self, name: str, gpu: Gpu | None = None, **options: Any) -> None:
        super().__init__(name, gpu, **options)
        self.manifest: Manifest | None = None
        self._incarnation = secrets.randbits(63) | 1
        self._seat = seat_of(self._gpu, "nccl")
        self._arrays: dict[str, Any] = {}

    def publish(self, version: int, tensors: Tensors) -> Manifest:
        """Has `tensors`, on this GPU and written whole, sent by the next `send`. Raises BadWeights."""
        manifest, self._arrays = described(self._gpu, self.name, version, tensors, self.manifest, self._incarnation)
        self.manifest = replace(manifest, seat=self._seat)
        return self.manifest

    def open(self, epoch: int) -> tuple[str, bytes]:
        """NCCL's unique id: this process listens for those who come with it."""
        if why := why_no_nccl() or why_no_gpu(self._gpu.number):
            raise TransferFailed(f"{self.name} can't exchange weights by NCCL: {why}")
        return "", bytes(nccl().get_unique_id())

    def send(self, manifest: Manifest, route: Route) -> None:
        """Raises StaleIncarnation if that is not the version it has; TransferFailed, CommunicatorHung."""
        mine = self.manifest
        if mine is None or (mine != manifest if route.rank == 0 else mine.version != manifest.version):
            raise StaleIncarnation(
                f"version {manifest.version} of {self.name} is not there any more; ask for the newest"
            )
        self._transfer(manifest, route, self._arrays, {})


class NcclSink(NcclEnd):
    """A member's end."""

    collective: ClassVar[bool] = True

    def receive(
        self, manifest: Manifest, route: Route, into: Tensors | None = None, copies: Sequence[Copy] | None = None
    ) -> Tensors:
        """See carrier.Sink. `into`: tensors on this GPU, those that the plan has for this rank; new ones if None."""
        if copies is not None:
            raise ValueError("NCCL takes no copies for one member: give both ends the plan (plan=...)")
        wanted = self._scheduled(manifest, route).plan.dest.local(route.rank)
        with self._gpu.here():
            arrays = self._targets(wanted, into)
        self._transfer(manifest, route, {}, arrays)
        return arrays if into is None else into

    def _targets(self, wanted: Mapping[str, tuple[str, tuple[int, ...]]], into: Tensors | None) -> dict[str, Any]:
        if into is None:
            return {name: self._gpu.new(dtype, shape) for name, (dtype, shape) in wanted.items()}
        arrays = {}
        for name, (dtype, shape) in wanted.items():
            if name not in into:
                raise BadWeights(f"{self.name} has no tensor {name}; the plan has {dtype} {list(shape)} for it")
            found, arrays[name] = self._gpu.adopt(into[name])
            if (found, tuple(arrays[name].shape)) != (dtype, shape):
                raise BadWeights(
                    f"{name}: the plan has {dtype} {list(shape)}, {self.name} has {found} {list(arrays[name].shape)}"
                )
        return arrays


def seat_of(gpu: Gpu, carrier: str) -> Seat:
    """Of a publisher that has this carrier only."""
    return Seat(host=host_id(), gpu=gpu.uuid, carriers=(carrier,))


def described(
    gpu: Gpu, name: str, version: int, tensors: Tensors, before: Manifest | None, incarnation: int
) -> tuple[Manifest, dict[str, Any]]:
    """The manifest of tensors on a GPU, laid out as on a host but without checksums, and the tensors as arrays.

    Raises BadWeights for NaN, infinity, a dtype that can't travel, and what is not as in the version `before`.
    """
    if before is not None and version <= before.version:
        raise BadWeights(f"version {version} of {name} can't follow {before.version}; versions rise")
    specs, end = [], 0
    with gpu.here():
        adopted = {key: gpu.adopt(tensor) for key, tensor in tensors.items()}
        refuse_non_finite(gpu, adopted, version)
    for key, (dtype, array) in adopted.items():
        specs.append(TensorSpec(name=key, dtype=dtype, shape=tuple(array.shape), offset=end))
        end = -(-(end + array.nbytes) // ALIGN) * ALIGN
    if before is not None and before.tensors != specs:
        raise BadWeights(
            f"version {version} of {name} is not made as the one before: {_differing(before.tensors, specs)}"
        )
    manifest = Manifest(
        name=name, version=version, pid=os.getpid(), fd=-1, incarnation=incarnation,
        generation=1 if before is None else before.generation + 1, nbytes=end, bucket_bytes=BUCKET_BYTES, tensors=specs,
    )  # fmt: skip
    return manifest, {key: array for key, (_, array) in adopted.items()}


def _differing(before: Sequence[TensorSpec], now: Sequence[TensorSpec]) -> str:
    """The first tensor in which two versions differ."""
    old, new = {spec.name: str(spec) for spec in before}, {spec.name: str(spec) for spec in now}
    for name in [*old, *new]:
        if old.get(name) != new.get(name):
            return f"{name} was {old.get(name, 'not there')}, is {new.get(name, 'not there')}"
    return "the order of its tensors has changed"
