"""Weights from one process to others on the same host, by memory that both have mapped.

    publisher: buffer 0 [header | version 8]    buffer 1 [header | version 9]    <- publish writes them in turn
                                                     |
    Manifest (a message) --> receiver: opens /proc/<pid>/fd/<fd>, maps, copies out, verifies

A buffer is an anonymous file (memfd.py): the kernel frees it with its last holder, however that one dies. The header
holds the generation twice, written before and after the bytes; a reader whose manifest names another one is refused.
Each bucket has a checksum, verified on the reader's own copy: what a reader is given is what was published, whole.
Tensors travel as the bytes of little-endian numpy arrays; bfloat16 has no numpy dtype and travels as a uint16 view,
which is the caller's business (and then so is the search for NaN in it).

Knows nothing of models, and sends no message: manifests travel by whatever the caller has.
"""

from __future__ import annotations

import math
import mmap
import os
import secrets
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from .. import memfd
from ..codec import wire
from ..errors import BadWeights, CorruptWeights, ExchangeFull, StaleIncarnation
from ..memfd import available_bytes

BUCKET_BYTES = 1 << 20
"""Bytes per checksum; small enough that a bucket is verified while it is still in the cache."""

_DTYPES = frozenset("|b1 |u1 |i1 <u2 <i2 <u4 <i4 <u8 <i8 <f2 <f4 <f8".split())
_HEADER_BYTES = 4096
_ALIGN = 64
_INCARNATION, _BEGUN, _DONE = range(3)
"""Words of the header (uint64)."""


@wire
@dataclass(frozen=True, kw_only=True, slots=True)
class TensorSpec:
    """Where one tensor lies in the payload."""

    name: str
    dtype: str
    """numpy's little-endian name, such as <f4."""
    shape: tuple[int, ...]
    offset: int
    """Bytes from the start of the payload."""
    checksums: list[int]
    """crc32 of each of its buckets: pieces of `Manifest.bucket_bytes`, the last one shorter."""

    @property
    def nbytes(self) -> int:
        return np.dtype(self.dtype).itemsize * math.prod(self.shape)


