"""Settings that may be changed while a run goes on, and stay changed: over restarts of actors, and over `--resume`.

    Actor.live names them --> settings(alpha=0.5) --> checked --> settings.json, events.jsonl --> actors that are up
                                                                         '--> every incarnation that comes

A setting is a field of an actor, or of a dataclass in one; its annotation and its __post_init__ say what it may be.
Knows nothing of what the settings mean.
"""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args

import orjson

from ..actor import Actor
from ..children import Member
from ..deadline import timeout
from ..errors import ActorDied, RuntimeFault
from ..events import EventLog
from ..node import Node
from ..nodes import ROOT
from ..rundir import write_atomically
from ..toml import ConfigError, nearest
from .logs import LEVELS, set_level

LOG_LEVEL = "log_level"
TELL_S = 10.0
"""Time that an actor has to take a change; one that does not gets it with its next incarnation."""


class LiveSettings:
    """Of one system. `path`: where they are kept; None for nowhere."""

    def __init__(self, path: Path | None, node: Node, events: EventLog, changed: dict[str, Any] | None = None) -> None:
        self._path = path
        self._node = node
        self._events = events
        self._lock = asyncio.Lock()
        self.changed: dict[str, Any] = changed or {}
        """What differs from the configuration: path -> value."""
        self._level = str(self.changed.get(LOG_LEVEL, "WARNING"))
        events.listeners.append(self._on_event)

    def applied(self, actor: Actor) -> Actor:
        """The actor with what was changed, before it is started. Raises ConfigError if that does not fit any more."""
        try:
            for path in type(actor).live:
                if path in self.changed:
                    value = _checked(actor, path, path, self.changed[path])
                    actor = dataclasses.replace(actor, **_with(actor, path, value))  # type: ignore[type-var]
                    actor.fits()
        except ValueError as error:
            raise ConfigError(f"{self._path}: {error}; correct it, or remove the file and what it changed") from None
        return actor

    def rows(self, members: Iterable[Member]) -> list[dict[str, Any]]:
        """One row per setting: its name, value, rule, the actors that have it, and whether it was changed."""
        found = _paths(members)
        rows = [
            {
                "name": name, "value": _value(having[0].actor, path), "rule": _rule(having[0].actor, path),
                "actors": [member.name for member in having], "changed": path in self.changed,
            }
            for name, (path, having) in found.items()
        ]  # fmt: skip
        level = {
            "name": LOG_LEVEL,
            "value": self._level,
            "rule": f"one of {', '.join(LEVELS)}",
            "actors": ["all nodes"],
        }
        return [*rows, {**level, "changed": LOG_LEVEL in self.changed}]

    async def change(self, members: Iterable[Member], name: str, value: Any) -> dict[str, Any]:
        """Changes a setting; returns its name, old and new value, and `late`: actors without it yet, and why.

        Raises ValueError: no such setting, or no such value; nothing has changed then.
        """
        async with self._lock:
            if name == LOG_LEVEL:
                return await self._change_level(value)
            found = _paths(members)
            if name not in found:
                raise ValueError(f"there is no live setting {name!r}{nearest(name, [*found, LOG_LEVEL])}")
            path, having = found[name]
            value = _checked(having[0].actor, path, name, value)
            old = _value(having[0].actor, path)
            candidates: list[tuple[Member, dict[str, Any], Any]] = []
            for member in having:
                tables = _with(member.actor, path, value)
                candidate: Any = dataclasses.replace(member.actor, **tables)  # type: ignore[type-var]
                candidate.fits()
                candidates.append((member, tables, candidate))
            self._keep(path, value)
            for member, _, candidate in candidates:
                member.actor = candidate
            self._events.write("setting_changed", setting=name, old=old, new=value)
            told = await asyncio.gather(*(self._tell(member, tables) for member, tables, _ in candidates))
            late = {member.name: why for (member, *_), why in zip(candidates, told, strict=True) if why}
            return {"name": name, "old": old, "new": value, "late": late}

    async def _change_level(self, value: Any) -> dict[str, Any]:
        if value not in LEVELS:
            raise ValueError(f"log_level must be one of {', '.join(LEVELS)}, got {value!r}")
        old, self._level = self._level, value
        self._keep(LOG_LEVEL, value)
        self._events.write("setting_changed", setting=LOG_LEVEL, old=old, new=value)
        for status in self._node.directory.all():
            if status.name.startswith("$node@") and status.state == "up":
                self._set_level(status.name)
        return {"name": LOG_LEVEL, "old": old, "new": value, "late": {}}

    def _on_event(self, event: dict[str, Any]) -> None:
        """A node that comes later gets the level, too."""
        if event["event"] == "actor_up" and LOG_LEVEL in self.changed:
            self._set_level(f"$node@{event['node']}")

    def _set_level(self, agent: str) -> None:
        if agent == f"$node@{ROOT}":  # Its standard error may be a screen.
            set_level(self._level, None if self._path is None else self._path.parent / "logs" / "root.log")
            return
        try:
            self._node.cast(agent, "log_level", (self._level,), {})
        except RuntimeFault as error:
            self._events.write("log_level_late", node=agent.removeprefix("$node@"), reason=str(error))

    def _keep(self, path: str, value: Any) -> None:
        changed = {**self.changed, path: value}
        if self._path is not None:
            write_atomically(self._path, orjson.dumps(changed, option=orjson.OPT_INDENT_2))
        self.changed = changed

    async def _tell(self, member: Member, tables: dict[str, Any]) -> str:
        """Why an actor has not taken a change; "" if it has."""
        try:
            async with timeout(TELL_S):
                while True:
                    await self._node.directory.when_up(member.name)
                    try:
                        await self._node.ref(f"$node@{member.node}").configure(member.name, tables)
                        return ""
                    except ActorDied:
                        await asyncio.sleep(0.05)
        except (RuntimeFault, TimeoutError) as error:
            return str(error).partition("\n")[0] or "it is not up"


