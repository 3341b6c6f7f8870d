"""CUDA IPC: weights from one process to others on the same GPU, by memory that all of them have mapped.

    publisher   one allocation [words | payload 0 | words | payload 1]   <- publish copies the tensors in, in turn
                     |  handle: the manifest's token, hence the route's
    member      maps it once, compares the checksums where the bytes lie, copies out, looks at the words again

As in shm.py, but on a GPU: words say which generation a payload holds, written before and after it; a member that
finds another one was too slow, and is refused. The layout is that of the first version, so the memory is never
replaced while its publisher lives. A member closes its mapping when a publisher of another incarnation comes, and
takes nothing from one whose process has ended. The driver frees memory with its last holder. Checksums in a manifest
are those of device.py. Not yet measured on a GPU.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np

from ..errors import CorruptWeights, ExchangeFull, StaleIncarnation, TransferFailed
from .carrier import Copy, Tensors
from .cuda import cupy, why_no_gpu
from .device import Gpu
from .header import Manifest, Route, stored
from .nccl import described, seat_of

HANDLE_BYTES = 64

BUCKET_BYTES = 32 << 20
"""Bytes per checksum."""

NUM_PAYLOADS = 2

_WORDS_BYTES = 64
_INCARNATION, _BEGUN, _DONE = range(3)


class Memory(Protocol):
    """What the driver does with memory that processes share."""

    def allocate(self, num_bytes: int) -> tuple[int, bytes]:
        """(address, handle)"""

    def free(self, address: int) -> None: ...

    def open(self, handle: bytes) -> int:
        """The address of another process's memory in this one. Raises TransferFailed if it is not there any more."""

    def close(self, address: int) -> None: ...


class CudaMemory:
    """cudaMalloc and cudaIpc* through cupy: memory of a pool could not be shared, only the whole slab it lies in."""

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu

    def allocate(self, num_bytes: int) -> tuple[int, bytes]:
        try:
            with cupy().cuda.Device(self._gpu.number):
                address = int(cupy().cuda.runtime.malloc(num_bytes))
                return address, bytes(cupy().cuda.runtime.ipcGetMemHandle(address))
        except cupy().cuda.runtime.CUDARuntimeError as error:
            raise ExchangeFull(
                f"can't get {num_bytes >> 20} MiB on GPU {self._gpu.number} to share weights: {error}; free memory "
                'there, or name another carrier (carrier = "shm")'
            ) from None

    def free(self, address: int) -> None:
        with cupy().cuda.Device(self._gpu.number):
            cupy().cuda.runtime.free(address)

    def open(self, handle: bytes) -> int:
        try:
            with cupy().cuda.Device(self._gpu.number):
                return int(cupy().cuda.runtime.ipcOpenMemHandle(handle))
        except cupy().cuda.runtime.CUDARuntimeError as error:
            raise TransferFailed(f"can't map the publisher's memory on GPU {self._gpu.number}: {error}") from None

    def close(self, address: int) -> None:
        with cupy().cuda.Device(self._gpu.number):
            cupy().cuda.runtime.ipcCloseMemHandle(address)


class _Shared:
    """The allocation, as both sides see it."""

    def __init__(self, gpu: Gpu, address: int, num_bytes: int) -> None:
        self._stride = _WORDS_BYTES + _aligned(num_bytes)
        self._gpu = gpu
        self._all = gpu.wrap(address, NUM_PAYLOADS * self._stride)

    def payload(self, number: int, num_bytes: int) -> Any:
        begin = number * self._stride + _WORDS_BYTES
        return self._all[begin : begin + num_bytes]

    def set_words(self, number: int, *words: int) -> None:
        target = self._all[number * self._stride :][:_WORDS_BYTES].view(np.uint64)
        target[: len(words)] = self._gpu.from_host(np.array(words, np.uint64))

    def words(self, number: int) -> list[int]:
        found = self._gpu.to_host(self._all[number * self._stride :][:_WORDS_BYTES].view(np.uint64))
        return [int(word) for word in found[:3]]


class IpcSource:
    """A publisher's end; members come and take. One thread publishes."""

    collective: ClassVar[bool] = False

    def __init__(self, name: str, gpu: Gpu | None = None, memory: Memory | None = None) -> None:
        self.name = name
        self.manifest: Manifest | None = None
        self._gpu = gpu or Gpu()
        self._memory = memory or CudaMemory(self._gpu)
        self._incarnation = secrets.randbits(63) | 1
        self._seat = seat_of(self._gpu, "ipc")
        self._address = 0
        self._handle = b""
        self._shared: _Shared | None = None

    def publish(self, version: int, tensors: Tensors) -> Manifest:
        """Copies `tensors`, on this GPU and written whole, where members can get them; the version before stays.

        Raises BadWeights, ExchangeFull, TransferFailed; then `manifest` stays good.
        """
        manifest, arrays = described(self._gpu, self.name, version, tensors, self.manifest, self._incarnation)
        if self._shared is None:
            if why := why_no_gpu(self._gpu.number) if isinstance(self._memory, CudaMemory) else "":
                raise TransferFailed(f"{self.name} can't share weights by CUDA IPC: {why}")
            size = NUM_PAYLOADS * (_WORDS_BYTES + _aligned(manifest.nbytes))
            self._address, self._handle = self._memory.allocate(size)
            self._shared = _Shared(self._gpu, self._address, manifest.nbytes)
        number, generation = manifest.generation % NUM_PAYLOADS, manifest.generation
        with self._gpu.here():
            # The words say what is going on before the payload changes, and what it holds after it has changed: the
            # stream keeps the order, and this block is left when all of it has happened.
            done = self._shared.words(number)[_DONE] if generation > NUM_PAYLOADS else 0
            self._shared.set_words(number, self._incarnation, generation, done)
            payload = self._shared.payload(number, manifest.nbytes)
            for spec in manifest.tensors:
                target = payload[spec.offset : spec.offset + spec.nbytes]
                target[:] = arrays[spec.name].reshape(-1).view(np.uint8)
                payload[spec.offset + spec.nbytes : _aligned(spec.offset + spec.nbytes)] = 0
            sums = _sums(self._gpu, payload)
            self._shared.set_words(number, self._incarnation, generation, generation)
        self.manifest = replace(
            manifest, fd=number, bucket_bytes=BUCKET_BYTES, checksums=sums, seat=self._seat, token=self._handle
        )
        return self.manifest

    def open(self, epoch: int) -> tuple[str, bytes]:
        """The handle of the memory, which there is from the first `publish` on."""
        if not self._handle:
            raise TransferFailed(f"{self.name} has not published anything yet; publish, then open")
        return "", self._handle

    def send(self, manifest: Manifest, route: Route) -> None:
        """Nothing: members come and take."""

    def abort(self, epoch: int) -> None:
        """Nothing goes on here."""

    def close(self) -> None:
        """Frees the memory. Members must have closed theirs, or never use it again."""
        if self._shared is not None:
            self._memory.free(self._address)
            self._shared, self._handle, self.manifest = None, b"", None


