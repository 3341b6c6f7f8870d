"""What may travel between actors, and how it becomes bytes.

A value is packed as msgpack; arrays of OUT_OF_BAND_BYTES and more are left out of the pack and travel as raw
buffers beside it, never copied into it:

    value -> (pack, [buffer, ...]) -> value

Between two processes of one host the largest arrays may go by shared memory instead: `lend` takes their bytes and gives
a handle that travels as a buffer in their place, `borrow` finds the bytes of a handle again (lending.py).

Allowed: None, bool, int, float, str, bytes, list, tuple, dict, numpy arrays and scalars, and dataclasses marked
`@wire`. Nothing else, and no pickle: bytes of a hostile peer can build plain values and marked dataclasses only.
This module knows nothing of sockets, and imports nothing that a message names.
"""

from __future__ import annotations

import dataclasses
import math
import threading
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from typing import Any, TypeVar

import msgpack
import numpy as np

from .errors import CodecError

Buffer = bytes | bytearray | memoryview
Lend = Callable[[memoryview], bytes | None]
"""Takes the bytes of an array; None: they shall travel as a buffer."""
Borrow = Callable[[Buffer], memoryview]
"""The bytes behind a handle. Raises CodecError."""

OUT_OF_BAND_BYTES = 512
"""Arrays at least this large travel as their own buffer."""

LEND_BYTES = 128 * 1024
"""Arrays at least this large are offered to `lend`. From 64 KiB on it is faster; below 128 KiB by less than 5 %."""

_WEIGHED = 32
"""Items of a list that `weigh` looks at."""

MAX_DEPTH = 64
"""Nesting of tuples and dataclasses that is still read."""

_PACK_BYTES = 1024
"""First size of a packing buffer; msgpack's own, 256 KiB, costs more than the packing."""

_ARRAY, _DATACLASS, _TUPLE, _SCALAR, _LENT = 1, 2, 3, 4, 5
_DTYPES = frozenset("|b1 |u1 |i1 <u2 <i2 <u4 <i4 <u8 <i8 <f2 <f4 <f8".split())
_MALFORMED = (ValueError, TypeError, OverflowError, RecursionError, msgpack.exceptions.UnpackException)

_unpackb = msgpack.unpackb

T = TypeVar("T")
_by_name: dict[str, type] = {}
_schema: dict[type, tuple[str, int, tuple[str, ...]]] = {}


def wire(cls: type[T]) -> type[T]:
    """Lets a dataclass travel in messages. The name on the wire is `module:Class`; both ends must have imported it.

    Apply it above `@dataclass`. Raises TypeError if `cls` is no dataclass.
    """
    if not dataclasses.is_dataclass(cls):
        raise TypeError(f"@wire needs a dataclass: put it above @dataclass on {cls.__qualname__}")
    name = f"{cls.__module__}:{cls.__qualname__}"
    fields = tuple(f.name for f in dataclasses.fields(cls) if f.init)
    _by_name[name] = cls
    _schema[cls] = (name, zlib.crc32(",".join(fields).encode()), fields)
    return cls


def encode(value: object, lend: Lend | None = None) -> tuple[bytes, list[Buffer]]:
    """Packs `value`; returns the pack and the buffers that travel beside it, in order.

    Raises CodecError naming the path of what can't travel. Arrays must not be changed until they are sent.
    """
    try:
        return _plain.pack(value), []
    except _MALFORMED:
        encoder = _Encoder(lend)
        return encoder.attempt(value, ""), encoder.buffers


def decode(data: Buffer, buffers: Sequence[Buffer] = (), borrow: Borrow | None = None) -> Any:
    """Builds the value of `encode`. Arrays share memory with `buffers`, or what was lent, and are read-only.

    Raises CodecError for anything that `encode` did not write: truncated, unknown types, bad shapes.
    """
    hook = _BARE if not buffers and borrow is None else partial(_extension, 1, buffers, borrow)
    try:
        return _unpackb(data, ext_hook=hook, strict_map_key=False)
    except CodecError:
        raise
    except _MALFORMED as error:
        raise CodecError(f"malformed message: {error}") from None


