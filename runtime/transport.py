"""What a node needs of whatever carries its messages, and the bounds that hold for every carrier.

    send -> Backlog (bounded) -> [zmq_transport.py: ipc, tcp | memory_transport.py: tests] -> inbox.py -> on_envelope

Two ways lead to each peer: the control way, and the bulk way, so that a large buffer never holds up a small message.
Each way keeps its order; between the two there is none. Delivery is not acknowledged here: calls carry deadlines, and
the node is told by pidfd or heartbeat when a peer is gone. Knows nothing of actors.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable
from typing import Any, Protocol

from .codec import Buffer
from .curve import Keys
from .errors import CodecError, LaunchError, MailboxFull
from .frame import Envelope

OnEnvelope = Callable[[str, Envelope, list[Buffer]], None]
"""Sender, envelope, its buffers."""
OnPlain = Callable[[str, list[Any], list[int]], None]
"""Sender; envelopes without buffers, unpacked, of which nothing else is known; the size of each."""
OnMalformed = Callable[[str, str], None]
"""Sender, what was wrong."""
OnPeer = Callable[[str], None]

MAX_MESSAGE_BYTES = 1 << 31
"""Of an envelope with its buffers."""

BACKLOG_MESSAGES = 1 << 16
BACKLOG_BYTES = 512 << 20
"""What may wait here for one peer, on each of the two ways."""

RESERVE_MESSAGES = 1 << 12
RESERVE_BYTES = 8 << 20
"""What the system lane may have beyond: answers, credits and cancellations get through where new work does not."""

TELL_AGAIN_S = 1.0
"""Between two tellings of a peer that it counts as dead."""

MAX_IPC_PATH_BYTES = 107
BULK_SUFFIX = "+"
"""One character: paths of sockets are short."""


class Transport(Protocol):
    """Carries the envelopes of one node. `identity` is the node's key (`name#incarnation`)."""

    identity: str
    address: str
    """Where peers connect to."""
    local: set[str]
    """The connected peers that are processes of this host, and may be lent memory."""
    on_beat: OnPeer
    """Called for each heartbeat of a peer."""
    on_fenced: OnPeer
    """Called when a peer says that this node was declared dead: nobody takes its messages any more."""

    def take_plain(self, on_plain: OnPlain) -> None:
        """Has `on_plain` take what it can, in place of on_envelope: the envelopes of a message are unpacked at once."""

    def connect(self, peer: str, address: str) -> None:
        """Opens the way to a peer; does nothing if it is open."""

    def disconnect(self, peer: str) -> None:
        """Forgets a peer that is gone, with what was still queued for it."""

    def send(self, peer: str, envelope: Envelope, buffers: list[Buffer], *, bulk: bool = False) -> bool:
        """Queues an envelope; False if the peer is not connected. `buffers` must not change until they are sent.

        `bulk`: by the way of large ones, on which others may overtake it. Raises MailboxFull if too much waits for this
        peer, CodecError for what is too large.
        """

    def beat(self, peer: str) -> None:
        """Sends a heartbeat, ahead of what is queued."""

    def heard(self, peer: str) -> float | None:
        """Loop time of the last message of any kind from that peer; None if there was none."""

    def tell_fenced(self, peer: str) -> None:
        """Tells a peer that was disconnected that it counts as dead."""

    def listen(self, address: str, keys: Keys | None) -> str:
        """Can be reached at a further address from now on; returns it with its port. Raises LaunchError."""

    async def close(self, *, drain_s: float = 0.5) -> None:
        """Sends what is queued, for at most `drain_s`, and closes everything."""


TransportFactory = Callable[[str, str, OnEnvelope, OnMalformed], Transport]
"""Makes the transport of a node from its key, its address, and what it does with messages. Raises LaunchError."""


class Backlog:
    """Counts what waits for one peer on one way."""

    __slots__ = ("_peer", "bytes", "messages")

    def __init__(self, peer: str) -> None:
        self._peer = peer
        self.messages = 0
        self.bytes = 0

    def add(self, size: int, *, system: bool) -> None:
        """One message more. Raises MailboxFull if it does not fit; an empty backlog takes any that may travel."""
        if size > MAX_MESSAGE_BYTES:
            raise CodecError(f"a message has at most {MAX_MESSAGE_BYTES >> 20} MiB, this has {size >> 20}: send parts")
        messages, total = self.messages + 1, self.bytes + size
        if messages > BACKLOG_MESSAGES or total > BACKLOG_BYTES:
            room = system and messages <= BACKLOG_MESSAGES + RESERVE_MESSAGES and total <= BACKLOG_BYTES + RESERVE_BYTES
            if self.messages and not room:
                raise MailboxFull(
                    f"{self.messages} messages of {self.bytes >> 20} MiB wait to be sent to {self._peer}, which takes "
                    "them too slowly; slow down, and ask again"
                )
        self.messages, self.bytes = messages, total

    def add_quickly(self, size: int) -> bool:
        """One message more, if it is far from every bound."""
        if self.messages >= BACKLOG_MESSAGES or self.bytes + size > min(BACKLOG_BYTES, MAX_MESSAGE_BYTES):
            return False
        self.messages += 1
        self.bytes += size
        return True

    def remove(self, messages: int, size: int) -> None:
        """They were sent."""
        self.messages -= messages
        self.bytes -= size


def ignore(_: str) -> None:
    """What a transport does at first with what nobody asked for."""


def bulk_address(address: str) -> str:
    """Where the bulk way of a node leads: beside its socket, or the next port."""
    if not address.startswith("tcp://"):
        return address + BULK_SUFFIX
    host, _, port = address.rpartition(":")
    return f"{host}:{int(port) + 1}"


def check_address(address: str, keys: Keys | None = None) -> None:
    """Whether a node may listen there: a path that fits into a socket; a tcp address that others can use and, beyond
    loopback, keys. Raises LaunchError."""
    kind, _, rest = address.partition("://")
    if kind == "ipc":
        size = len((rest + BULK_SUFFIX).encode())
        if size > MAX_IPC_PATH_BYTES:
            raise LaunchError(
                f"socket path {rest}{BULK_SUFFIX} has {size} bytes, ipc allows {MAX_IPC_PATH_BYTES}: "
                "set TMPDIR to a shorter path"
            )
    elif kind == "tcp":
        _check_tcp(address, keys)
    else:
        raise LaunchError(f"address {address!r}: it must start with ipc:// or tcp://")


def resolve(address: str) -> str:
    """The tcp address with its host as a number, which ZeroMQ binds. Raises LaunchError."""
    host, port = _split(address)
    try:
        numbers = [entry[4][0] for entry in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)]
    except OSError as error:
        raise LaunchError(f"address {address}: host {host!r} is not known here ({error.strerror or error})") from None
    number = str(numbers[0])
    return f"tcp://[{number}]:{port}" if ":" in number else f"tcp://{number}:{port}"


def _check_tcp(address: str, keys: Keys | None) -> None:
    host, _ = _split(resolve(address))
    number = ipaddress.ip_address(host)
    if number.is_unspecified:
        raise LaunchError(
            f"address {address}: other nodes can't connect to {host}; give the address of one network interface"
        )
    if not number.is_loopback and keys is None:
        raise LaunchError(
            f"address {address} can be reached from other hosts, and there are no keys: anybody could send messages; "
            "give keys (Keys.generate or Keys.load), or listen on 127.0.0.1"
        )


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or host == "*" or not port.isdecimal() or int(port) > 65535:
        raise LaunchError(
            f"address {address!r}: it must be tcp://HOST:PORT, with a host that others can reach (port 0: any)"
        )
    return host, int(port)
