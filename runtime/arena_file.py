"""The file that an arena's owner shares with those who borrow from it, and the handle that leads there.

    | identity | generation[] | offset[] | nbytes[] | released[] | bytes that are lent ...                |
      page 0     one entry of each per lease; the holder writes `released`, the owner all the rest

A lease is given back by writing its generation to `released`: no message is needed, the word has one writer, and the
owner looks when it needs memory. A holder maps all but `released` read-only. Tables are 64 KiB each, so that they
begin at a page on every machine.
"""

from __future__ import annotations

import mmap
import os
import secrets
import struct
from typing import NamedTuple

import numpy as np

from . import memfd
from .codec import Buffer

MAX_LEASES = 8192
TABLE_BYTES = 8 * MAX_LEASES
HEADER_BYTES = 5 * TABLE_BYTES

_HANDLE = struct.Struct("<QIIIQ")
HANDLE_BYTES = _HANDLE.size
_GENERATION, _OFFSET, _NBYTES, _RELEASED = range(1, 5)
"""Positions of the tables."""


class Handle(NamedTuple):
    """What travels in place of the bytes."""

    identity: int
    """Random number of the arena: a file that got the same descriptor later is not mistaken for it."""
    pid: int
    fd: int
    """Descriptor of the file in the process `pid`."""
    slot: int
    generation: int
    """Of the lease; never used again in this arena."""

    def pack(self) -> bytes:
        return _HANDLE.pack(*self)

    @classmethod
    def unpack(cls, data: Buffer) -> Handle:
        """Raises struct.error."""
        return cls(*_HANDLE.unpack(data))


class OwnFile:
    """The file as its owner sees it. `key`: of the node."""

    def __init__(self, key: str, nbytes: int) -> None:
        """Room for `nbytes`; they take no memory until they are touched. Raises OSError."""
        size = HEADER_BYTES + nbytes
        self.fd = memfd.create(f"arena-{key}", size)
        try:
            memory = mmap.mmap(self.fd, size, flags=mmap.MAP_SHARED)
        except OSError:
            os.close(self.fd)
            raise
        self.identity, self.pid = secrets.randbits(64), os.getpid()
        self.generation, self.offset, self.nbytes, self.released = (
            _table(memory, table) for table in (_GENERATION, _OFFSET, _NBYTES, _RELEASED)
        )
        self.data = np.frombuffer(memory, np.uint8, offset=HEADER_BYTES)
        _table(memory, 0)[0] = self.identity

    def handle(self, slot: int, generation: int) -> bytes:
        return Handle(self.identity, self.pid, self.fd, slot, generation).pack()

    def close(self) -> None:
        """Nobody can open it any more; who has it mapped keeps it."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class PeerFile:
    """The file of another node, as a holder sees it."""

    def __init__(self, key: str, handle: Handle) -> None:
        """Maps it. Raises OSError, FileNotFoundError if it is gone."""
        fd = memfd.open_peer(f"arena-{key}", handle.pid, handle.fd, os.O_RDWR)
        try:
            if os.fstat(fd).st_size <= HEADER_BYTES:
                raise OSError(f"the arena of {key} is too short to be one")
            memory = mmap.mmap(fd, 0, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
            words = mmap.mmap(fd, TABLE_BYTES, flags=mmap.MAP_SHARED, offset=_RELEASED * TABLE_BYTES)
        finally:
            os.close(fd)
        self.identity = _table(memory, 0)[0]
        self.generation, self.offset, self.nbytes = (_table(memory, table) for table in (_GENERATION, _OFFSET, _NBYTES))
        self.released = memoryview(words).cast("Q")
        self.data = np.frombuffer(memory, np.uint8, offset=HEADER_BYTES)


def _table(memory: mmap.mmap, position: int) -> memoryview:
    """As unsigned 64-bit words, each read and written at once."""
    return memoryview(memory)[position * TABLE_BYTES : (position + 1) * TABLE_BYTES].cast("Q")
