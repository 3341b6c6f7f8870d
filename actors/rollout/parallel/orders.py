"""What the first rank of a worker tells the others to do, one order after the other, over a local socket.

    first: Orders.open -> give(kind, ...)  ====>  others: take() -> kind, ...        EOF: the first rank is gone

The socket is an abstract one: no port, no file, gone with its process; its door lets in processes of the same user
only. To wait for an order costs nothing and may take for ever: that the first rank dies ends it at once. Knows nothing
of what orders mean.
"""

from __future__ import annotations

import os
import secrets
import socket
import struct
from typing import Any

from ....runtime.codec import dumps, loads
from .lost import RankLost

_CREDENTIALS = struct.Struct("3i")
_LENGTH = struct.Struct("<Q")


class Door:
    """Where the first rank lets the others in."""

    def __init__(self) -> None:
        self.address = f"headrace-{os.getpid()}-{secrets.token_hex(8)}"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.bind(f"\0{self.address}")
        self._socket.listen()

    def welcome(self, number: int, patience_s: float) -> Orders:
        """The channel to `number` others; the door is closed then. Raises RankLost if they don't come."""
        self._socket.settimeout(patience_s)
        lines: list[socket.socket] = []
        try:
            while len(lines) < number:
                line, _ = self._socket.accept()
                if _user(line) != os.getuid():
                    line.close()
                    continue
                line.settimeout(patience_s)
                lines.append(line)
        except OSError as error:
            for line in lines:
                line.close()
            raise RankLost(f"{len(lines)} of {number} other ranks came within {patience_s:g} s: {error}") from error
        finally:
            self._socket.close()
        return Orders(lines)


class Orders:
    """The first rank's end, with a line to each of the others, or another's, with one to the first."""

    def __init__(self, lines: list[socket.socket]) -> None:
        self._lines = lines

    @classmethod
    def enter(cls, address: str) -> Orders:
        """Through the door at `address`. Raises RankLost."""
        line = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            line.connect(f"\0{address}")
        except OSError as error:
            line.close()
            raise RankLost(f"the first rank is not there any more: {error}") from error
        return cls([line])

    def give(self, kind: str, *values: Any) -> None:
        """Tells all others. Raises RankLost if one is gone, or does not listen."""
        pack = dumps([kind, *values])
        frame = _LENGTH.pack(len(pack)) + pack
        try:
            for line in self._lines:
                line.sendall(frame)
        except OSError as error:
            raise RankLost(f"a rank takes no orders any more: {error}") from error

    def take(self) -> tuple[str, list[Any]]:
        """The next order; waits for it. Raises RankLost when there will be none."""
        (line,) = self._lines
        kind, *values = loads(_read(line, *_LENGTH.unpack(_read(line, _LENGTH.size))))
        return kind, values

    def close(self) -> None:
        """From any thread: whoever waits for an order, here or at the other end, is told that there will be none."""
        for line in self._lines:
            try:
                line.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # The other end was faster.
            line.close()


def _read(line: socket.socket, size: int) -> bytes:
    pieces = bytearray()
    while len(pieces) < size:
        try:
            piece = line.recv(size - len(pieces))
        except OSError as error:
            raise RankLost(f"orders have ended: {error}") from error
        if not piece:
            raise RankLost("orders have ended: the first rank is gone, or has closed")
        pieces += piece
    return bytes(pieces)


def _user(line: socket.socket) -> int:
    credentials = line.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    user: int = _CREDENTIALS.unpack(credentials)[1]
    return user