def skim(data: Buffer) -> Any:
    """The plain values of what `decode` refuses, None in place of all others: who sent what, though not the message.

    Raises CodecError.
    """
    try:
        return _unpackb(data, ext_hook=lambda code, payload: None, strict_map_key=False)
    except _MALFORMED as error:
        raise CodecError(f"malformed message: {error}") from None


def weigh(*values: object) -> int:
    """About how many bytes values hold, without packing them: their arrays and texts, to some depth; of a long list its
    first items tell."""
    return sum(_weigh(value, 4) for value in values)


def _weigh(value: object, depth: int) -> int:
    kind = type(value)
    if kind is bytes or kind is str:
        return len(value)  # type: ignore[arg-type]
    if isinstance(value, np.ndarray):
        return value.nbytes
    if depth and (kind is list or kind is tuple or kind is dict):
        items = value.values() if isinstance(value, dict) else value
        weight, length = 0, len(items)  # type: ignore[arg-type]
        for item in islice(items, _WEIGHED):  # type: ignore[call-overload]
            weight += _weigh(item, depth - 1)
        return weight if length <= _WEIGHED else weight * length // _WEIGHED
    schema = _schema.get(kind) if depth else None
    return 0 if schema is None else sum(_weigh(getattr(value, field), depth - 1) for field in schema[2])


def dumps(value: object) -> bytes:
    """Packs `value` and its buffers as one block, for files. Raises CodecError."""
    pack, buffers = encode(value)
    return bytes(msgpack.packb([pack, *map(bytes, buffers)], buf_size=_PACK_BYTES))


def loads(data: bytes) -> Any:
    """The value of `dumps`. Raises CodecError."""
    try:
        pack, *buffers = msgpack.unpackb(data)
    except _MALFORMED as error:
        raise CodecError(f"malformed block: {error}") from None
    return decode(pack, buffers)


class _Plain(threading.local):
    """A packer for plain values. It runs no Python code while it packs, so one per thread can be used again and again:
    a new one for every message would cost more than the packing."""

    def __init__(self) -> None:
        self.pack: Callable[[object], bytes] = msgpack.Packer(strict_types=True).pack


_plain = _Plain()


class _Encoder:
    """Packs one value that is not plain."""

    def __init__(self, lend: Lend | None) -> None:
        self.buffers: list[Buffer] = []
        self._lend = lend

    def attempt(self, item: object, path: str) -> bytes:
        """The packed item. Raises CodecError that begins with `path`."""
        try:
            return self._pack(item)
        except CodecError as error:
            raise CodecError(f"{path}{error}") from None
        except RecursionError:
            raise CodecError(f"{path}{type(item).__name__} is nested too deep, or holds itself") from None
        except (OverflowError, ValueError, TypeError) as error:
            raise CodecError(f"{path}{type(item).__name__} can't travel in a message: {error}") from None

    def _pack(self, item: object) -> bytes:
        packed: bytes = msgpack.packb(item, default=self._extend, strict_types=True, buf_size=_PACK_BYTES)
        return packed

    def _extend(self, item: object) -> Any:
        schema = _schema.get(type(item))
        if schema is not None:
            return msgpack.ExtType(_DATACLASS, self._pack_dataclass(item, schema))
        if isinstance(item, np.ndarray):
            return _pack_array(item, self.buffers, self._lend)
        if isinstance(item, tuple):
            return msgpack.ExtType(_TUPLE, self._pack(list(item)))
        if isinstance(item, np.generic) and item.dtype.str in _DTYPES:
            return msgpack.ExtType(_SCALAR, item.dtype.str.encode() + item.tobytes())
        if type(item) is int:
            raise CodecError(f"{item} can't travel in a message; integers have at most 64 bits")
        raise CodecError(
            f"{type(item).__module__}.{type(item).__qualname__} can't travel in a message; "
            "send numpy arrays, plain values or a dataclass marked @wire"
        )

    def _pack_dataclass(self, item: object, schema: tuple[str, int, tuple[str, ...]]) -> bytes:
        name, crc, fields = schema
        try:
            return self._pack([name, crc, *[getattr(item, field) for field in fields]])
        except (CodecError, OverflowError, ValueError, TypeError):
            for field in fields:
                self.attempt(getattr(item, field), f"{type(item).__name__}.{field}: ")
            raise


