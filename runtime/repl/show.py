"""How a value is shown: like `repr`, but of bounded length, and cut before it is made where that is possible."""

from __future__ import annotations

import dataclasses
import reprlib
from collections.abc import Callable
from typing import Any

MAX_CHARS = 10_000


def show(value: Any, limit: int = MAX_CHARS) -> str:
    """At most about `limit` characters; says what was cut. A repr that raises is said, too."""
    text = _SHORT.repr(value)
    if len(text) <= limit:
        return text
    return f"{text[:limit]}... ({len(text) - limit} more characters)"


class _Short(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 8
        self.maxlist = self.maxtuple = self.maxset = self.maxfrozenset = self.maxdeque = self.maxarray = 200
        self.maxdict = 200
        self.maxstring = 5000
        self.maxlong = 200
        self.maxother = MAX_CHARS

    def repr1(self, x: Any, level: int) -> str:
        if dataclasses.is_dataclass(x) and not isinstance(x, type) and hasattr(type(x).__repr__, "__wrapped__"):
            return self._fields(x, level)  # Its repr was made by @dataclass.
        plain: tuple[tuple[type, Callable[[Any, int], str]], ...] = (
            (dict, self.repr_dict), (list, self.repr_list), (str, self.repr_str),
        )  # fmt: skip
        for kind, method in plain:
            own: Any = type(x).__repr__
            if isinstance(x, kind) and own is kind.__repr__:
                return method(x, level)
        if isinstance(x, bytes | bytearray) and len(x) > self.maxstring:
            return f"{bytes(x[:100])!r}... ({len(x)} bytes)"
        return super().repr1(x, level)

    def repr_str(self, x: str, level: int) -> str:
        if len(x) <= self.maxstring:
            return repr(x)
        return f"{x[: self.maxstring]!r}... ({len(x)} characters)"

    def repr_instance(self, x: Any, level: int) -> str:
        try:
            text = repr(x)
        except Exception as error:  # noqa: BLE001 (anybody's __repr__)
            return f"<{type(x).__name__} whose repr raises {type(error).__name__}>"
        return text if len(text) <= self.maxother else f"{text[: self.maxother]}... ({len(text)} characters)"

    def _fields(self, x: Any, level: int) -> str:
        if level <= 0:
            return f"{type(x).__qualname__}(...)"
        shown = (f"{f.name}={self.repr1(getattr(x, f.name), level - 1)}" for f in dataclasses.fields(x) if f.repr)
        return f"{type(x).__qualname__}({', '.join(shown)})"


_SHORT = _Short()