def read_changed(path: Path) -> dict[str, Any]:
    """What was changed in an earlier process; empty if there is no such file. Raises ConfigError."""
    if not path.exists():
        return {}
    try:
        changed = orjson.loads(path.read_bytes())
    except orjson.JSONDecodeError as error:
        raise ConfigError(
            f"{path}: not valid JSON: {error}; correct it, or remove the file and what it changed"
        ) from None
    if not isinstance(changed, dict) or changed.get(LOG_LEVEL, "INFO") not in LEVELS:
        raise ConfigError(f"{path}: must be an object, with a {LOG_LEVEL} of {', '.join(LEVELS)} if it has one")
    return changed


def _paths(members: Iterable[Member]) -> dict[str, tuple[str, list[Member]]]:
    """Name -> path and the members that have it. A name is the last word of a path, or all of it if others end so."""
    having: dict[str, list[Member]] = {}
    for member in members:
        for path in type(member.actor).live:
            having.setdefault(path, []).append(member)
    last = [path.rpartition(".")[2] for path in having]
    return {
        (path if last.count(word) > 1 else word): (path, found)
        for word, (path, found) in zip(last, having.items(), strict=True)
    }


def _value(actor: Actor, path: str) -> Any:
    value: Any = actor
    for word in path.split("."):
        value = getattr(value, word)
    return value


def _with(actor: Actor, path: str, value: Any) -> dict[str, Any]:
    """The actor's field that holds the setting, with the value in it."""
    name, _, inner = path.partition(".")
    if not inner:
        return {name: value}
    return {name: dataclasses.replace(getattr(actor, name), **{inner: value})}


def _hint(actor: Actor, path: str) -> Any:
    name, _, inner = path.partition(".")
    owner: Any = getattr(actor, name) if inner else actor
    for base in type(owner).__mro__:
        if (inner or name) in vars(base).get("__annotations__", {}):
            return inspect.get_annotations(base, eval_str=True)[inner or name]
    raise AttributeError(f"{type(owner).__name__} has no field {inner or name!r}")


def _rule(actor: Actor, path: str) -> str:
    hint = _hint(actor, path)
    kind, *bounds = get_args(hint) if hasattr(hint, "__metadata__") else [hint]
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    rules = [f"{sign} {getattr(b, key):g}" for b in bounds for key, sign in signs.items() if hasattr(b, key)]
    return " ".join([getattr(kind, "__name__", str(kind)), " and ".join(rules)]).strip()


def _checked(actor: Actor, path: str, name: str, value: Any) -> Any:
    """Raises ValueError."""
    import pydantic_core
    from pydantic import TypeAdapter, ValidationError

    try:
        value = TypeAdapter(_hint(actor, path)).validate_json(pydantic_core.to_json(value), strict=True)
    except ValidationError as error:
        rule = error.errors(include_url=False)[0]["msg"].replace("Input should be", "must be")
        raise ValueError(f"{name} {rule}, got {value!r}") from None
    except pydantic_core.PydanticSerializationError:
        raise ValueError(f"{name} must be {_rule(actor, path)}, got a {type(value).__name__}") from None
    if isinstance(value, float) and value - value != 0.0:
        raise ValueError(f"{name} must be a finite number, got {value}")
    return value
