"""TOML files for people: every value knows its line, and every mistake gets one message.

    file, --set arguments -> Document -> (cluster.py: typed values)        nested dict -> dump -> text

A message names file and line (or the --set argument), key, rule, value and remedy:

    cluster.toml:17: [rl] group_sise: unknown key; did you mean "group_size"?

Knows nothing of what the keys mean.
"""

from __future__ import annotations

import copy
import difflib
import math
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, time
from pathlib import Path
from typing import Any

Keys = tuple[str, ...]
"""Where a value is: ("rl", "group_size")."""

_KEY = r"""(?:[A-Za-z0-9_-]+|"(?:\\.|[^"\\\n])*"|'[^'\n]*')"""
_KEYS = rf"{_KEY}(?:[ \t]*\.[ \t]*{_KEY})*"
_STATEMENT = re.compile(
    rf"(?:\s|\#[^\n]*+)*+(?:\[{{1,2}}[ \t]*(?P<table>{_KEYS})[ \t]*\]{{1,2}}|(?P<key>{_KEYS})[ \t]*=)"
)
_VALUE_PART = re.compile(
    r'''
    """(?:\\.|[^\\])*?"{3,5} | \'\'\'.*?\'{3,5} | "(?:\\.|[^"\\\n])*" | '[^'\n]*'   # strings
    | \#[^\n]* | (?P<open>[\[{]) | (?P<close>[\]}]) | \n | [^\[\]{}"'\#\n]+
    ''',
    re.DOTALL | re.VERBOSE,
)
_ESCAPED = re.compile(r"""[\\"\x00-\x1f\x7f]""")
_POSITION = re.compile(r" \(at line (\d+), column (\d+)\)$")


class ConfigError(ValueError):
    """What the user wrote or asked for can't be. The text is the whole message; commands print it and exit with 2."""


@dataclass(frozen=True)
class Document:
    """The values of a TOML file with the --set arguments applied, and where each was written."""

    name: str
    """The file, as the user called it."""
    table: dict[str, Any]
    lines: dict[Keys, int] = field(default_factory=dict)
    """Line of each key and table header of the file, from 1."""
    overrides: dict[Keys, str] = field(default_factory=dict)
    """The --set argument that gave the value at these keys."""

    def error(self, keys: Keys, text: str) -> ConfigError:
        """The error for the value at `keys`, to be raised by the caller."""
        prefixes = [keys[:n] for n in range(len(keys), 0, -1)]
        argument = next((self.overrides[p] for p in prefixes if p in self.overrides), None)
        line = next((self.lines[p] for p in prefixes if p in self.lines), None)
        if argument is not None:
            where = f"--set {argument}"
        else:
            where = self.name if line is None else f"{self.name}:{line}"
        return ConfigError(f"{where}: {self._label(keys)}: {text}")

    def _label(self, keys: Keys) -> str:
        """("rl", "steps") -> '[rl] steps'; what is a value, or is missing, stands outside the brackets."""
        value: Any = self.table
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        table, rest = (keys, ()) if isinstance(value, dict) else (keys[:-1], keys[-1:])
        return " ".join(part for part in (f"[{'.'.join(table)}]" if table else "", *rest) if part)


def read(path: str | Path, overrides: Sequence[str] = ()) -> Document:
    """Reads a TOML file and applies `overrides` ("a.b=value"). Raises ConfigError for whatever is wrong with either."""
    text = _read_text(Path(path))
    document = parse(text, name=str(path))
    for argument in overrides:
        _override(document, argument)
    return document


def from_table(table: Mapping[str, Any], overrides: Sequence[str] = (), *, name: str = "Config") -> Document:
    """As `read`, of nested dicts, which stay as they are."""
    document = Document(name=name, table=copy.deepcopy(dict(table)))
    for argument in overrides:
        _override(document, argument)
    return document


def parse(text: str, name: str) -> Document:
    """Parses TOML text; `name` stands for the file in messages. Raises ConfigError with the line."""
    try:
        table = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        message = str(error) if isinstance(error, ValueError) else "nested too deeply"
        position = _POSITION.search(message)
        where = f"{name}:{position[1]}" if position else name
        at = f" (column {position[2]})" if position else ""
        raise ConfigError(f"{where}: not valid TOML: {_POSITION.sub('', message)}{at}") from None
    document = Document(name=name, table=table, lines=key_lines(text))
    for keys, value in _leaves(table, ()):
        if isinstance(value, float) and not math.isfinite(value):
            raise document.error(keys, f"must be a finite number, got {value}")
    return document


def key_lines(text: str) -> dict[Keys, int]:
    """Line (from 1) of each key and table header in valid TOML. Keys inside inline tables are not listed."""
    lines: dict[Keys, int] = {}
    table: Keys = ()
    at = 0
    while match := _STATEMENT.match(text, at):
        kind = "table" if match["table"] else "key"
        keys = split_keys(match[kind])
        assert keys is not None, "the scanner reads text that tomllib has accepted"
        table, keys = (keys, keys) if kind == "table" else (table, table + keys)
        line = text.count("\n", 0, match.start(kind)) + 1
        for n in range(1, len(keys) + 1):
            lines.setdefault(keys[:n], line)
        at = match.end() if kind == "table" else _value_end(text, match.end())
    return lines


