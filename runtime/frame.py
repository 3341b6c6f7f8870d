"""How envelopes travel together: the frames of one ZeroMQ message, and back.

    [(envelope, buffers), ...]  --join-->  [frame of all packs, buffer, buffer, ...]
                                <-split--

Knows nothing of sockets.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import msgpack

from .codec import Buffer
from .errors import CodecError
from .mailbox import Lane

Envelope = list[Any]
"""[kind, id, target, method, lane, incarnation, milliseconds left or None, pack]; see node.py."""

Item = tuple[Envelope, list[Buffer]]

MAX_ENVELOPES_PER_FRAME = 256
MAX_FRAME_BYTES = 1 << 20
"""No further envelope joins a frame past it."""

_SYSTEM = int(Lane.SYSTEM)
_HEAD_BYTES = 64
"""What the other fields of an envelope take, about."""

ZERO_COPY_BYTES = 64 * 1024
"""Smaller buffers are copied out of a message when it is received: a view would pin all of it."""


def size_of(envelope: Envelope, buffers: Sequence[Buffer]) -> int:
    """About how many bytes it takes while it waits."""
    size = len(envelope[-1]) + _HEAD_BYTES
    for buffer in buffers:
        size += len(buffer)
    return size


def is_system(envelope: Envelope) -> bool:
    """Whether it travels in the system lane: answers, credits, the runtime's own messages."""
    return bool(envelope[4] == _SYSTEM)


def next_batch(queue: deque[Item]) -> list[Item]:
    """The envelopes at the head of `queue` that travel as one message; they stay in it."""
    batch: list[Item] = []
    size = 0
    for item in queue:
        batch.append(item)
        size += len(item[0][-1])
        if len(batch) == MAX_ENVELOPES_PER_FRAME or size >= MAX_FRAME_BYTES:
            break
    return batch


def join(batch: Sequence[Item]) -> list[Buffer]:
    """The frames of one message."""
    frames: list[Buffer] = [msgpack.packb([[*envelope, len(buffers)] for envelope, buffers in batch])]
    for _, buffers in batch:
        frames += buffers
    return frames


def split(frames: Sequence[memoryview]) -> list[Item]:
    """The envelopes of one ZeroMQ message, each with its buffers. Raises CodecError, and nothing else."""
    if not frames:
        raise CodecError("a message without frames")
    buffers: list[Buffer] = [f if len(f) >= ZERO_COPY_BYTES else bytes(f) for f in frames[1:]]
    try:
        entries = msgpack.unpackb(frames[0])
    except (ValueError, TypeError, msgpack.exceptions.UnpackException) as error:
        raise CodecError(f"malformed frame: {error}") from None
    if type(entries) is not list:
        raise CodecError("a frame holds a list of envelopes")
    envelopes: list[Item] = []
    position = 0
    for entry in entries:
        if type(entry) is not list or len(entry) != 9:
            raise CodecError("an envelope has 9 fields")
        kind, id, target, method, lane, incarnation, left, pack, count = entry
        if not (
            type(kind) is type(id) is type(lane) is type(incarnation) is type(count) is int
            and type(target) is type(method) is str
            and type(pack) is bytes
            and (left is None or type(left) is int)
        ):
            raise CodecError("an envelope has a field of a wrong type")
        if not 0 <= count <= len(buffers) - position:
            raise CodecError(f"an envelope claims {count} of {len(buffers) - position} buffers")
        envelopes.append((entry[:-1], buffers[position : position + count]))
        position += count
    if position != len(buffers):
        raise CodecError(f"{len(buffers) - position} buffers belong to no envelope")
    return envelopes
