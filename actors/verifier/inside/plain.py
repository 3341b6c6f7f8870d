"""Calls between two processes that don't trust each other: values travel as data and are rebuilt as plain builtins.

    candidate <--- pipes, frames of JSON ---> examiner

A frame is a line: ["call", object, arguments, named] | ["get", object, name] | ["set", object, name, value]
| ["return", value, arguments as they are now] | ["raise", type, text] | ["loaded"] | ["failed", type, text].
None, bool, str, int, float, complex, bytes, list, tuple, set, dict and some more are rebuilt with their exact builtin
types, so nothing that one side has overridden (==, hash, iteration) comes to the other. What is none of them stays
where it is and is known by a number; it equals only itself. A call may call back.
"""

import builtins
import collections
import decimal
import fractions
import itertools
import json
import os
from typing import Any

MAX_FRAME, MAX_ALL = 16 << 20, 64 << 20
MAX_ITEMS = 100_000
"""Of an iterator: a generator travels as the items that it gives."""


MAX_RANGE, MAX_EXPONENT = 10_000_000, 10_000


class Gone(Exception):
    """The other side has ended."""


class TooMuch(Exception):
    """The other side sends more than is sensible, or what is no frame."""


class Remote:
    """An object of the other side."""

    def __init__(self, peer: "Peer", number: int) -> None:
        object.__setattr__(self, "_of", (peer, number))

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        peer, number = self._of
        return peer.call(number, arguments, named)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        peer, number = self._of
        return peer.ask(["get", number, name])

    def __setattr__(self, name: str, value: Any) -> None:
        peer, number = self._of
        peer.ask(["set", number, name, peer.encode(value)])

    def __eq__(self, other: object) -> bool:
        return type(other) is Remote and bool(other._of == self._of)

    def __hash__(self) -> int:
        return hash(self._of[1])


