"""How envelopes travel together: the frames of one ZeroMQ message, and back.

    [(envelope, buffers), ...]  --join-->  [envelopes and numbers of buffers], buffer, buffer, ...
                                <-split--

An envelope is opaque here, but for its first bytes; protocol.py says what they hold. Knows nothing of sockets.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import islice

import msgpack

from .codec import Buffer, encode
from .errors import CodecError
from .protocol import Kind

Envelope = bytes
"""A packed list of fields; see protocol.py."""

Item = tuple[Envelope, list[Buffer]]

MAX_ENVELOPES_PER_FRAME = 256
MAX_FRAME_BYTES = 1 << 20
"""No further envelope joins a frame past it."""

ZERO_COPY_BYTES = 64 * 1024
"""Smaller buffers are copied out of a message when it is received: a view would pin all of it."""

_MALFORMED = (ValueError, TypeError, msgpack.exceptions.UnpackException)


def size_of(envelope: Envelope, buffers: Sequence[Buffer]) -> int:
    """Bytes of a message, as they count for credits and bounds; lent memory is not among them."""
    return len(envelope) if not buffers else len(envelope) + sum(map(len, buffers))


def is_system(envelope: Envelope) -> bool:
    """Whether it travels in the system lane: answers, credits, the runtime's own messages."""
    return envelope[1] > Kind.STREAM or envelope[2] == 0


def next_batch(queue: deque[Item]) -> list[Item]:
    """The envelopes at the head of `queue` that travel as one message; they stay in it."""
    batch = list(islice(queue, MAX_ENVELOPES_PER_FRAME))
    size = 0
    for number, (envelope, _) in enumerate(batch, 1):
        size += len(envelope)
        if size >= MAX_FRAME_BYTES:
            return batch[:number]
    return batch


def join(batch: Sequence[Item]) -> list[Buffer]:
    """The frames of one message."""
    counts = [len(buffers) for _, buffers in batch]
    pack, _ = encode([[envelope for envelope, _ in batch], counts if any(counts) else []])
    return [pack, *(buffer for _, buffers in batch for buffer in buffers)]


def split(frames: Sequence[memoryview]) -> list[Item]:
    """The envelopes of one ZeroMQ message, each with its buffers. Raises CodecError, and nothing else."""
    if not frames:
        raise CodecError("a message without frames")
    try:
        envelopes, counts = msgpack.unpackb(frames[0])
    except _MALFORMED as error:
        raise CodecError(f"malformed frame: {error}") from None
    if type(envelopes) is not list or type(counts) is not list or any(type(e) is not bytes for e in envelopes):
        raise CodecError("a frame holds a list of envelopes, and one of numbers")
    if not counts and len(frames) == 1:
        return [(envelope, []) for envelope in envelopes]
    if len(counts) != len(envelopes) or any(type(count) is not int or count < 0 for count in counts):
        raise CodecError("a frame says for each envelope how many buffers it has")
    if sum(counts) != len(frames) - 1:
        raise CodecError(f"the envelopes of a message claim {sum(counts)} of {len(frames) - 1} buffers")
    buffers = iter([frame if len(frame) >= ZERO_COPY_BYTES else bytes(frame) for frame in frames[1:]])
    return [(envelope, list(islice(buffers, count))) for envelope, count in zip(envelopes, counts, strict=True)]
