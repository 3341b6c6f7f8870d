"""What arrives from peers, checked: its version, its order, that it is no duplicate, and that every piece is there.

    first eight bytes of every message: version | form | serial number of the sender on this way

    BATCH    envelopes with their buffers, as frame.py joins them            -> on_envelope for each
    BLOCK    the sizes of the frames of one large message, then its CHUNKs   -> put together, then as a BATCH
    BEAT     nothing else: the sender is alive                               -> on_beat
    FENCED   nothing else: the sender counts this node as dead               -> on_fenced

A serial number that was seen is a duplicate and is dropped, so that nothing runs twice. Whatever else is wrong with a
message is reported with its sender, and the message is dropped. Knows nothing of sockets.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Callable, Sequence
from enum import IntEnum

import msgpack

from .buffers import BufferPool
from .codec import Buffer
from .errors import CodecError
from .frame import read, split
from .transport import MAX_MESSAGE_BYTES, OnEnvelope, OnMalformed, OnPeer, OnPlain

VERSION = 1
CHUNK_BYTES = 1 << 20
"""Of a large message that travel at once."""

OVERHEAD_BYTES = 1 << 24
"""What the first frame of a message may have beside what it carries."""

MAX_FRAMES = 1 << 16
"""Of one large message."""

ALIGN_BYTES = 64
"""Where a frame begins within its block."""

MAX_SENDERS = 4096
"""Remembered; of more, those that were silent longest are forgotten."""

_STAMP = struct.Struct(">Q")
_OFFSET = struct.Struct(">Q")
_WINDOW = 1024
_WINDOW_MASK = (1 << _WINDOW) - 1
_SERIAL_MASK = (1 << 48) - 1


class Form(IntEnum):
    """What a message is."""

    BATCH = 1
    BEAT = 2
    FENCED = 3
    BLOCK = 4
    CHUNK = 5


def stamp(form: Form, serial: int, rest: Buffer = b"") -> bytes:
    """The first frame of a message."""
    head = _STAMP.pack(VERSION << 56 | form << 48 | serial)
    return b"".join((head, rest)) if rest else head


def block_sizes(frames: Sequence[Buffer]) -> bytes:
    """What a BLOCK says: the size of each frame."""
    packed: bytes = msgpack.packb([len(frame) for frame in frames])
    return packed


def chunks(frames: Sequence[Buffer]) -> list[tuple[bytes, memoryview]]:
    """The pieces of a block, each with what its CHUNK says: where it belongs."""
    pieces = []
    for frame, begin in zip(frames, _layout([len(frame) for frame in frames])[0], strict=True):
        view = memoryview(frame)
        for at in range(0, len(view), CHUNK_BYTES):
            pieces.append((_OFFSET.pack(begin + at), view[at : at + CHUNK_BYTES]))
    return pieces


class _Sender:
    """What is known of one sender: when it was heard, which serial numbers have come, what is being put together."""

    __slots__ = ("block", "heard", "last", "left", "name", "seen", "sizes")

    def __init__(self, name: str, heard: float) -> None:
        self.name = name
        self.heard = heard
        self.last = 0
        self.seen = 0
        self.block: memoryview | None = None
        self.sizes: list[int] = []
        self.left: deque[tuple[int, int]] = deque()
        """Offset and size of the pieces that are still to come, in their order."""

    def is_new(self, serial: int) -> bool:
        """Notes a serial number; False if it was there before, or is older than can be known."""
        ahead = serial - self.last
        if ahead > 0:
            self.seen = ((self.seen << ahead) | 1) & _WINDOW_MASK if ahead < _WINDOW else 1
            self.last = serial
            return True
        if ahead <= -_WINDOW or self.seen & (bit := 1 << -ahead):
            return False
        self.seen |= bit
        return True


class Inbox:
    """Receives by one way, control or bulk."""

    def __init__(
        self,
        on_envelope: OnEnvelope,
        on_malformed: OnMalformed,
        on_beat: OnPeer,
        on_fenced: OnPeer,
        clock: Callable[[], float],
        max_bytes: int = MAX_MESSAGE_BYTES + OVERHEAD_BYTES,
    ) -> None:
        """`max_bytes`: of one message; a larger one is refused."""
        self.duplicates = 0
        self.on_plain: OnPlain | None = None
        """Takes all envelopes of a message without buffers, unpacked; on_envelope those that it is not given."""
        self._max_bytes = max_bytes
        self._on_envelope = on_envelope
        self._on_malformed = on_malformed
        self._on_beat = on_beat
        self._on_fenced = on_fenced
        self._clock = clock
        self._senders: dict[bytes, _Sender] = {}
        self._pool = BufferPool()

    def heard(self, peer: str) -> float | None:
        """What `clock` showed at the last message of that peer; None if there was none."""
        sender = self._senders.get(peer.encode())
        return None if sender is None else sender.heard

    def accept(self, identity: bytes, frames: Sequence[Buffer]) -> int:
        """Takes one message; returns about how many envelopes' work it was."""
        sender = self._senders.get(identity) or self._meet(identity)
        try:
            if not frames or len(frames[0]) < _STAMP.size:
                raise CodecError("a message without its first eight bytes")
            (head,) = _STAMP.unpack_from(frames[0])
            size = len(frames[0]) if len(frames) == 1 else sum(map(len, frames))
            if size > self._max_bytes:
                raise CodecError(
                    f"an oversized message of {size} bytes; by this way they have {self._max_bytes} at most"
                )
            if head >> 56 != VERSION:
                raise CodecError(
                    f"wire version {head >> 56}, this node speaks {VERSION}: run the same release everywhere"
                )
            sender.heard = self._clock()
            if not sender.is_new(head & _SERIAL_MASK):
                self.duplicates += 1
                return 1
            form = head >> 48 & 0xFF
            if form == Form.BATCH:
                return self._deliver(sender, [memoryview(frames[0])[_STAMP.size :], *frames[1:]])
            self._other(sender, form, frames)
        except CodecError as error:
            self._on_malformed(sender.name, str(error))
        return 1

    def forget(self, peer: str) -> None:
        """A peer is gone, with what it had begun."""
        self._senders.pop(peer.encode(), None)

    def _meet(self, identity: bytes) -> _Sender:
        if len(self._senders) >= MAX_SENDERS:
            silent_longest = sorted(self._senders, key=lambda known: self._senders[known].heard)
            for known in silent_longest[: MAX_SENDERS // 4]:
                del self._senders[known]
        sender = self._senders[identity] = _Sender(identity.decode("utf-8", "replace"), self._clock())
        return sender

    def _deliver(self, sender: _Sender, frames: Sequence[Buffer]) -> int:
        if self.on_plain is not None and len(frames) == 1:
            try:
                plain, sizes = read(frames[0])
            except CodecError:
                pass  # One by one: what is wrong with one of them is told of that one.
            else:
                self.on_plain(sender.name, plain, sizes)
                return len(sizes) + 1
        envelopes = split(frames)
        for envelope, buffers in envelopes:
            self._on_envelope(sender.name, envelope, buffers)
        return len(envelopes) + 1

    def _other(self, sender: _Sender, form: int, frames: Sequence[Buffer]) -> None:
        if form == Form.BEAT:
            self._on_beat(sender.name)
        elif form == Form.FENCED:
            self._on_fenced(sender.name)
        elif form == Form.BLOCK:
            self._begin(sender, memoryview(frames[0])[_STAMP.size :])
        elif form == Form.CHUNK:
            self._continue(sender, frames)
        else:
            raise CodecError(f"a message of the unknown form {form}")

    def _begin(self, sender: _Sender, packed: memoryview) -> None:
        cut_off, sender.block = sender.block is not None, None
        try:
            sizes = msgpack.unpackb(packed)
        except (ValueError, TypeError, msgpack.exceptions.UnpackException) as error:
            raise CodecError(f"malformed block: {error}") from None
        if type(sizes) is not list or not 0 < len(sizes) <= MAX_FRAMES:
            raise CodecError(f"a block has a list of 1 to {MAX_FRAMES} sizes")
        if any(type(size) is not int or size < 0 for size in sizes) or sum(sizes) > MAX_MESSAGE_BYTES:
            raise CodecError(f"the sizes of a block are whole numbers of at most {MAX_MESSAGE_BYTES} in sum")
        begins, total = _layout(sizes)
        sender.block, sender.sizes = self._pool.take(total), sizes
        sender.left = deque(
            (begin + at, min(CHUNK_BYTES, size - at))
            for begin, size in zip(begins, sizes, strict=True)
            for at in range(0, size, CHUNK_BYTES)
        )
        if cut_off:
            raise CodecError("a large message was cut off by the next one")

    def _continue(self, sender: _Sender, frames: Sequence[Buffer]) -> None:
        block = sender.block
        if block is None:
            return  # Of a block that was refused, and reported then.
        offset, size = sender.left[0] if sender.left else (0, -1)
        if len(frames) != 2 or len(frames[1]) != size or frames[0][_STAMP.size :] != _OFFSET.pack(offset):
            sender.block = None
            raise CodecError(f"a large message lacks its piece at byte {offset}")
        block[offset : offset + size] = frames[1]
        sender.left.popleft()
        if not sender.left:
            sender.block = None
            begins, _ = _layout(sender.sizes)
            whole = block.toreadonly()
            self._deliver(sender, [whole[at : at + n] for at, n in zip(begins, sender.sizes, strict=True)])


def _layout(sizes: Sequence[int]) -> tuple[list[int], int]:
    """Where each frame of a block begins, and where the last one ends."""
    begins, at = [], 0
    for size in sizes:
        begins.append(at)
        at += -(-size // ALIGN_BYTES) * ALIGN_BYTES
    return begins, at
