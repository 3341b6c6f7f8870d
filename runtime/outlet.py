"""What waits to be sent to a peer by one ZeroMQ socket, and how it leaves: at the end of the loop turn, as one message;
or at once, as long as the messages to a peer come one by one.

    put -> queue -> [join: one message of up to 256 envelopes] -> socket        bulk: one envelope, cut into chunks
                                            '--- no room: waits for the descriptor

A beat goes ahead of the queue. Knows nothing of addresses, nor of what arrives.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Iterator
from contextvars import Context

import zmq

from .codec import Buffer
from .frame import ZERO_COPY_BYTES, Envelope, Item, is_system, join, next_batch, size_of
from .inbox import CHUNK_BYTES, Form, block_sizes, chunks, stamp
from .transport import Backlog

MAX_MESSAGES_PER_FLUSH = 64
"""Sent before other work of the loop gets its turn."""

FLUSH_AT = 32
"""So many envelopes don't wait for the end of the loop turn: the peer may work on them while more are written."""

APART_S = 50e-6
"""What comes so long after the last message, which was a single one, waits for no other."""

Socket = zmq.Socket[bytes]

# As plain numbers: pyzmq's enums cost as much as the sending.
_LAST = int(zmq.NOBLOCK)
_MORE = int(zmq.NOBLOCK) | int(zmq.SNDMORE)
_EVENTS = int(zmq.EVENTS)
_WRITABLE = int(zmq.POLLOUT)


class Outlet:
    """Sends many small messages. Owns its socket."""

    def __init__(self, peer: str, dealer: Socket, serials: Iterator[int]) -> None:
        """`serials`: numbers for its messages, which rise."""
        self._dealer = dealer
        self._serials = serials
        self._loop = asyncio.get_running_loop()
        self._queue: deque[Item] = deque()
        self._backlog = Backlog(peer)
        self._under_way = 0, 0
        """Envelopes and bytes of the message that is being sent."""
        self._stuck: list[Buffer] | None = None
        """What ZeroMQ had no room for."""
        self._beat_due = False
        self._scheduled = False
        self._single = True
        """The last message held one envelope."""
        self._sent_at = 0.0
        self._emptied: asyncio.Event | None = None
        # In no context: the first sender's would hold what its actor works on, as long as the outlet is there.
        Context().run(self._loop.add_reader, dealer.fileno(), self._awake)

    def put(self, envelope: Envelope, buffers: list[Buffer]) -> None:
        """Queues an envelope. Raises MailboxFull, CodecError."""
        size = len(envelope) if not buffers else size_of(envelope, buffers)
        if not self._backlog.add_quickly(size):
            self._backlog.add(size, system=is_system(envelope))
        self._queue.append((envelope, buffers))
        if self._scheduled:
            if len(self._queue) % FLUSH_AT == 0:
                self._send_queue()
        elif self._single and time.perf_counter() - self._sent_at > APART_S:
            self.flush()
        else:
            self._scheduled = True
            self._loop.call_soon(self.flush)

    def beat(self) -> None:
        """Sends a sign of life, ahead of what is queued."""
        self._beat_due = True
        self.flush()

    def flush(self) -> None:
        """Sends until ZeroMQ takes no more, or it is the turn of others."""
        self._scheduled = False
        self._send_queue()

    def _send_queue(self) -> None:
        dealer = self._dealer
        if dealer.closed:
            return
        for _ in range(MAX_MESSAGES_PER_FLUSH):
            message = self._stuck or self._next_message()
            if message is None:
                break
            self._stuck = message
            try:
                _send(dealer, message)
            except zmq.Again:
                self._single = False
                # The descriptor is edge-triggered: reading EVENTS re-arms it, and a wake-up flushes again.
                if not int(dealer.getsockopt(_EVENTS)) & _WRITABLE:
                    return
                continue
            self._stuck = None
        else:
            self._scheduled = True
            self._loop.call_soon(self.flush)
        self._sent_at = time.perf_counter()
        if self._emptied is not None and not self._backlog.messages:
            self._emptied.set()

    async def sent(self, until: float) -> None:
        """Waits until all is with ZeroMQ, at most until that loop time."""
        if self._backlog.messages:
            self._emptied = asyncio.Event()
            try:
                async with asyncio.timeout_at(until):
                    await self._emptied.wait()
            except TimeoutError:
                return

    def close(self, linger_ms: int) -> None:
        self._loop.remove_reader(self._dealer.fileno())
        self._dealer.close(linger=linger_ms)

    def _awake(self) -> None:
        """The descriptor has told something; reading EVENTS makes it silent again."""
        if not self._dealer.closed:
            self._dealer.getsockopt(_EVENTS)
            self.flush()

    def _next_message(self) -> list[Buffer] | None:
        if self._beat_due:
            self._beat_due = False
            return [self._stamp(Form.BEAT)]
        self._settle()
        queue = self._queue
        if not queue:
            return None
        batch = next_batch(queue)
        frames = join(batch)
        self._single = len(batch) == 1
        if len(batch) == len(queue):
            self._under_way = self._backlog.messages, self._backlog.bytes
            queue.clear()
        else:
            self._under_way = len(batch), sum(size_of(*item) for item in batch)
            for _ in batch:
                queue.popleft()
        frames[0] = self._stamp(Form.BATCH, frames[0])
        return frames

    def _settle(self) -> None:
        """What was under way is with ZeroMQ."""
        self._backlog.remove(*self._under_way)
        self._under_way = 0, 0

    def _stamp(self, form: Form, rest: Buffer = b"") -> bytes:
        return stamp(form, next(self._serials), rest)


class BulkOutlet(Outlet):
    """Sends few large messages, in chunks, one message at a time."""

    def __init__(self, peer: str, dealer: Socket, serials: Iterator[int]) -> None:
        super().__init__(peer, dealer, serials)
        self._chunks: Iterator[list[Buffer]] = iter(())
        """The rest of the message that is being sent."""

    def _next_message(self) -> list[Buffer] | None:
        chunk = next(self._chunks, None)
        if chunk is not None:
            return chunk
        self._settle()
        if not self._queue:
            return None
        item = self._queue.popleft()
        frames = join([item])
        self._under_way = 1, size_of(*item)
        if sum(map(len, frames)) > CHUNK_BYTES:
            self._chunks = self._cut(frames)
            return [self._stamp(Form.BLOCK, block_sizes(frames))]
        frames[0] = self._stamp(Form.BATCH, frames[0])
        return frames

    def _cut(self, frames: list[Buffer]) -> Iterator[list[Buffer]]:
        for offset, piece in chunks(frames):
            yield [self._stamp(Form.CHUNK, offset), piece]


def _send(dealer: Socket, frames: list[Buffer]) -> None:
    """Sends one message, or raises zmq.Again and sends nothing of it."""
    for frame in frames[:-1]:
        dealer.send(frame, _MORE, copy=len(frame) < ZERO_COPY_BYTES)
    last = frames[-1]
    dealer.send(last, _LAST, copy=len(last) < ZERO_COPY_BYTES)
