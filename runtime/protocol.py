"""The kinds of envelope, and how errors cross the wire. See transport.py for the frame they travel in."""

from __future__ import annotations

import traceback
from enum import IntEnum

from . import errors
from .errors import RemoteError, RuntimeFault

STREAM_WINDOW = 64
"""Items of one stream under way before the caller must consume some."""

CALL_WINDOW = 256
"""Messages of one node under way to one actor before the actor must take some."""

MAX_ERROR_CHARS = 20_000
"""Of a message or a traceback that travels."""


class Kind(IntEnum):
    """First field of an envelope."""

    CALL = 1
    CAST = 2
    STREAM = 3
    REPLY = 4
    ERROR = 5
    ITEM = 6
    END = 7
    CANCEL = 8
    """Caller to callee: stop working on it."""
    CREDIT = 9
    """Receiver to sender: messages taken from an actor's mailbox."""
    MORE = 10
    """Caller to callee: stream items consumed."""


REQUESTS = frozenset({Kind.CALL, Kind.CAST, Kind.STREAM})

_FAULTS = {name: cls for name, cls in vars(errors).items() if isinstance(cls, type) and issubclass(cls, RuntimeFault)}


def window_of(mailbox_capacity: int) -> int:
    """Messages of one node that may be under way to an actor with such a mailbox."""
    return min(CALL_WINDOW, mailbox_capacity)


def pack_error(error: BaseException) -> list[str]:
    """[type name, message, traceback], formatted where it was raised."""
    if isinstance(error, RemoteError):
        return ["RemoteError", *map(_clean, (error.args[0], error.remote_traceback, error.remote_type))]
    kind = type(error)
    name = kind.__name__ if _FAULTS.get(kind.__name__) is kind else f"{kind.__module__}.{kind.__qualname__}"
    trace = "".join(traceback.format_exception(error))
    return [name.removeprefix("builtins."), _clean(error), _clean(trace), ""]


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
