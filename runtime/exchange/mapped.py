"""Memory that a publisher and its receivers have mapped: an anonymous file with a few words before its payload.

Knows nothing of what the payload holds.
"""

from __future__ import annotations

import mmap
import os

import numpy as np

from .. import memfd
from ..errors import ExchangeFull, StaleIncarnation
from ..memfd import available_bytes
from .header import Manifest

HEADER_BYTES = 4096
INCARNATION, BEGUN, DONE = range(3)
"""Words of the header (uint64): whose it is, and which generation was begun and which ended."""


class Mapped:
    """One mapped memfd: a header of words and the payload. Closed by its owner."""

    def __init__(self, fd: int, memory: mmap.mmap) -> None:
        self.fd = fd
        """-1 where only the mapping is kept."""
        self.manifest: Manifest | None = None
        """The publisher's: of the version that is whole in it."""
        self.words = np.frombuffer(memory, np.uint64, HEADER_BYTES // 8)
        self.payload = np.frombuffer(memory, np.uint8, offset=HEADER_BYTES)

    @classmethod
    def create(cls, name: str, nbytes: int) -> Mapped:
        """Reserves the memory (every page, so that it can't run out while weights are written). Raises ExchangeFull."""
        size = -(-(HEADER_BYTES + nbytes) // mmap.PAGESIZE) * mmap.PAGESIZE
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
    def open(cls, manifest: Manifest) -> Mapped:
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
        state = self.words[[INCARNATION, BEGUN, DONE]].tolist()
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
