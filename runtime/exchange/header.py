"""What is said of weights before and beside their bytes: manifests, routes, headers of buckets.

    Manifest   one published version: its tensors, where they lie in the payload, a checksum for each bucket of it
    Route      how one member gets it, in one epoch: by which carrier, from whom, among whom, until when
    BucketHeader   in front of every bucket that travels by itself

The payload is the tensors one after the other, cut into buckets of equal size. Tensors travel as the bytes of
little-endian numpy arrays; what numpy has no dtype for has a name here, and is an array of `stored(dtype)` to numpy.
Knows nothing of carriers.
"""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, Self

import numpy as np
import xxhash

from ..codec import Buffer, wire
from ..errors import BadWeights, CorruptWeights

BUCKET_BYTES = 1 << 19
"""Bytes per checksum; few enough that a bucket is hashed while it is still in the cache."""

ALIGN = 64
"""Tensors begin at multiples of it."""

_NUMPY = "|b1 |u1 |i1 <u2 <i2 <u4 <i4 <u8 <i8 <f2 <f4 <f8".split()
_STORED = {**{name: name for name in _NUMPY}, "bfloat16": "<u2", "float8_e4m3fn": "|u1"}
DTYPES = tuple(sorted(_STORED))
"""Names of what may travel: numpy's, and those that it does not know."""


def stored(dtype: str) -> np.dtype:
    """The numpy dtype that holds the bits of `dtype`. Raises KeyError if it can't travel."""
    return np.dtype(_STORED[dtype])


def checksum(data: Buffer | np.ndarray) -> int:
    """Of a bucket: XXH3, 64 bits. Beside a copy that is in the cache it costs a sixth of it; zlib's crc32 costs 2.5."""
    return xxhash.xxh3_64_intdigest(data.data if isinstance(data, np.ndarray) else data)


@wire
@dataclass(frozen=True, kw_only=True, slots=True)
class TensorSpec:
    """Where one tensor lies in the payload."""

    name: str
    dtype: str
    """One of DTYPES."""
    shape: tuple[int, ...]
    offset: int
    """Bytes from the start of the payload."""

    @property
    def nbytes(self) -> int:
        return stored(self.dtype).itemsize * math.prod(self.shape)

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


@wire
@dataclass(frozen=True, kw_only=True, slots=True)
class Seat:
    """Where a publisher or a member sits, and what it can do."""

    host: str = ""
    """The same for processes that can map each other's memory; see `host_id`."""
    gpu: str = ""
    """The UUID of its GPU; empty without one."""
    carriers: tuple[str, ...] = ("shm", "tree")
    address: str = ""
    """Where others can fetch from it by the tree; empty if they can't."""
    schema: tuple[tuple[str, str, tuple[int, ...]], ...] = ()
    """Name, dtype and shape of the tensors that a member wants; empty if it takes what comes."""
    load_s: float = 0.0
    """What a member needs beside the transfer, such as to have a server read the weights."""
    epoch: int = -1
    """The highest that a member has seen: an exchange goes on above it, whatever the clocks say."""

    def mismatch(self, tensors: list[TensorSpec]) -> str:
        """How `tensors` differ from the schema, with the values of both sides; "" if they do not."""
        wanted = {name: f"{dtype} {list(shape)}" for name, dtype, shape in self.schema}
        offered = {spec.name: str(spec) for spec in tensors}
        names = [n for n in wanted | offered if wanted.get(n) != offered.get(n)] if wanted else []
        found = [f"{n} is {offered.get(n, 'missing')}, wanted {wanted.get(n, 'nothing')}" for n in names[:4]]
        more = f", and {len(names) - len(found)} more" if len(names) > len(found) else ""
        return "; ".join(found) + more


