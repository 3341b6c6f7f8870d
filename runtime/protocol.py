"""What nodes say to each other: the kinds of envelope, their fields, and how errors cross the wire.

    CALL CAST STREAM       kind, lane, seconds left, id, head, arguments, keyword arguments
    REPLY ERROR ITEM END   kind, id, number, value                  number: of items of the stream that come before
    CANCEL                 kind, target, id                         caller to callee: stop working on it
    CANCELLED              kind, id, what became of it              callee to caller, once it does not run
    CREDIT                 kind, target, lane, messages, bytes      receiver to sender: taken from the actor's mailbox
    MORE                   kind, target, id, items, bytes           caller to callee: stream items consumed

An envelope is one such list, packed by codec.py. A head says where a request goes (target, method, lane, incarnation),
packed by itself: both ends look it up as a whole, and need not take it to pieces with every message. Knows nothing of
sockets; see frame.py for how envelopes travel.
"""

from __future__ import annotations

import struct
import traceback
from typing import Any, Final

from . import errors
from .codec import decode, encode
from .errors import CodecError, RemoteError, RuntimeFault

STREAM_WINDOW = 64
"""Items of one stream under way before the caller must consume some."""

STREAM_WINDOW_BYTES = 64 << 20

CALL_WINDOW = 2048
"""Messages of one node under way to one lane of an actor before the actor must take some."""

CALL_WINDOW_BYTES = 64 << 20

BULK_BYTES = 1 << 20
"""Envelopes whose buffers hold more than this travel apart from the small ones, and may be overtaken by them."""

MAX_ERROR_CHARS = 20_000
"""Of a message or a traceback that travels."""


class Kind:
    """First field of an envelope. Plain integers, since they are packed with every message."""

    CALL: Final = 1
    CAST: Final = 2
    STREAM: Final = 3
    REPLY: Final = 4
    ERROR: Final = 5
    ITEM: Final = 6
    END: Final = 7
    CANCEL: Final = 8
    CREDIT: Final = 9
    MORE: Final = 10
    CANCELLED: Final = 11


KIND_NAMES: dict[int, str] = {code: name.lower() for name, code in vars(Kind).items() if name.isupper()}

_REQUEST = [int, int, float, int, bytes, list, dict]
_CONTROL: dict[int, list[type]] = {
    Kind.CANCEL: [int, str, int],
    Kind.CANCELLED: [int, int, str],
    Kind.CREDIT: [int, str, int, int, int],
    Kind.MORE: [int, str, int, int, int],
}
_LAST_LANE = 3

_LEFT = slice(4, 12)
"""Where the seconds left of a packed request are: after the head of a list, kind, lane, and the head of a float."""

_FAULTS = {name: cls for name, cls in vars(errors).items() if isinstance(cls, type) and issubclass(cls, RuntimeFault)}


def check(fields: Any) -> int:
    """The kind of an unpacked envelope. Raises CodecError unless it has the fields of that kind."""
    if type(fields) is not list or not fields or type(fields[0]) is not int:
        raise CodecError("an envelope is a list that begins with its kind")
    kind: int = fields[0]
    if kind <= Kind.STREAM:
        good = [*map(type, fields)] == _REQUEST and kind > 0 and 0 <= fields[1] <= _LAST_LANE
    elif kind <= Kind.END:
        good = len(fields) == 4 and type(fields[1]) is type(fields[2]) is int
        good = good and (kind != Kind.ERROR or _is_packed_error(fields[3]))
    else:
        good = [*map(type, fields)] == _CONTROL.get(kind)
        good = good and (kind not in (Kind.CREDIT, Kind.MORE) or (fields[3] > 0 and fields[4] >= 0))
    if not good:
        raise CodecError(f"{KIND_NAMES.get(kind, 'an envelope of unknown kind')}: its fields are not those of its kind")
    return kind


def pack_head(target: str, method: str, lane: int, incarnation: int) -> bytes:
    """Where a request goes."""
    return encode([target, method, lane, incarnation])[0]


def unpack_head(head: bytes) -> tuple[str, str, int, int]:
    """Raises CodecError."""
    fields = decode(head)
    if type(fields) is not list or tuple(map(type, fields)) != (str, str, int, int) or not 0 <= fields[2] <= _LAST_LANE:
        raise CodecError("the head of a request names a target, a method, a lane and an incarnation")
    target, method, lane, incarnation = fields
    return target, method, lane, incarnation


def restamp(envelope: bytes, seconds_left: float) -> bytes:
    """The same packed request with another time left: it has waited for room."""
    return envelope[: _LEFT.start] + struct.pack(">d", seconds_left) + envelope[_LEFT.stop :]


def window_of(mailbox_capacity: int, mailbox_bytes: int) -> tuple[int, int]:
    """Messages and bytes of one node that may be under way to one lane of an actor with such a mailbox."""
    return min(CALL_WINDOW, mailbox_capacity), min(CALL_WINDOW_BYTES, mailbox_bytes)


def pack_error(error: BaseException) -> list[str]:
    """[type name, message, traceback], formatted where it was raised."""
    if isinstance(error, RemoteError):
        return ["RemoteError", *map(_clean, (error.args[0], error.remote_traceback, error.remote_type))]
    kind = type(error)
    name = kind.__name__ if _FAULTS.get(kind.__name__) is kind else f"{kind.__module__}.{kind.__qualname__}"
    trace = "".join(traceback.format_exception(error))
    return [name.removeprefix("builtins."), _clean(error), _clean(trace), ""]


def _is_packed_error(value: Any) -> bool:
    return type(value) is list and len(value) == 4 and all(type(text) is str for text in value)


def _clean(text: object) -> str:
    """Any text as one that can be sent and read: the report of a failure must not fail."""
    try:
        clean = str(text)
    except Exception:  # noqa: BLE001 (an error whose __str__ raises)
        clean = f"<{type(text).__name__} that can't be printed>"
    if len(clean) > MAX_ERROR_CHARS:
        clean = f"{clean[: MAX_ERROR_CHARS // 2]}\n[...]\n{clean[-MAX_ERROR_CHARS // 2 :]}"
    return clean.encode("utf-8", "replace").decode()


def unpack_error(where: str, packed: list[str]) -> RuntimeFault:
    """The runtime's own errors come back as themselves, all others as RemoteError."""
    name, text, trace, remote_type = packed
    fault = _FAULTS.get(name)
    if fault is not None and fault is not RemoteError:
        known = fault(text)
        if trace.startswith("Traceback"):
            known.add_note(f"Traceback in the actor:\n{trace}")
        return known
    kind = remote_type or name
    return RemoteError(text if name == "RemoteError" else f"{where} raised {name}: {text}", kind, trace)
