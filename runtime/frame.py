"""How envelopes travel together: the frames of one ZeroMQ message, and back.

    [(envelope, buffers), ...]  --join-->  [index, envelopes], buffer, buffer, ...
                                <-split--

The envelopes lie one after the other as one msgpack array, so that `read` unpacks all of them at once: that costs a
fraction of unpacking each. The index says where they begin and how many buffers each has.

    length of the index | [[sizes], [numbers of buffers, or none]] | head of an array | envelope | envelope | ...

An envelope is opaque here, but for its first bytes; protocol.py says what they hold. Knows nothing of sockets.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Sequence
from itertools import accumulate, islice, pairwise
from typing import Any

import msgpack

from .codec import Buffer, decode, encode
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

_INDEX = struct.Struct(">I")
_ARRAY = struct.Struct(">BI")
_ARRAY_32 = 0xDD
_INT = {int}
_MALFORMED = (ValueError, TypeError, struct.error, msgpack.exceptions.UnpackException)


def size_of(envelope: Envelope, buffers: Sequence[Buffer]) -> int:
    """Bytes of a message, as they count for credits and bounds; lent memory is not among them."""
    return len(envelope) if not buffers else len(envelope) + sum(map(len, buffers))


def is_system(envelope: Envelope) -> bool:
    """Whether it travels in the system lane: answers, credits, the runtime's own messages."""
    return envelope[1] > Kind.STREAM or envelope[2] == 0


def next_batch(queue: deque[Item]) -> list[Item]:
    """The envelopes at the head of `queue` that travel as one message; they stay in it."""
    if len(queue) == 1:
        return [queue[0]]
    batch = list(islice(queue, MAX_ENVELOPES_PER_FRAME))
    size = 0
    for number, (envelope, _) in enumerate(batch, 1):
        size += len(envelope)
        if size >= MAX_FRAME_BYTES:
            return batch[:number]
    return batch


def join(batch: Sequence[Item]) -> list[Buffer]:
    """The frames of one message."""
    envelopes = [envelope for envelope, _ in batch]
    counts = [len(buffers) for _, buffers in batch]
    index, _ = encode([[*map(len, envelopes)], counts if any(counts) else []])
    head = b"".join((_INDEX.pack(len(index)), index, _ARRAY.pack(_ARRAY_32, len(envelopes)), *envelopes))
    return [head, *(buffer for _, buffers in batch for buffer in buffers)]


def read(head: Buffer) -> tuple[list[Any], list[int]]:
    """The unpacked envelopes of a message without buffers, and the size of each. Raises CodecError if one of them can't
    be unpacked by itself: then `split` tells which."""
    sizes, counts, begin = _read_index(head)
    fields = decode(memoryview(head)[begin - _ARRAY.size :])
    if counts or type(fields) is not list or len(fields) != len(sizes):
        raise CodecError("a frame holds a list of envelopes, and their sizes")
    return fields, sizes


def split(frames: Sequence[Buffer]) -> list[Item]:
    """The envelopes of one ZeroMQ message, each with its buffers. Raises CodecError, and nothing else."""
    if not frames:
        raise CodecError("a message without frames")
    head = memoryview(frames[0])
    sizes, counts, begin = _read_index(head)
    ends = [*accumulate(sizes, initial=begin)]
    envelopes = [bytes(head[at:end]) for at, end in pairwise(ends)]
    if not counts and len(frames) == 1:
        return [(envelope, []) for envelope in envelopes]
    if len(counts) != len(envelopes) or not _are_sizes(counts):
        raise CodecError("a frame says for each envelope how many buffers it has")
    if sum(counts) != len(frames) - 1:
        raise CodecError(f"the envelopes of a message claim {sum(counts)} of {len(frames) - 1} buffers")
    buffers = iter([frame if len(frame) >= ZERO_COPY_BYTES else bytes(frame) for frame in frames[1:]])
    return [(envelope, list(islice(buffers, count))) for envelope, count in zip(envelopes, counts, strict=True)]


def _read_index(head: Buffer) -> tuple[list[int], list[int], int]:
    """Sizes, numbers of buffers, and where the first envelope begins. Raises CodecError."""
    view = memoryview(head)
    try:
        (length,) = _INDEX.unpack_from(view)
        begin = _INDEX.size + length + _ARRAY.size
        sizes, counts = msgpack.unpackb(view[_INDEX.size : _INDEX.size + length])
    except _MALFORMED as error:
        raise CodecError(f"malformed frame: {error}") from None
    if type(sizes) is not list or type(counts) is not list or not _are_sizes(sizes):
        raise CodecError("a frame begins with the sizes of its envelopes, and their numbers of buffers")
    if begin + sum(sizes) != len(view):
        raise CodecError(f"the envelopes of a frame have {sum(sizes)} bytes, of {len(view) - begin}")
    return sizes, counts, begin


def _are_sizes(numbers: list[Any]) -> bool:
    return set(map(type, numbers)) <= _INT and min(numbers, default=0) >= 0