def split_keys(text: str) -> Keys | None:
    """'a."b.c"' -> ("a", "b.c"), or None if it is no TOML key."""
    if re.fullmatch(rf"\s*{_KEYS}\s*", text) is None:
        return None
    value: Any = tomllib.loads(f"{text} = 0")
    keys: list[str] = []
    while isinstance(value, dict):
        [(key, value)] = value.items()
        keys.append(key)
    return tuple(keys)


def nearest(word: str, known: Iterable[str], *, otherwise: str = "") -> str:
    """'; did you mean "x"?' for the known word most like `word`, or `otherwise`."""
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f'; did you mean "{matches[0]}"?' if matches else otherwise


def dump(table: Mapping[str, Any]) -> str:
    """TOML text of nested dicts with str, bool, int, float, date and list values; None is left out."""
    return "\n".join(_dump_table(table, ())).lstrip("\n") + "\n"


def dump_value(value: object) -> str:
    """One value as TOML writes it. Raises TypeError for what TOML can't hold."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str):
        return _quote(value)
    if isinstance(value, date | time):
        return value.isoformat()
    if isinstance(value, list | tuple):
        return f"[{', '.join(dump_value(v) for v in value)}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_dump_key(k)} = {dump_value(v)}' for k, v in value.items())}}}"
    raise TypeError(f"TOML can't hold a {type(value).__name__}: {value!r}")


def _read_text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file{_nearest_file(path)}") from None
    except IsADirectoryError:
        inside = path / "cluster.toml"
        hint = f"; did you mean {inside}?" if inside.is_file() else "; name a TOML file"
        raise ConfigError(f"{path}: is a directory{hint}") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: can't be read: {getattr(error, 'strerror', None) or error}") from None
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{path}:{line}: not UTF-8 (byte 0x{data[error.start]:02x}); TOML files are, so save it as UTF-8"
        ) from None


def _nearest_file(path: Path) -> str:
    folder = path.parent if path.parent.is_dir() else Path()
    found = {p.name: p for p in sorted(folder.glob("*.toml"))}
    if match := difflib.get_close_matches(path.name, found, n=1, cutoff=0.5):
        return f"; did you mean {found[match[0]]}?"
    return f"; there is {', '.join(str(p) for p in found.values())}" if found else ""


def _override(document: Document, argument: str) -> None:
    if not argument.isprintable():
        raise ConfigError(f"--set {argument!a}: has characters that can't be printed; write plain UTF-8 text")
    left, equals, right = argument.partition("=")
    keys = split_keys(left)
    if not equals or keys is None:
        raise ConfigError(f"--set {argument}: must be KEY.KEY=VALUE, for example --set rl.steps=20")
    table = document.table
    for depth, key in enumerate(keys[:-1], 1):
        table = table.setdefault(key, {})
        if not isinstance(table, dict):
            raise ConfigError(f"--set {argument}: {'.'.join(keys[:depth])} is a value, not a table")
    table[keys[-1]] = _override_value(right.strip())
    document.overrides[keys] = argument
    for inner, value in _leaves(table[keys[-1]], keys):
        if isinstance(value, float) and not math.isfinite(value):
            raise document.error(inner, f"must be a finite number, got {value}")


def _override_value(text: str) -> Any:
    """A TOML value, or the text itself where it is none: --set run.name=second needs no quotes."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    return parsed["value"] if set(parsed) == {"value"} else text


def _value_end(text: str, at: int) -> int:
    depth = 0
    while match := _VALUE_PART.match(text, at):
        at = match.end()
        depth += bool(match["open"]) - bool(match["close"])
        if depth == 0 and match[0] == "\n":
            break
    return at


def _leaves(value: Any, keys: Keys) -> Iterable[tuple[Keys, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, (*keys, key))
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner, keys)
    else:
        yield keys, value


def _dump_table(table: Mapping[str, Any], keys: Keys) -> list[str]:
    tables = {k: v for k, v in table.items() if isinstance(v, dict) and v}
    values = {k: v for k, v in table.items() if v is not None and k not in tables}
    lines = [f"\n[{'.'.join(map(_dump_key, keys))}]"] if keys and (values or not tables) else []
    lines += [f"{_dump_key(key)} = {dump_value(value)}" for key, value in values.items()]
    for key, inner in tables.items():
        lines += _dump_table(inner, (*keys, key))
    return lines


def _dump_key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _quote(key)


def _quote(text: str) -> str:
    def escape(match: re.Match[str]) -> str:
        return {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\t": "\\t"}.get(match[0], f"\\u{ord(match[0]):04x}")

    return '"' + _ESCAPED.sub(escape, text) + '"'
