"""The frames between a console and the root: a JSON header, and bytes beside it.

    frame = length of the header u32, length of the bytes u32, header, bytes

    {"id": 3, "ask": "call", "actor": ..}    a request                       {"cancel": 3}    it is given up
    {"id": 3, "out": "text"}                 what it printed                 {"id": 3, "item": value}
    {"id": 3, "value": value}                its end                         {"id": 3, "error": [type, text, trace, ..]}

A value is JSON where that keeps it as it is, else codec bytes beside the header. Knows nothing of what is asked.
"""

from __future__ import annotations

import json
import struct
from typing import Any

SIZES = struct.Struct(">II")

MAX_HEADER_BYTES = 16 << 20
MAX_BYTES = 256 << 20
"""Of what travels beside a header."""

_LARGE = 1000
"""Plain lists and dicts with more items than that travel as bytes, without being looked through."""

Header = dict[str, Any]


def pack(header: Header, beside: bytes = b"") -> bytes:
    """One frame."""
    text = json.dumps(header, separators=(",", ":")).encode("utf-8", "replace")
    return SIZES.pack(len(text), len(beside)) + text + beside


def sizes(data: bytes) -> tuple[int, int]:
    """Lengths of header and bytes. Raises ValueError if that is no frame."""
    header, beside = SIZES.unpack(data)
    if header > MAX_HEADER_BYTES or beside > MAX_BYTES:
        raise ValueError(f"a frame of {header} + {beside} bytes: at most {MAX_HEADER_BYTES} + {MAX_BYTES} are read")
    return header, beside


def unpack(text: bytes) -> Header:
    """The header. Raises ValueError."""
    header = json.loads(text)
    if not isinstance(header, dict):
        raise ValueError("a header is an object")
    return header


def put(header: Header, key: str, value: Any) -> bytes:
    """One frame with a value under `key`. Raises CodecError if it can't travel, ValueError if it is too large."""
    if _is_json(value, 0):
        return pack({**header, key: value})
    from ..codec import dumps

    beside = dumps(value)
    if len(beside) > MAX_BYTES:
        raise ValueError(f"a value of {len(beside)} bytes is not sent, at most {MAX_BYTES}; ask for a part of it")
    return pack({**header, key: None, "beside": key}, beside)


def get(header: Header, key: str, beside: bytes) -> Any:
    """The value under `key`. Raises CodecError if its class is not known here."""
    if header.get("beside") != key:
        return header[key]
    from ..codec import loads

    return loads(beside)


def _is_json(value: Any, depth: int) -> bool:
    kind = type(value)
    if value is None or kind in (bool, str, int):
        return kind is not int or abs(value) < 2**63
    if kind is float:
        return bool(value - value == 0.0)  # neither NaN nor infinite
    if depth > 8 or kind not in (list, dict) or len(value) > _LARGE:
        return False
    if kind is dict:
        return all(type(key) is str and _is_json(inner, depth + 1) for key, inner in value.items())
    return all(_is_json(inner, depth + 1) for inner in value)
