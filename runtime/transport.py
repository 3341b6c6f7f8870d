"""ZeroMQ between nodes: one ROUTER to receive, one DEALER per peer to send.

    send(peer, envelope) -> queue per peer -> one frame per loop turn -> DEALER ==ipc/tcp==> ROUTER -> on_envelope(peer, ...)

Plain sockets on the loop's file descriptor, drained at each wake-up: zmq.asyncio costs 24 times the throughput. All envelopes
of one loop turn to one peer travel as one ZeroMQ message: their packs in the first frame, their buffers in the frames after.
Nothing is ever sent on the ROUTER, so its silent drops can't happen. A DEALER at its high-water mark leaves the rest in our
own queue. Delivery is not acknowledged here: calls carry deadlines, and the node that owns this transport is told by pidfd
or heartbeat when a peer is gone. Knows nothing of actors.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgpack
import zmq

from .codec import Buffer
from .errors import CodecError, LaunchError

Envelope = list[Any]
"""[kind, id, target, method, lane, milliseconds left or None, pack]; see node.py."""

OnEnvelope = Callable[[str, Envelope, list[Buffer]], None]
OnMalformed = Callable[[str, str], None]

MAX_ENVELOPES_PER_FRAME = 256
MAX_DRAIN = 500
MAX_MESSAGE_BYTES = 2**31
ZERO_COPY_BYTES = 64 * 1024
HIGH_WATER_MARK = 4096
MAX_IPC_PATH_BYTES = 107


@dataclass(slots=True)
class _Peer:
    socket: zmq.Socket[bytes]
    queue: deque[tuple[Envelope, list[Buffer]]] = field(default_factory=deque)
    flush_scheduled: bool = False


class Transport:
    """The sockets of one node. `identity` is the node's key (`name#incarnation`), which receivers see as the sender."""

    def __init__(self, identity: str, address: str, on_envelope: OnEnvelope, on_malformed: OnMalformed) -> None:
        self.identity = identity
        self.address = address
        self._on_envelope = on_envelope
        self._on_malformed = on_malformed
        self._peers: dict[str, _Peer] = {}
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=1)
        self._loop = asyncio.get_running_loop()
        self._router = self._bind(address)
        self._loop.add_reader(self._router.fileno(), self._drain)
        self._loop.call_soon(self._drain)

    def connect(self, peer: str, address: str) -> None:
        """Opens the way to a peer; sends before its socket is bound wait in ZeroMQ's queue."""
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
        self._loop.add_reader(socket.fileno(), self._flush, peer)

    def disconnect(self, peer: str) -> None:
        """Forgets a peer that is gone, with what was still queued for it."""
        gone = self._peers.pop(peer, None)
        if gone is not None:
            self._loop.remove_reader(gone.socket.fileno())
            gone.socket.close(linger=0)

    def send(self, peer: str, envelope: Envelope, buffers: list[Buffer]) -> bool:
        """Queues an envelope; False if the peer is not connected. `buffers` must not change until they are sent."""
        link = self._peers.get(peer)
        if link is None:
            return False
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
        for peer in list(self._peers.values()):
            self._loop.remove_reader(peer.socket.fileno())
            peer.socket.close(linger=int(drain_s * 1000))
        self._peers.clear()
        self._router.close(linger=0)
        await self._loop.run_in_executor(None, self._context.term)

    def _bind(self, address: str) -> zmq.Socket[bytes]:
        path = address.removeprefix("ipc://")
        if path != address and len(path.encode()) > MAX_IPC_PATH_BYTES:
            raise LaunchError(
                f"socket path {path} has {len(path.encode())} bytes, ipc allows {MAX_IPC_PATH_BYTES}: "
                "use a run directory with a shorter path"
            )
        socket = self._context.socket(zmq.ROUTER)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.RCVHWM, HIGH_WATER_MARK)
        socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        try:
            socket.bind(address)
        except zmq.ZMQError as error:
            socket.close()
            raise LaunchError(f"can't bind {address}: {error.strerror}; is another run using it?") from None
        return socket

    def _flush(self, peer: str) -> None:
        link = self._peers.get(peer)
        if link is None:
            return
        link.flush_scheduled = False
        queue = link.queue
        while queue:
            batch = [queue[i] for i in range(min(len(queue), MAX_ENVELOPES_PER_FRAME))]
            head = msgpack.packb([[*envelope, len(buffers)] for envelope, buffers in batch])
            frames = [head, *(buffer for _, buffers in batch for buffer in buffers)]
            large = any(memoryview(frame).nbytes >= ZERO_COPY_BYTES for frame in frames)
            try:
                link.socket.send_multipart(frames, zmq.NOBLOCK, copy=not large)
            except zmq.Again:
                # The descriptor is edge-triggered: reading EVENTS re-arms it, and a wake-up flushes again.
                if not link.socket.getsockopt(zmq.EVENTS) & zmq.POLLOUT:
                    return
                continue
            for _ in batch:
                queue.popleft()
        link.socket.getsockopt(zmq.EVENTS)

    def _drain(self) -> None:
        for _ in range(MAX_DRAIN):
            try:
                parts = self._router.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            self._receive(parts)
            if self._router.closed:
                return
        self._loop.call_soon(self._drain)

    def _receive(self, parts: list[zmq.Frame]) -> None:
        sender = bytes(parts[0].buffer).decode("utf-8", "replace")
        try:
            envelopes = _split(parts[1:])
        except (CodecError, ValueError, TypeError, msgpack.exceptions.UnpackException) as error:
            self._on_malformed(sender, str(error))
            return
        for envelope, buffers in envelopes:
            self._on_envelope(sender, envelope, buffers)


def _split(frames: list[zmq.Frame]) -> list[tuple[Envelope, list[Buffer]]]:
    if not frames:
        raise CodecError("a message without frames")
    envelopes = []
    # Small buffers are copied out: a view would pin the whole ZeroMQ message.
    buffers: list[Buffer] = [f.buffer if len(f.buffer) >= ZERO_COPY_BYTES else bytes(f.buffer) for f in frames[1:]]
    position = 0
    for entry in msgpack.unpackb(frames[0].buffer):
        if not isinstance(entry, list) or len(entry) != 8:
            raise CodecError("an envelope has 8 fields")
        *envelope, count = entry
        if not isinstance(count, int) or not 0 <= count <= len(buffers) - position:
            raise CodecError(f"an envelope claims {count} of {len(buffers) - position} buffers")
        envelopes.append((envelope, buffers[position : position + count]))
        position += count
    if position != len(buffers):
        raise CodecError(f"{len(buffers) - position} buffers belong to no envelope")
    return envelopes