def _extension(depth: int, buffers: Sequence[Buffer], borrow: Borrow | None, code: int, payload: bytes) -> Any:
    """What stands for an extension; `depth` counts those around it."""
    if depth > MAX_DEPTH:
        raise CodecError(f"message nested deeper than {MAX_DEPTH}")
    if code == _ARRAY:
        return _unpack_array(payload, buffers)
    if code == _SCALAR:
        return _unpack_scalar(payload)
    if code == _LENT and borrow is not None:
        return _unpack_array(payload, buffers, borrow)
    if code in (_TUPLE, _DATACLASS):
        hook = partial(_extension, depth + 1, buffers, borrow)
        inner = _unpackb(payload, ext_hook=hook, strict_map_key=False)
        return tuple(inner) if code == _TUPLE else _build(*inner)
    raise CodecError(f"unknown extension type {code}")


_BARE = partial(_extension, 1, (), None)
"""For a message without buffers."""


def _pack_array(array: np.ndarray, buffers: list[Buffer], lend: Lend | None) -> msgpack.ExtType:
    dtype = array.dtype.str
    if dtype not in _DTYPES:
        raise CodecError(f"arrays of dtype {array.dtype} can't travel; allowed: {', '.join(sorted(_DTYPES))}")
    array = np.ascontiguousarray(array) if not array.flags.c_contiguous else array
    code: int = _ARRAY
    data: bytes | int
    if array.nbytes < OUT_OF_BAND_BYTES:
        data = array.tobytes()
    else:
        data, view = len(buffers), array.data.cast("B")
        handle = lend(view) if lend is not None and array.nbytes >= LEND_BYTES else None
        code = _ARRAY if handle is None else _LENT
        buffers.append(handle or view)
    return msgpack.ExtType(code, msgpack.packb([dtype, list(array.shape), data], buf_size=_PACK_BYTES))


def _unpack_array(payload: bytes, buffers: Sequence[Buffer], borrow: Borrow | None = None) -> np.ndarray:
    dtype, shape, data = msgpack.unpackb(payload)
    if type(data) is int:
        if not 0 <= data < len(buffers):
            raise CodecError(f"buffer {data} of {len(buffers)} is missing")
        data = buffers[data]
    if borrow is not None:
        data = borrow(data)
    if dtype not in _DTYPES:
        raise CodecError(f"array dtype {dtype!r} is not allowed")
    if any(type(n) is not int or n < 0 for n in shape):
        raise CodecError(f"array shape {shape!r} is not allowed")
    itemsize = np.dtype(dtype).itemsize
    if memoryview(data).nbytes != itemsize * math.prod(shape):
        raise CodecError(f"array of {dtype} {shape} has {memoryview(data).nbytes} bytes")
    array = np.frombuffer(data, dtype=dtype).reshape(shape)
    array.flags.writeable = False
    return array


def _unpack_scalar(payload: bytes) -> Any:
    dtype = payload[:3].decode("ascii")
    if dtype not in _DTYPES or len(payload) != 3 + np.dtype(dtype).itemsize:
        raise CodecError(f"scalar of dtype {dtype!r} is not allowed")
    return np.frombuffer(payload, dtype=dtype, offset=3)[0]


def _build(name: str, crc: int, *values: Any) -> Any:
    cls = _by_name.get(name)
    if cls is None:
        raise CodecError(f"unknown type {name!r}: it is not marked @wire, or this process has not imported it")
    _, own_crc, fields = _schema[cls]
    if crc != own_crc or len(values) != len(fields):
        raise CodecError(f"{name} has other fields at the sender: both ends must run the same version")
    try:
        return cls(**dict(zip(fields, values, strict=True)))
    except Exception as error:
        raise CodecError(f"{name} refuses its fields: {type(error).__name__}: {error}") from error