def host_id() -> str:
    """Of the processes of one user that see each other: they may map each other's memory."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}/{os.readlink('/proc/self/ns/pid')}/{os.geteuid()}"


@wire
@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What a receiver must know of one version; published whole, it never changes."""

    name: str
    """Of the publisher."""
    version: int
    pid: int
    fd: int
    """Descriptor, in the process `pid`, of the buffer with the payload."""
    incarnation: int
    """Random number of the publisher object: memory of another one is refused."""
    generation: int
    """Counts what this publisher wrote."""
    nbytes: int
    """Size of the payload."""
    bucket_bytes: int
    tensors: list[TensorSpec]
    checksums: list[int] = field(default_factory=list)
    """Of each bucket of the payload; the last one is shorter."""
    seat: Seat = field(default_factory=Seat)
    """The publisher's."""
    token: bytes = b""
    """Of the carrier, for the routes of all members: see Source.open."""
    also: tuple[Manifest, ...] = ()
    """The same version as other carriers of this publisher have it; see `together`."""

    def offer(self) -> Seat:
        """The publisher's seat with all that it offers."""
        seats = [self.seat, *(other.seat for other in self.also)]
        carriers = tuple(dict.fromkeys(carrier for seat in seats for carrier in seat.carriers))
        gpu = next((seat.gpu for seat in seats if seat.gpu), "")
        address = next((seat.address for seat in seats if seat.address), "")
        return replace(self.seat, carriers=carriers, gpu=gpu, address=address)

    def by(self, carrier: str) -> Manifest:
        """What a member of this carrier is given."""
        return replace(next(m for m in (self, *self.also) if carrier in m.seat.carriers), also=())

    def check(self) -> None:
        """Raises CorruptWeights if it leads outside the payload: it comes from another process."""
        for spec in self.tensors:
            if not (
                spec.dtype in _STORED
                and all(type(n) is int and n >= 0 for n in spec.shape)
                and 0 <= spec.offset <= self.nbytes - spec.nbytes
                and spec.offset % ALIGN == 0
            ):
                raise CorruptWeights(f"the manifest of {self.name} version {self.version} is wrong at {spec.name!r}")
        if self.bucket_bytes < 1 or len(self.checksums) != -(-self.nbytes // self.bucket_bytes):
            raise CorruptWeights(f"the manifest of {self.name} version {self.version} is wrong: it lacks checksums")

    def bucket(self, index: int) -> slice:
        """Bytes of the payload that are bucket `index`."""
        return slice(index * self.bucket_bytes, min((index + 1) * self.bucket_bytes, self.nbytes))

    def views(self, payload: np.ndarray) -> dict[str, np.ndarray]:
        """The tensors in a payload, uint8 [nbytes or more], sharing its memory."""
        return {
            spec.name: payload[spec.offset : spec.offset + spec.nbytes].view(stored(spec.dtype)).reshape(spec.shape)
            for spec in self.tensors
        }


def together(first: Manifest, *others: Manifest) -> Manifest:
    """One publication of what several sources of a publisher have published: for each member, the carrier that fits.

    Raises BadWeights unless all are of one publisher, host and version, and each has carriers of its own.
    """
    carriers = [carrier for manifest in (first, *others) for carrier in manifest.seat.carriers]
    said = {(m.name, m.seat.host, m.version) for m in (first, *others)}
    if len(said) > 1 or len(set(carriers)) < len(carriers):
        raise BadWeights(
            "sources that publish together must have one name, host and version, and carriers of their own, got "
            + "; ".join(f"{m.name} version {m.version} by {', '.join(m.seat.carriers)}" for m in (first, *others))
        )
    return replace(first, also=others)


@wire
@dataclass(frozen=True, kw_only=True, slots=True)
class Route:
    """How one member gets a version. What it says holds for one epoch: later it is refused."""

    carrier: str
    """shm, tree, nccl or ipc."""
    epoch: int = 0
    """Counts the memberships of an exchange: it rises with each transfer that had to be begun again."""
    members: tuple[str, ...] = ()
    """Who takes part, the publisher first: the place of a name is its rank."""
    rank: int = 0
    """Of the member that this is for."""
    sources: tuple[str, ...] = ()
    """Addresses to fetch from, best first: who does not deliver is passed over for the next. The last one is the
    publisher's. Empty where the manifest says it all."""
    token: bytes = b""
    """What else the carrier needs to find the others, such as NCCL's unique id."""
    deadline_s: float = 60.0
    """Time for the whole transfer."""
    stall_s: float = 0.25
    """Time without a byte after which a source is taken for dead."""


@dataclass(frozen=True, slots=True)
class BucketHeader:
    """In front of a bucket that travels by itself. Ranks are 0 where they do not matter."""

    version: int
    epoch: int
    incarnation: int
    generation: int
    index: int
    num_buckets: int
    nbytes: int
    checksum: int
    source: int = 0
    dest: int = 0
    quantized: bool = False

    FORMAT: ClassVar[struct.Struct] = struct.Struct("<qqQQIIQQII?")

    def pack(self) -> bytes:
        return self.FORMAT.pack(
            self.version, self.epoch, self.incarnation, self.generation, self.index, self.num_buckets, self.nbytes,
            self.checksum, self.source, self.dest, self.quantized,
        )  # fmt: skip

    @classmethod
    def unpack(cls, data: Buffer) -> Self:
        """Raises CorruptWeights if `data` is no header."""
        try:
            return cls(*cls.FORMAT.unpack(data))
        except struct.error as error:
            raise CorruptWeights(f"{len(data)} bytes are no header of a bucket: {error}") from None
