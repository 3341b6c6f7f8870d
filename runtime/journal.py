"""An append-only file of wire values that survives kill -9: what was appended is read back at the next open.

    open --> replayed values --> append, append, append --> rewrite (compaction) --> append ...

    file   = magic, record*
    record = length u32, ~length u32, crc32 u32, body;  body = msgpack [pack, buffer*] of codec.encode

Every append reaches the operating system before it returns, so the death of the process loses nothing; `sync` and
`rewrite` reach the disk, so that a power failure loses what came after them. A record that was being written at the
moment of death (torn) is cut off at the next open. Knows nothing of what the values mean.
"""

from __future__ import annotations

import fcntl
import os
import struct
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import msgpack

from .codec import decode, encode
from .errors import JournalError

MAGIC = b"headrace journal 1\n"
_HEADER = struct.Struct("<III")
_ONES = 0xFFFFFFFF


class Journal:
    """One open journal; a second one on the same path is refused, in this process or any other."""

    def __init__(self, path: Path | str) -> None:
        """Opens or creates `path` and claims it. Call `replay` once, before the first append.

        Raises JournalError if it is in use or can't be opened.
        """
        self.path = Path(path)
        self.num_bytes = 0
        """Length of the file up to the end of the last good record."""
        self.torn_bytes = 0
        """What `replay` cut off: a record that was half written when the process died."""
        self._damaged = False
        self._lock = -1
        self._fd = -1
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = _claim(self.path)
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            self.close()
            raise JournalError(f"can't open the journal {self.path}: {error.strerror}") from None
        except JournalError:
            self.close()
            raise

    def replay(self) -> Iterator[Any]:
        """Yields every value of the file in order, then cuts off a torn end.

        Raises JournalError for a file that is no journal or is damaged before its end; nothing of it is changed.
        """
        with open(self.path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            magic = file.read(len(MAGIC))
            if not MAGIC.startswith(magic):
                raise JournalError(f"{self.path} is no journal of this version of headrace; move it away")
            self.num_bytes = len(magic) if magic == MAGIC else 0
            while self.num_bytes and (body := self._read_record(file, size)) is not None:
                pack, *buffers = msgpack.unpackb(body)
                yield decode(pack, buffers)
                self.num_bytes += _HEADER.size + len(body)
        self.torn_bytes = size - self.num_bytes
        if self.torn_bytes:
            os.ftruncate(self._fd, self.num_bytes)
        if not self.num_bytes:
            self._write(MAGIC)

    def append(self, value: object) -> None:
        """Adds one value: it outlives this process when the call returns.

        Raises JournalError if it can't be written (the file stays as it was) and CodecError if it can't travel.
        """
        self._write(_record(value))

    def rewrite(self, values: Iterable[object]) -> None:
        """Replaces the whole file by `values`, atomically and to the disk: compaction.

        Raises JournalError if that is not possible; the file stays as it was.
        """
        fresh = self.path.with_name(self.path.name + ".new")
        try:
            with open(fresh, "wb") as file:
                file.write(MAGIC)
                for value in values:
                    file.write(_record(value))
                file.flush()
                os.fsync(file.fileno())
                size = file.tell()
            fd = os.open(fresh, os.O_RDWR | os.O_APPEND)
            os.rename(fresh, self.path)
        except OSError as error:
            fresh.unlink(missing_ok=True)
            raise self._unwritable(error) from None
        os.close(self._fd)
        self._fd, self.num_bytes, self._damaged = fd, size, False
        _sync_directory(self.path.parent)

    def sync(self) -> None:
        """Returns when all that was appended is on the disk. Raises JournalError if the disk refuses."""
        try:
            os.fsync(self._fd)
        except OSError as error:
            raise self._unwritable(error) from None

    def close(self) -> None:
        """Gives the file back; may be called twice."""
        for fd in (self._fd, self._lock):
            if fd >= 0:
                os.close(fd)
        self._fd = self._lock = -1

    def _read_record(self, file: BinaryIO, size: int) -> bytes | None:
        """The body of the record at `num_bytes`, or None where the good part of the file ends."""
        header = file.read(_HEADER.size)
        if len(header) < _HEADER.size:
            return None
        length, inverse, crc = _HEADER.unpack(header)
        if length ^ inverse == _ONES:
            if self.num_bytes + _HEADER.size + length > size:
                return None
            body = file.read(length)
            if zlib.crc32(body) == crc:
                return body
        # Torn at the end, or zeros that the file system left after a crash of the machine. Anything else is damage.
        rest = [header] if length ^ inverse != _ONES else []
        if any(chunk.strip(b"\0") for chunk in (*rest, *iter(lambda: file.read(1 << 20), b""))):
            raise JournalError(
                f"{self.path} is damaged at byte {self.num_bytes} of {size}. To go on with what is before, run: "
                f"truncate -s {self.num_bytes} {self.path}"
            )
        return None

    def _write(self, data: bytes) -> None:
        if self._damaged:
            raise JournalError(f"{self.path} could not be restored after a failed write; start again to go on with it")
        written = 0
        try:
            while written < len(data):
                written += os.write(self._fd, data[written:] if written else data)
        except OSError as error:
            if written:
                self._cut()
            raise self._unwritable(error) from None
        self.num_bytes += len(data)

    def _cut(self) -> None:
        """Takes back half a record, so that the next one does not land behind it."""
        try:
            os.ftruncate(self._fd, self.num_bytes)
        except OSError:
            self._damaged = True

    def _unwritable(self, error: OSError) -> JournalError:
        return JournalError(
            f"can't write the journal {self.path}: {error.strerror}. All that was in it is kept: make room or mend the "
            "disk, then start again with --resume"
        )


def _record(value: object) -> bytes:
    pack, buffers = encode(value)
    body: bytes = msgpack.packb([pack, *buffers])
    return _HEADER.pack(len(body), len(body) ^ _ONES, zlib.crc32(body)) + body


def _claim(path: Path) -> int:
    """Locks a file beside the journal, since `rewrite` replaces the journal itself. The kernel frees it at death."""
    lock = os.open(path.with_name(path.name + ".lock"), os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise JournalError(f"the journal {path} is in use by another process; stop that one first") from None
    return lock


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