class IpcSink:
    """A member's end. One thread receives."""

    def __init__(self, name: str, gpu: Gpu | None = None, memory: Memory | None = None) -> None:
        self.name = name
        self._gpu = gpu or Gpu()
        self._memory = memory or CudaMemory(self._gpu)
        self._handle = b""
        self._address = 0
        self._over = -1

    @property
    def gpu(self) -> str:
        """The UUID of the GPU that it copies on."""
        return self._gpu.uuid

    def receive(
        self, manifest: Manifest, route: Route, into: Tensors | None = None, copies: Sequence[Copy] | None = None
    ) -> Tensors:
        """See carrier.Sink."""
        if route.epoch <= self._over:
            raise TransferFailed(f"{self.name}: epoch {route.epoch} is over here")
        if len(route.token) != HANDLE_BYTES:
            raise TransferFailed(f"the route's token must be a handle of {HANDLE_BYTES} bytes, got {len(route.token)}")
        if into is None and copies is not None:
            raise ValueError("boxes are copied into tensors that are there: give `into`")
        self._require_alive(manifest)
        with self._gpu.here():
            shared = _Shared(self._gpu, self._mapped(route.token), manifest.nbytes)
            self._require(shared, manifest)
            payload = shared.payload(manifest.fd, manifest.nbytes)
            views = {
                spec.name: payload[spec.offset : spec.offset + spec.nbytes].view(stored(spec.dtype)).reshape(spec.shape)
                for spec in manifest.tensors
            }
            if into is None:
                into = {spec.name: self._gpu.new(spec.dtype, tuple(spec.shape)) for spec in manifest.tensors}
            targets = {name: self._gpu.adopt(tensor)[1] for name, tensor in into.items()}
            if copies is None:
                for spec in manifest.tensors:
                    self._fit(spec.name, views[spec.name], targets.get(spec.name))
                    targets[spec.name][...] = views[spec.name]
            else:
                for copy in copies:
                    targets[copy.dest_name][copy.dest_box.slices] = views[copy.source_name][copy.source_box.slices]
            sums = _sums(self._gpu, payload)
            self._require(shared, manifest)
        self._require_alive(manifest)
        if sums != manifest.checksums:
            raise CorruptWeights(
                f"version {manifest.version} of {manifest.name} does not match its checksums; publish it again"
            )
        return into

    def abort(self, epoch: int) -> None:
        """Transfers of this epoch or an earlier one are refused from here on."""
        self._over = max(self._over, epoch)

    def close(self) -> None:
        """Unmaps the publisher's memory."""
        if self._handle:
            self._memory.close(self._address)
            self._handle = b""

    def _mapped(self, handle: bytes) -> int:
        if handle != self._handle:
            self.close()
            self._address = self._memory.open(handle)
            self._handle = handle
        return self._address

    def _require(self, shared: _Shared, manifest: Manifest) -> None:
        """Raises StaleIncarnation unless the payload holds that generation, whole."""
        if shared.words(manifest.fd) != [manifest.incarnation, manifest.generation, manifest.generation]:
            raise StaleIncarnation(
                f"version {manifest.version} of {manifest.name} was overwritten by a newer one; ask for the newest"
            )

    def _require_alive(self, manifest: Manifest) -> None:
        """Raises StaleIncarnation if the publisher's process has ended: its memory must not be relied on."""
        try:
            state = Path(f"/proc/{manifest.pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            state = "X"
        if state in "ZX":
            self.close()
            raise StaleIncarnation(
                f"version {manifest.version} of {manifest.name} can't be fetched: its process {manifest.pid} has ended"
            )

    def _fit(self, name: str, view: Any, target: Any) -> None:
        if target is None or (target.dtype, target.shape) != (view.dtype, view.shape):
            found = "nothing" if target is None else f"{target.dtype} {list(target.shape)}"
            raise ValueError(f"into[{name!r}] must be {view.dtype} {list(view.shape)}, got {found}")


def _sums(gpu: Gpu, payload: Any) -> list[int]:
    """A checksum for each bucket of a payload."""
    buckets = range(0, len(payload), BUCKET_BYTES)
    sums = gpu.from_host(np.zeros(len(buckets), np.uint64))
    for number, begin in enumerate(buckets):
        gpu.checksum(payload[begin : begin + BUCKET_BYTES], sums[number : number + 1])
    return [int(value) for value in gpu.to_host(sums)]


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _WORDS_BYTES) * _WORDS_BYTES
