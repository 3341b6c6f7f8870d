"""ZeroMQ between nodes: one ROUTER to receive, one DEALER per peer to send.

    send(peer, envelope) -> queue per peer -> a frame per loop turn -> DEALER ==ipc/tcp==> ROUTER -> on_envelope(...)

Plain sockets on the loop's file descriptor, drained at each wake-up: zmq.asyncio costs 24 times the throughput. The
envelopes of one loop turn to one peer travel as one ZeroMQ message: their packs in the first frame, their buffers in
the frames after. Nothing is ever sent on the ROUTER, so its silent drops can't happen. A DEALER at its high-water mark
leaves the rest in our own queue. Delivery is not acknowledged here: calls carry deadlines, and the node that owns this
transport is told by pidfd or heartbeat when a peer is gone. Knows nothing of actors.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import zmq

from .codec import Buffer
from .errors import CodecError, LaunchError
from .frame import MAX_FRAME_BYTES, ZERO_COPY_BYTES, Envelope, Item, join, next_batch, split

OnEnvelope = Callable[[str, Envelope, list[Buffer]], None]
OnMalformed = Callable[[str, str], None]

MAX_ENVELOPES_PER_DRAIN = 1000
"""Received before other work of the loop gets its turn."""

MAX_MESSAGE_BYTES = 1 << 31
"""Of one pack or buffer. ZeroMQ cuts the connection of a sender that goes beyond, so it is refused before."""

HIGH_WATER_MARK = 4096
MAX_IPC_PATH_BYTES = 107


@dataclass(slots=True)
class _Peer:
    socket: zmq.Socket[bytes]
    queue: deque[Item] = field(default_factory=deque)
    flush_scheduled: bool = False


class Transport:
    """The sockets of one node. `identity` is the node's key (`name#incarnation`), which receivers see as the sender."""

    def __init__(self, identity: str, address: str, on_envelope: OnEnvelope, on_malformed: OnMalformed) -> None:
        """Binds `address`. Raises LaunchError."""
        self.identity = identity
        self.address = address
        self.local: set[str] = set()
        """Keys of the peers that are processes of this host."""
        self._on_envelope = on_envelope
        self._on_malformed = on_malformed
        self._peers: dict[str, _Peer] = {}
        self._loop = asyncio.get_running_loop()
        check_address(address)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=1)
        self._router = self._bind(address)
        self._loop.add_reader(self._router.fileno(), self._drain)
        self._loop.call_soon(self._drain)

    def connect(self, peer: str, address: str) -> None:
        """Opens the way to a peer, whose socket had better be bound: ZeroMQ tries again only after a while."""
        if peer in self._peers:
            return
        socket = self._context.socket(zmq.DEALER)
        socket.setsockopt(zmq.ROUTING_ID, self.identity.encode())
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.SNDHWM, HIGH_WATER_MARK)
        socket.setsockopt(zmq.RECONNECT_IVL, 20)
        socket.setsockopt(zmq.RECONNECT_IVL_MAX, 500)
        socket.connect(address)
        self._peers[peer] = _Peer(socket)
        if address.startswith("ipc://"):
            self.local.add(peer)
        self._loop.add_reader(socket.fileno(), self._flush, peer)

    def disconnect(self, peer: str) -> None:
        """Forgets a peer that is gone, with what was still queued for it."""
        self.local.discard(peer)
        gone = self._peers.pop(peer, None)
        if gone is not None:
            self._loop.remove_reader(gone.socket.fileno())
            gone.socket.close(linger=0)

    def send(self, peer: str, envelope: Envelope, buffers: list[Buffer]) -> bool:
        """Queues an envelope; False if the peer is not connected. `buffers` must not change until they are sent.

        Raises CodecError for what is too large for one message.
        """
        link = self._peers.get(peer)
        if link is None:
            return False
        if any(len(piece) > MAX_MESSAGE_BYTES - MAX_FRAME_BYTES for piece in (envelope[-1], *buffers)):
            raise CodecError(f"a message holds at most {MAX_MESSAGE_BYTES >> 20} MiB in one piece; send it in parts")
        link.queue.append((envelope, buffers))
        if not link.flush_scheduled:
            link.flush_scheduled = True
            self._loop.call_soon(self._flush, peer)
        return True

    async def close(self, *, drain_s: float = 0.5) -> None:
        """Sends what is queued, for at most `drain_s`, and closes all sockets."""
        for peer in list(self._peers):
            self._flush(peer)
        self._loop.remove_reader(self._router.fileno())
        for link in self._peers.values():
            self._loop.remove_reader(link.socket.fileno())
            link.socket.close(linger=int(drain_s * 1000))
        self._peers.clear()
        self.local.clear()
        self._router.close(linger=0)
        await self._loop.run_in_executor(None, self._context.term)

    def _bind(self, address: str) -> zmq.Socket[bytes]:
        socket = self._context.socket(zmq.ROUTER)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.RCVHWM, HIGH_WATER_MARK)
        socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        try:
            socket.bind(address)
        except zmq.ZMQError as error:
            self._context.destroy(linger=0)
            raise LaunchError(f"can't bind {address}: {error.strerror}; is another run using it?") from None
        return socket

    def _flush(self, peer: str) -> None:
        link = self._peers.get(peer)
        if link is None:
            return
        link.flush_scheduled = False
        queue = link.queue
        while queue:
            batch = next_batch(queue)
            frames = join(batch)
            large = any(len(frame) >= ZERO_COPY_BYTES for frame in frames)
            try:
                link.socket.send_multipart(frames, zmq.NOBLOCK, copy=not large)
            except zmq.Again:
                # The descriptor is edge-triggered: reading EVENTS re-arms it, and a wake-up flushes again.
                if not int(link.socket.getsockopt(zmq.EVENTS)) & zmq.POLLOUT:
                    return
                continue
            for _ in batch:
                queue.popleft()
        link.socket.getsockopt(zmq.EVENTS)

    def _drain(self) -> None:
        received = 0
        try:
            while received < MAX_ENVELOPES_PER_DRAIN and not self._router.closed:
                received += self._receive(self._router.recv_multipart(zmq.NOBLOCK, copy=False))
        except zmq.Again:
            return
        except BaseException:
            # The descriptor won't tell again of what still waits.
            self._loop.call_soon(self._drain)
            raise
        if not self._router.closed:
            self._loop.call_soon(self._drain)

    def _receive(self, parts: list[zmq.Frame]) -> int:
        sender = bytes(parts[0].buffer).decode("utf-8", "replace")
        try:
            envelopes = split([part.buffer for part in parts[1:]])
        except CodecError as error:
            self._on_malformed(sender, str(error))
            return 1
        for envelope, buffers in envelopes:
            self._on_envelope(sender, envelope, buffers)
        return len(envelopes) + 1


def check_address(address: str) -> None:
    """Raises LaunchError for a path that is too long for a socket."""
    path = address.removeprefix("ipc://")
    if path != address and len(path.encode()) > MAX_IPC_PATH_BYTES:
        raise LaunchError(
            f"socket path {path} has {len(path.encode())} bytes, ipc allows {MAX_IPC_PATH_BYTES}: "
            "set TMPDIR to a shorter path"
        )