@wire
@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What a receiver must know to fetch one version."""

    name: str
    """Of the publisher."""
    version: int
    pid: int
    fd: int
    """Descriptor of the buffer in the process `pid`."""
    incarnation: int
    """Random number of the publisher object: memory of another one is refused."""
    generation: int
    """Counts what this publisher wrote."""
    nbytes: int
    """Size of the payload."""
    bucket_bytes: int
    tensors: list[TensorSpec]


class Publisher:
    """Owns the buffers. One thread; readers need this process alive only until they have mapped a buffer."""

    def __init__(self, name: str, *, num_buffers: int = 2) -> None:
        if num_buffers < 2:
            raise ValueError(
                f"num_buffers must be >= 2, for one version stays while the next is written, got {num_buffers}"
            )
        self.name = name
        self.manifest: Manifest | None = None
        """The last version that was published whole."""
        self._incarnation = secrets.randbits(63) | 1
        self._generation = 0
        self._buffers: list[_Buffer | None] = [None] * num_buffers

    def publish(self, version: int, tensors: Mapping[str, np.ndarray]) -> Manifest:
        """Copies `tensors` where receivers can get them; what was published `num_buffers` calls ago is overwritten.

        Raises BadWeights (NaN, infinity, a dtype that can't travel) or ExchangeFull; then `manifest` stays good.
        """
        specs, nbytes = _layout(tensors)
        generation = self._generation + 1
        buffer = self._buffer(generation % len(self._buffers), nbytes)
        buffer.words[_BEGUN] = generation
        for spec in specs:
            source, target = _bytes(np.ascontiguousarray(tensors[spec.name])), buffer.payload[spec.offset :]
            for piece in _pieces(spec.nbytes, BUCKET_BYTES):
                np.copyto(target[piece], source[piece])
                _refuse_non_finite(target[piece].view(spec.dtype), spec.name, version)
                spec.checksums.append(zlib.crc32(target[piece].data))
        buffer.words[_DONE] = generation
        self._generation = generation
        self.manifest = Manifest(
            name=self.name,
            version=version,
            pid=os.getpid(),
            fd=buffer.fd,
            incarnation=self._incarnation,
            generation=generation,
            nbytes=nbytes,
            bucket_bytes=BUCKET_BYTES,
            tensors=specs,
        )
        return self.manifest

    def close(self) -> None:
        """Frees the buffers (receivers that have them mapped keep them until they close)."""
        for buffer in self._buffers:
            if buffer is not None:
                buffer.close()
        self._buffers = [None] * len(self._buffers)
        self.manifest = None

    def _buffer(self, slot: int, nbytes: int) -> _Buffer:
        """The buffer of a slot, made anew if it is too small."""
        buffer = self._buffers[slot]
        if buffer is None or len(buffer.payload) < nbytes:
            if buffer is not None:
                buffer.close()
                self._buffers[slot] = None
            buffer = self._buffers[slot] = _Buffer.create(self.name, nbytes)
            buffer.words[_INCARNATION] = self._incarnation
        return buffer


class Receiver:
    """Fetches published weights. Keeps the buffers of living publishers mapped, so that a fetch is one copy."""

    def __init__(self) -> None:
        self._mapped: dict[str, dict[int, _Buffer]] = {}
        """name of the publisher -> its descriptor -> mapping, all of one incarnation."""
        self._incarnation: dict[str, int] = {}

    def receive(self, manifest: Manifest, into: Mapping[str, np.ndarray] | None = None) -> dict[str, np.ndarray]:
        """The tensors of `manifest`: copies that the caller owns, verified.

        `into` holds arrays to copy into (memory in use is faster than new memory); after an error their contents are
        undefined. Raises StaleIncarnation if the publisher has gone or has overwritten this version: ask it for the
        newest manifest. Raises CorruptWeights if the bytes do not match.
        """
        _check(manifest)
        targets = {spec.name: _target(spec, into) for spec in manifest.tensors}
        buffer = self._map(manifest)
        for spec in manifest.tensors:
            source, target = buffer.payload[spec.offset :], _bytes(targets[spec.name])
            for piece, checksum in zip(_pieces(spec.nbytes, manifest.bucket_bytes), spec.checksums, strict=True):
                np.copyto(target[piece], source[piece])
                if zlib.crc32(target[piece].data) != checksum:
                    buffer.require(manifest)
                    raise CorruptWeights(
                        f"{spec.name} in version {manifest.version} of {manifest.name} does not match its checksum; "
                        "publish the version again"
                    )
        buffer.require(manifest)
        return targets

    def close(self) -> None:
        """Unmaps everything."""
        for name in list(self._mapped):
            self._forget(name)

    def _map(self, manifest: Manifest) -> _Buffer:
        if self._incarnation.get(manifest.name) != manifest.incarnation:
            self._forget(manifest.name)
            self._incarnation[manifest.name] = manifest.incarnation
        mapped = self._mapped.setdefault(manifest.name, {})
        if manifest.fd in mapped and not mapped[manifest.fd].holds(manifest):
            # Overwritten, or the publisher has made a larger buffer that got the same descriptor.
            mapped.pop(manifest.fd).close()
        if manifest.fd not in mapped:
            buffer = _Buffer.open(manifest)
            buffer.require(manifest)
            mapped[manifest.fd] = buffer
        return mapped[manifest.fd]

    def _forget(self, name: str) -> None:
        for buffer in self._mapped.pop(name, {}).values():
            buffer.close()
        self._incarnation.pop(name, None)


class _Buffer:
    """One mapped memfd: a header of words and the payload."""

    def __init__(self, fd: int, memory: mmap.mmap) -> None:
        self.fd = fd
        """-1 where only the mapping is kept."""
        self.words = np.frombuffer(memory, np.uint64, _HEADER_BYTES // 8)
        self.payload = np.frombuffer(memory, np.uint8, offset=_HEADER_BYTES)

    @classmethod
    def create(cls, name: str, nbytes: int) -> _Buffer:
        """Reserves the memory (every page, so that it can't run out while weights are written). Raises ExchangeFull."""
        size = -(-(_HEADER_BYTES + nbytes) // mmap.PAGESIZE) * mmap.PAGESIZE
        available = available_bytes()
        if size > available:
            raise _full(name, size, f"only {available >> 20} MiB of memory are available")
        try:
            fd = memfd.create(name, size)
        except OSError as error:
            raise _full(name, size, error.strerror or error) from None
        try:
            os.posix_fallocate(fd, 0, size)
            return cls(fd, mmap.mmap(fd, size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE))
        except OSError as error:
            os.close(fd)
            raise _full(name, size, error.strerror or error) from None

    @classmethod
    def open(cls, manifest: Manifest) -> _Buffer:
        """Maps the publisher's buffer, read-only. Raises StaleIncarnation if it is not there any more."""
        try:
            fd = memfd.open_peer(manifest.name, manifest.pid, manifest.fd, os.O_RDONLY)
        except (FileNotFoundError, ProcessLookupError):
            raise _stale(manifest, "its process has ended") from None
        try:
            return cls(-1, mmap.mmap(fd, 0, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE, prot=mmap.PROT_READ))
        except OSError as error:
            raise _full(manifest.name, manifest.nbytes, error.strerror or error) from None
        finally:
            os.close(fd)

    def holds(self, manifest: Manifest) -> bool:
        """Whether this memory has that version, whole."""
        state = self.words[[_INCARNATION, _BEGUN, _DONE]].tolist()
        return state == [manifest.incarnation, manifest.generation, manifest.generation] and (
            len(self.payload) >= manifest.nbytes
        )

    def require(self, manifest: Manifest) -> None:
        """Raises StaleIncarnation unless `holds`."""
        if not self.holds(manifest):
            raise _stale(manifest, "it was overwritten by a newer one")

    def close(self) -> None:
        """Gives the memory back, as soon as no view of it is left."""
        self.words, self.payload = np.zeros(0, np.uint64), np.zeros(0, np.uint8)
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def _layout(tensors: Mapping[str, np.ndarray]) -> tuple[list[TensorSpec], int]:
    """Places tensors one after the other, aligned; returns them and the size of the payload."""
    specs, end = [], 0
    for name, array in tensors.items():
        if array.dtype.str not in _DTYPES:
            allowed = ", ".join(sorted(_DTYPES))
            raise BadWeights(f"{name} has dtype {array.dtype}, which can't travel; allowed: {allowed}")
        specs.append(TensorSpec(name=name, dtype=array.dtype.str, shape=array.shape, offset=end, checksums=[]))
        end = -(-(end + array.nbytes) // _ALIGN) * _ALIGN
    return specs, end


def _pieces(nbytes: int, bucket_bytes: int) -> Iterator[slice]:
    return (slice(start, min(start + bucket_bytes, nbytes)) for start in range(0, nbytes, bucket_bytes))


def _bytes(array: np.ndarray) -> np.ndarray:
    """A contiguous array as uint8 [nbytes], sharing its memory."""
    return array.reshape(-1).view(np.uint8)


def _target(spec: TensorSpec, into: Mapping[str, np.ndarray] | None) -> np.ndarray:
    if into is None:
        return np.empty(spec.shape, spec.dtype)
    array = into.get(spec.name)
    if array is None or (array.dtype.str, array.shape) != (spec.dtype, spec.shape):
        found = "nothing" if array is None else f"{array.dtype.str} {list(array.shape)}"
        raise ValueError(f"into[{spec.name!r}] must be {spec.dtype} {list(spec.shape)}, got {found}")
    if not (array.flags.c_contiguous and array.flags.writeable):
        raise ValueError(f"into[{spec.name!r}] must be contiguous and writeable")
    return array


def _check(manifest: Manifest) -> None:
    """A manifest comes from another process: it must not lead outside the payload."""
    for spec in manifest.tensors:
        if not (
            manifest.bucket_bytes > 0
            and spec.dtype in _DTYPES
            and all(type(n) is int and n >= 0 for n in spec.shape)
            and 0 <= spec.offset <= manifest.nbytes - spec.nbytes
            and len(spec.checksums) == -(-spec.nbytes // manifest.bucket_bytes)
        ):
            raise CorruptWeights(
                f"the manifest of {manifest.name} version {manifest.version} is wrong at {spec.name!r}"
            )


def _refuse_non_finite(values: np.ndarray, name: str, version: int) -> None:
    """Raises BadWeights for NaN and infinity: a sum finds them fast; where it overflows, every value is looked at."""
    if values.dtype.kind != "f":
        return
    with np.errstate(over="ignore", invalid="ignore"):
        suspicious = not np.isfinite(values.sum())
    if suspicious and (bad := int((~np.isfinite(values)).sum())):
        raise BadWeights(
            f"{name} of version {version} has {bad} values that are not finite (NaN, infinity) and was not published. "
            "Look at the loss of the last step, lower the learning rate, or go back to a checkpoint"
        )


def _full(name: str, size: int, reason: object) -> ExchangeFull:
    return ExchangeFull(
        f"can't get {max(1, size >> 20)} MiB of shared memory for weights of {name}: {reason}; "
        "free memory, or use a smaller model"
    )


def _stale(manifest: Manifest, reason: str) -> StaleIncarnation:
    return StaleIncarnation(
        f"version {manifest.version} of {manifest.name} (process {manifest.pid}) can't be fetched: {reason}; "
        "ask for the newest"
    )