class Peer:
    """One end. `open_to` are the requests that it serves: the examiner, only calls of what it has handed out."""

    def __init__(self, reader: int, writer: int, open_to: tuple[str, ...]) -> None:
        self._reader, self._writer, self._open_to = os.fdopen(reader, "rb"), writer, open_to
        self._mine: list[Any] = []
        self._numbers: dict[int, int] = {}
        self._received = 0
        self.calls = 0

    def offer_all(self, values: list[Any]) -> None:
        """Lets the other side name them by the numbers 0, 1, 2 ..."""
        self._mine.extend(values)

    def offer(self, value: Any) -> int:
        """The number by which the other side may name it."""
        if id(value) not in self._numbers:
            self._numbers[id(value)] = len(self._mine)
            self._mine.append(value)
        return self._numbers[id(value)]

    def call(self, number: int, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """What the other side's object returns. Lists, dicts and sets among its arguments become as they are there."""
        self.calls += 1
        by_name = [[name, self.encode(value)] for name, value in named.items()]
        self.send(["call", number, [self.encode(value) for value in arguments], by_name])
        answer = self._answer()
        for ours, now in zip(arguments, answer[2], strict=False):
            _refill(ours, self.decode(now))
        return self.decode(answer[1])

    def ask(self, request: list[Any]) -> Any:
        """What the other side answers."""
        self.send(request)
        return self.decode(self._answer()[1])

    def serve(self) -> None:
        """Answers requests until the other side ends."""
        while True:
            self._handle(self.receive())

    def _answer(self) -> list[Any]:
        while True:
            frame = self.receive()
            if frame[0] == "return":
                return frame
            if frame[0] == "raise":
                raise _exception(str(frame[1]), str(frame[2]))
            self._handle(frame)

    def _handle(self, frame: list[Any]) -> None:
        kind = frame[0]
        if kind not in self._open_to:
            raise TooMuch(f"a {kind} frame")
        changed = []
        try:
            target = self._mine[int(frame[1])]
            if kind == "call":
                arguments = [self.decode(a) for a in frame[2]]
                value = target(*arguments, **{str(k): self.decode(v) for k, v in frame[3]})
                changed = [self.encode(a) if type(a) in (list, dict, set) else None for a in arguments]
            elif kind == "get":
                value = getattr(target, frame[2])
            else:
                value = setattr(target, str(frame[2]), self.decode(frame[3]))  # type: ignore[func-returns-value]
            answer = ["return", self.encode(value), changed]
        except (Gone, TooMuch):
            raise
        except BaseException as error:  # noqa: BLE001  # Whatever it raises, the other side is told.
            answer = ["raise", type(error).__name__, text_of(error)]
        self.send(answer)

    def send(self, frame: list[Any]) -> None:
        data = json.dumps(frame).encode() + b"\n"
        view = memoryview(data)
        try:
            while view:
                view = view[os.write(self._writer, view) :]
        except BrokenPipeError:
            raise Gone from None

    def receive(self) -> list[Any]:
        line = self._reader.readline(MAX_FRAME)
        self._received += len(line)
        if not line:
            raise Gone
        if not line.endswith(b"\n") or self._received > MAX_ALL:
            raise TooMuch(f"{self._received} bytes")
        try:
            frame = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise TooMuch(f"no frame: {error}"[:200]) from None
        if not isinstance(frame, list) or not frame:
            raise TooMuch("no frame")
        return frame

    def encode(self, value: Any) -> Any:
        """`value` as what JSON can hold."""
        if value is None or isinstance(value, bool):
            return value
        if type(value) is Remote:
            return ["yours", value._of[1]]
        for kind, types, write in _WRITERS:
            if isinstance(value, types):
                return [kind, write(value)]
        for kind, types in _SEQUENCES:
            if isinstance(value, types):
                items = itertools.islice(value, MAX_ITEMS) if kind == "iterator" else value
                return [kind, [self.encode(item) for item in items]]
        if isinstance(value, dict):
            return ["dict", [[self.encode(k), self.encode(v)] for k, v in value.items()]]
        if isinstance(value, type) and _TYPES.get(value.__name__) is value:
            return ["type", value.__name__]
        return ["mine", self.offer(value)]

    def decode(self, data: Any) -> Any:
        """The value that `encode` made `data` of. Raises TooMuch if it can't have."""
        try:
            return self._decode(data)
        except (ValueError, TypeError, IndexError, KeyError, ArithmeticError, RecursionError) as error:
            raise TooMuch(f"no value: {error}"[:200]) from None

    def _decode(self, data: Any) -> Any:
        if data is None or isinstance(data, bool):
            return data
        kind, content = data
        if kind == "mine":
            return Remote(self, int(content))
        if kind == "yours":
            return self._mine[int(content)]
        if kind == "dict":
            return {self._decode(k): self._decode(v) for k, v in content}
        if kind in _READERS:
            return _READERS[kind](content)
        return _BUILDERS[kind]([self._decode(item) for item in content])


_WRITERS: Any = (
    ("str", str, str),
    ("int", int, hex),
    ("float", float, float.hex),
    ("complex", complex, lambda z: [z.real.hex(), z.imag.hex()]),
    ("bytes", bytes, bytes.hex),
    ("bytearray", bytearray, bytearray.hex),
    ("range", range, lambda r: [hex(r.start), hex(r.stop), hex(r.step)]),
    ("decimal", decimal.Decimal, str),
    ("fraction", fractions.Fraction, lambda q: [hex(q.numerator), hex(q.denominator)]),
)


def _modest_range(start: int, stop: int, step: int) -> range:
    """Not one that is small to send and endless to list."""
    if abs(stop - start) // abs(step) > MAX_RANGE:
        raise ValueError("a range too long")
    return range(start, stop, step)


def _modest_decimal(value: decimal.Decimal) -> decimal.Decimal:
    if value.is_finite() and abs(value.adjusted()) > MAX_EXPONENT:
        raise ValueError("an exponent too large")
    return value


_TYPES: dict[str, type] = {
    kind.__name__: kind
    for kind in (bool, str, int, float, complex, bytes, bytearray, list, tuple, set, frozenset, dict, range, object)
}
_READERS: dict[str, Any] = {
    "type": lambda name: _TYPES[name],
    "str": lambda text: "" + text,
    "int": lambda text: int(text, 16),
    "float": float.fromhex,
    "complex": lambda parts: complex(*map(float.fromhex, parts)),
    "bytes": bytes.fromhex,
    "bytearray": bytearray.fromhex,
    "range": lambda parts: _modest_range(*(int(part, 16) for part in parts)),
    "decimal": lambda text: _modest_decimal(decimal.Decimal(text)),
    "fraction": lambda parts: fractions.Fraction(*(int(part, 16) for part in parts)),
}
_SEQUENCES: Any = (
    ("list", list), ("tuple", tuple), ("frozenset", frozenset), ("set", set), ("deque", collections.deque),
    ("iterator", collections.abc.Iterator),
)  # fmt: skip
_BUILDERS: dict[str, Any] = {
    "list": list, "tuple": tuple, "frozenset": frozenset, "set": set, "deque": collections.deque, "iterator": iter,
}  # fmt: skip


def _refill(ours: Any, now: Any) -> None:
    if type(ours) is not type(now):
        return
    if type(ours) is list:
        ours[:] = now
    elif type(ours) in (dict, set):
        ours.clear()
        ours.update(now)


def _exception(name: str, text: str) -> Exception:
    """Of the builtin type, so that tests may expect it; never one that ends a program."""
    found = getattr(builtins, name, Exception)
    if not (isinstance(found, type) and issubclass(found, Exception)):
        found = Exception
    try:
        made = found(text)
    except TypeError:
        made = Exception(text)
    vars(made)["remote"] = f"{name}: {text}"[:300]
    return made


def text_of(error: BaseException) -> str:
    try:
        return str(error)[:1000]
    except BaseException:  # noqa: BLE001  # Its own __str__ may do anything.
        return ""
