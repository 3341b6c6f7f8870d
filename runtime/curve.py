"""Who may talk to a node over tcp: CURVE keys, the files that hold them, and the gate that checks strangers.

    Keys.generate() | Keys.load(file) -> every tcp socket of the system     a client's key -> Gate -> let in | refused

CURVE by itself encrypts for anybody who asks; the gate (ZAP, ZeroMQ's RFC 27) lets in the keys of a list only. The
nodes of one system share one pair of keys. Knows nothing of messages.
"""

from __future__ import annotations

import asyncio
import os
import stat
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import zmq
from zmq.utils import z85

from .codec import wire
from .errors import LaunchError

DOMAIN = b"headrace"
_ENDPOINT = "inproc://zeromq.zap.01"
_KEY_CHARS = 40


@wire
@dataclass(frozen=True, kw_only=True)
class Keys:
    """A pair of CURVE keys, 40 characters each, and whom its holder lets in."""

    public: str
    secret: str = field(repr=False)
    allowed: tuple[str, ...] = ()
    """Public keys of others that may connect; the own one always may."""

    def __post_init__(self) -> None:
        for key in (self.public, self.secret, *self.allowed):
            if not _is_key(key):
                raise ValueError(f"a CURVE key has {_KEY_CHARS} characters of Z85")
        if zmq.curve_public(self.secret.encode()) != self.public.encode():
            raise ValueError("the public key does not belong to the secret key")

    @classmethod
    def generate(cls) -> Keys:
        """A new pair."""
        public, secret = zmq.curve_keypair()
        return cls(public=public.decode(), secret=secret.decode())

    @classmethod
    def load(cls, path: Path) -> Keys:
        """Reads what `save` wrote. Raises LaunchError if it is missing, damaged, or open to others."""
        try:
            status = path.stat()
            data = path.read_bytes() if stat.S_ISREG(status.st_mode) else None
        except OSError as error:
            raise LaunchError(f"key file {path}: {error.strerror}; write one with Keys.generate().save(path)") from None
        if data is None:
            raise LaunchError(f"key file {path}: it is no file")
        if status.st_uid != os.geteuid() or status.st_mode & 0o077:
            raise LaunchError(
                f"key file {path}: others may read it (user {status.st_uid}, mode {stat.S_IMODE(status.st_mode):04o}); "
                f"it must be yours alone: chmod 600 {path}, and if it was readable, make new keys"
            )
        try:
            table = tomllib.loads(data.decode())
            return cls(public=table["public"], secret=table["secret"], allowed=tuple(table["allowed"]))
        except KeyError as error:
            raise LaunchError(f"key file {path}: it is damaged: {error} is missing; copy it again") from None
        except (ValueError, TypeError) as error:
            raise LaunchError(f"key file {path}: it is damaged: {error}; copy it again") from None

    def save(self, path: Path) -> None:
        """Writes a new file of mode 0600. Raises LaunchError if it can't, or if there is one."""
        # Z85 has neither quotes nor backslashes.
        allowed = ", ".join(f"'{key}'" for key in self.allowed)
        text = f"public = '{self.public}'\nsecret = '{self.secret}'\nallowed = [{allowed}]\n"
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise LaunchError(f"key file {path}: {error.strerror}; nothing was written") from None
        with open(descriptor, "w") as file:
            file.write(text)

    def guard(self, socket: zmq.Socket[bytes]) -> None:
        """Has a socket that will be bound take in only those whom the context's gate lets in."""
        socket.setsockopt(zmq.CURVE_SERVER, 1)
        socket.setsockopt(zmq.CURVE_SECRETKEY, self.secret.encode())
        socket.setsockopt(zmq.ZAP_DOMAIN, DOMAIN)
        socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)

    def introduce(self, socket: zmq.Socket[bytes]) -> None:
        """Has a socket that will be connected to a node of this system prove who it is."""
        socket.setsockopt(zmq.CURVE_SERVERKEY, self.public.encode())
        socket.setsockopt(zmq.CURVE_PUBLICKEY, self.public.encode())
        socket.setsockopt(zmq.CURVE_SECRETKEY, self.secret.encode())


class Gate:
    """Answers ZeroMQ's question whether a client may connect, on the loop. One per context, made before its servers."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], keys: Keys, on_refused: Callable[[str], None]) -> None:
        """`on_refused` gets the reason in words."""
        self._allowed = {z85.decode(key.encode()) for key in (keys.public, *keys.allowed)}
        self._on_refused = on_refused
        self._loop = asyncio.get_running_loop()
        self._socket = context.socket(zmq.REP)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.bind(_ENDPOINT)
        self._loop.add_reader(self._socket.fileno(), self._answer)

    def close(self) -> None:
        self._loop.remove_reader(self._socket.fileno())
        self._socket.close(linger=0)

    def _answer(self) -> None:
        while True:
            try:
                question = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            refusal = self._judge(question)
            verdict = (b"200", b"OK") if refusal is None else (b"400", b"refused")
            self._socket.send_multipart([b"1.0", question[1], *verdict, b"", b""])
            if refusal is not None:
                self._on_refused(refusal)

    def _judge(self, question: list[bytes]) -> str | None:
        """Why not, or None. The fields are version, request, domain, address, identity, mechanism, credentials."""
        _, _, _, address, _, mechanism, *credentials = question
        where = address.decode("utf-8", "replace")
        if mechanism != b"CURVE" or len(credentials) != 1:
            return f"a client at {where} without a key"
        if credentials[0] not in self._allowed:
            return f"a client at {where} with the unknown key {z85.encode(credentials[0]).decode()}"
        return None


def _is_key(key: object) -> bool:
    if type(key) is not str or len(key) != _KEY_CHARS:
        return False
    try:
        z85.decode(key.encode("ascii"))
    except (ValueError, KeyError):
        return False
    return True
