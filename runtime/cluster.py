"""The schema of cluster.toml: a run, its nodes, its actors, and tables that only the actors understand.

    [run]             name, seed, directory
    [nodes.NAME]      one process of its own: launcher, threads, env, start, hang_s
    [groups.NAME]     actors supervised together: strategy, parent, max_restarts, window_s, ...
    [actors.NAME]     class = "module:Class", node, group, count, ranks, restart, max_restarts, ...;
                      every other key is a field of that class
    [ANYTHING ELSE]   a table that the caller names together with a dataclass

An actor field named like a table, and annotated with that table's dataclass, a base of it or a protocol that it
fulfils, receives the table. All values are checked here; nothing is started, no file is written. Knows nothing of what
the actors or the other tables are for.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import pkgutil
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass, replace
from typing import Annotated, Any, Literal, TypeVar, cast

import pydantic_core
from annotated_types import Ge
from pydantic import TypeAdapter, ValidationError

from .actor import Actor
from .classes import class_path
from .launcher import NodeSpec
from .layout import ONE
from .rundir import RunSpec
from .strategy import ROOT_GROUP, Strategy
from .supervisor import RestartPolicy
from .toml import ConfigError, Document, Keys, dump_value, nearest
from .worker import Worker

T = TypeVar("T")

ROOT = "root"
"""The node that is the launching process itself; it has no table."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


@dataclass(frozen=True, kw_only=True)
class NodeSettings:
    """Table `[nodes.NAME]`: one process that hosts actors."""

    launcher: Literal["local"] = "local"
    """What starts it."""
    threads: Annotated[int, Ge(1)] = 1
    """Threads that numeric libraries may use in this process."""
    env: dict[str, str] = field(default_factory=dict)
    """Further environment variables; they win over `threads`."""
    start: Literal["auto", "warm", "cold"] = "auto"
    """warm: forked from a process that has the imports, in milliseconds; cold, which auto is here: a new interpreter,
    that reads `threads` and `env` as it starts."""
    hang_s: Annotated[float, Ge(0)] = 30.0
    """Seconds for which its loop may be blocked; then it is killed and counts as hung. 0: for ever."""

    def spec(self, name: str) -> NodeSpec:
        """What the launcher needs to start it."""
        limits = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(self.threads))
        return NodeSpec(name=name, env={**limits, **self.env}, start=self.start, hang_s=self.hang_s or None)


@dataclass(frozen=True, kw_only=True)
class GroupSettings:
    """Table `[groups.NAME]`: actors that are supervised together; its other keys are those of RestartPolicy."""

    strategy: Strategy = "one_for_one"
    """Who is restarted with a member that failed: nobody, all, or those that come after it in the file."""
    parent: str = ROOT_GROUP
    """The group that it is a member of; that comes earlier in the file."""


@dataclass(frozen=True, kw_only=True)
class GroupSpec:
    """A group as it is to be made."""

    strategy: Strategy
    parent: str
    policy: RestartPolicy


@dataclass(frozen=True, kw_only=True)
class ActorSpec:
    """Table `[actors.NAME]`: an actor, where it lives, and how it is supervised."""

    name: str
    class_path: str
    """module:Class"""
    node: str
    group: str
    policy: RestartPolicy
    instance: Actor
    """The configured actor; `start` has not been called."""
    ranks: int = 1
    """Of a worker group; each but the first lives in a node of its own (gang.py)."""
    count: int = 1
    """Actors, or worker groups, of this configuration; each but the first lives in a node of its own (copies.py)."""


@dataclass(frozen=True, kw_only=True)
class ClusterSpec:
    """What is to be started."""

    run: RunSpec
    nodes: dict[str, NodeSettings]
    """By name, without the root node."""
    groups: dict[str, GroupSpec]
    """By name, without the root group; parents first."""
    actors: dict[str, ActorSpec]

    def actors_on(self, node: str) -> list[ActorSpec]:
        """The actors of one node, in the order of the file."""
        return [spec for spec in self.actors.values() if spec.node == node]


_POLICY_KEYS = tuple(f.name for f in fields(RestartPolicy))
_ACTOR_KEYS = ("class", "node", "group", "count", "ranks", *_POLICY_KEYS)
_OF_RANKS: dict[str, Any] = {"rank": 0, "layout": ONE}
"""Fields of a Worker that say which rank it is: nobody writes them down."""


def load_cluster(
    document: Document, tables: Mapping[str, type], *, may_be_empty: bool = False
) -> tuple[ClusterSpec, dict[str, Any]]:
    """Builds everything that `document` describes; `tables` are the dataclasses of further top-level tables.

    `may_be_empty`: actors may come from elsewhere, so that there need be none here. Returns the cluster and the further
    tables by name. Raises ConfigError for the first mistake.
    """
    known = ["run", "nodes", "groups", "actors", *tables]
    for name, value in document.table.items():
        if not isinstance(value, dict):
            raise document.error((name,), "this key belongs into a table; " + f"tables are {', '.join(known)}")
        if name not in known:
            raise document.error((name,), f"unknown table{nearest(name, known, otherwise=_choices(known))}")
    built: dict[str, Any] = {name: build(document, (name,), cls) for name, cls in {"run": RunSpec, **tables}.items()}
    run = built.pop("run")
    nodes = {name: _node(document, name) for name in _names(document, "nodes")}
    groups: dict[str, GroupSpec] = {}
    for name in _names(document, "groups"):
        groups[name] = _group(document, name, groups)
    given = {"run": run, **built}
    actors = {name: _actor(document, name, [ROOT, *nodes], groups, given) for name in _names(document, "actors")}
    if not actors and not may_be_empty:
        raise document.error(("actors",), "there is no actor; add a table [actors.NAME] with a class")
    return ClusterSpec(run=run, nodes=nodes, groups=groups, actors=actors), built


def build(document: Document, keys: Keys, cls: type[T], given: Mapping[str, Any] | None = None) -> T:
    """An instance of the dataclass `cls` from the table at `keys`; `given` are values of fields that are set elsewhere.

    Raises ConfigError for unknown, missing and bad values, and for what `__post_init__` refuses with ValueError.
    """
    return _build(document, keys, cls, _table(document, keys), given or {})


def with_actors(
    cluster: ClusterSpec, actors: Mapping[str, Actor | type[Actor]], tables: Mapping[str, Any], document: Document
) -> ClusterSpec:
    """The cluster with a program's own actors in the place of those of the same name, or beside them.

    A class gets the tables that its fields name. An actor whose class no other process could import lives in the root.
    Raises ConfigError.
    """
    shared, specs = {"run": cluster.run, **tables}, dict(cluster.actors)
    for name, given in actors.items():
        keys = ("actors", name)
        kind = given if isinstance(given, type) else type(given)
        if not _is_actor(kind):
            raise document.error(keys, f"{kind.__qualname__} is no actor: a dataclass derived from headrace.Actor")
        instance = _build(document, keys, kind, {}, _given_to(kind, shared)) if isinstance(given, type) else given
        try:
            path, anywhere = class_path(kind, here=False), True
        except ValueError:
            try:
                path, anywhere = class_path(kind, here=True), False
            except ValueError as error:
                raise document.error(keys, str(error)) from None
        spec = specs.get(name) or ActorSpec(
            name=name, class_path=path, node=ROOT, group=ROOT_GROUP, policy=RestartPolicy(), instance=instance
        )
        node = spec.node if anywhere else ROOT
        specs[name] = replace(spec, class_path=path, node=node, instance=instance)
    return replace(cluster, actors=specs)


def to_table(cluster: ClusterSpec, tables: Mapping[str, Any]) -> dict[str, Any]:
    """The nested dict that loads to an equal cluster and equal tables; every default is written out."""
    shared = {"run": cluster.run, **tables}
    actors = {}
    for name, spec in cluster.actors.items():
        given = _given_to(type(spec.instance), shared)
        own = {key: value for key, value in _plain(spec.instance).items() if key not in given}
        place: dict[str, Any] = {"class": spec.class_path, "node": spec.node, "group": spec.group}
        if isinstance(spec.instance, Worker):
            place["ranks"] = spec.ranks
        place["count"] = spec.count
        actors[name] = {**place, **_plain(spec.policy), **own}
    nodes = {name: _plain(spec) for name, spec in cluster.nodes.items()}
    groups = {
        name: {"strategy": spec.strategy, "parent": spec.parent, **_plain(spec.policy)}
        for name, spec in cluster.groups.items()
    }
    own_tables = {"run": _plain(cluster.run), "nodes": nodes, "groups": groups, "actors": actors}
    return own_tables | {name: _plain(table) for name, table in tables.items()}


def _node(document: Document, name: str) -> NodeSettings:
    if name == ROOT:
        raise document.error(
            ("nodes", ROOT), f'"{ROOT}" is the launching process itself and has no settings; remove the table'
        )
    return build(document, ("nodes", name), NodeSettings)


def _group(document: Document, name: str, earlier: Mapping[str, GroupSpec]) -> GroupSpec:
    keys = ("groups", name)
    if name == ROOT_GROUP:
        raise document.error(keys, f'"{ROOT_GROUP}" is the group of all that names no other; remove the table')
    table = _table(document, keys)
    policy = _build(document, keys, RestartPolicy, {k: v for k, v in table.items() if k in _POLICY_KEYS}, {})
    own = {key: value for key, value in table.items() if key not in _POLICY_KEYS}
    settings = _build(document, keys, GroupSettings, own, {}, also_known=_POLICY_KEYS)
    _known_group(document, (*keys, "parent"), settings.parent, earlier)
    return GroupSpec(strategy=settings.strategy, parent=settings.parent, policy=policy)


def _known_group(document: Document, keys: Keys, name: str, groups: Iterable[str]) -> None:
    known = [ROOT_GROUP, *groups]
    if name not in known:
        hint = nearest(name, known, otherwise=f"; add [groups.{name}] above, or take one of {', '.join(known)}")
        raise document.error(keys, f"there is no group {dump_value(name)}{hint}")


def _actor(
    document: Document, name: str, nodes: list[str], groups: Mapping[str, GroupSpec], shared: Mapping[str, Any]
) -> ActorSpec:
    keys = ("actors", name)
    table = _table(document, keys)
    cls = _actor_class(document, keys, table)
    if clash := {f.name for f in fields(cast(Any, cls)) if f.init} & set(_ACTOR_KEYS):
        raise document.error((*keys, "class"), f"{cls.__name__} has a field {min(clash)!r}, a key of supervision")
    policy_table = {key: value for key, value in table.items() if key in _POLICY_KEYS}
    policy = _build(document, keys, RestartPolicy, policy_table, {})
    group = _convert(document, (*keys, "group"), str, table.get("group", ROOT_GROUP))
    _known_group(document, (*keys, "group"), group, groups)
    if group in groups and not policy_table:
        policy = groups[group].policy
    node = _convert(document, (*keys, "node"), str, table.get("node", name if name in nodes else ROOT))
    if node not in nodes:
        hint = nearest(node, nodes, otherwise=f"; add [nodes.{node}], or take one of {', '.join(nodes)}")
        raise document.error((*keys, "node"), f"there is no node {dump_value(node)}{hint}")
    ranks = _ranks(document, keys, cls, table)
    count = _convert(document, (*keys, "count"), Annotated[int, Ge(1)], table.get("count", 1))
    own = {key: value for key, value in table.items() if key not in _ACTOR_KEYS}
    instance = _build(document, keys, cls, own, _given_to(cls, shared), also_known=_ACTOR_KEYS)
    return ActorSpec(
        name=name, class_path=table["class"], node=node, group=group, policy=policy, instance=instance, ranks=ranks,
        count=count,
    )  # fmt: skip


def _ranks(document: Document, keys: Keys, cls: type[Actor], table: Mapping[str, Any]) -> int:
    ranks: int = _convert(document, (*keys, "ranks"), Annotated[int, Ge(1)], table.get("ranks", 1))
    if "ranks" in table and not issubclass(cls, Worker):
        raise document.error(
            (*keys, "ranks"), f"{cls.__name__} can't be several ranks, since it is no Worker; remove the key"
        )
    for key in _OF_RANKS.keys() & table.keys() if issubclass(cls, Worker) else ():
        raise document.error((*keys, key), "every rank has its own; set ranks, the number of them")
    return ranks


def _actor_class(document: Document, keys: Keys, table: Mapping[str, Any]) -> type[Actor]:
    path = table.get("class")
    keys = (*keys, "class")
    example = 'for example "headrace.actors.rollout:Rollout"'
    if path is None:
        raise document.error(keys, f"missing; name the actor's class as module:Class, {example}")
    if not isinstance(path, str) or not re.fullmatch(r"[A-Za-z_][\w.]*\w:[A-Za-z_]\w*", path):
        fixed = re.sub(r"\.(\w+)$", r":\1", path) if isinstance(path, str) else ""
        hint = f'; did you mean "{fixed}"?' if ":" in fixed and fixed != path else f", {example}"
        raise document.error(keys, f"must be module:Class, got {dump_value(path)}{hint}")
    module_name, class_name = path.split(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise document.error(keys, f"{module_name} needs {error.name!r}, which is not installed") from None
        raise document.error(keys, f"there is no module {error.name}{_nearest_module(error.name)}") from None
    except (ImportError, SyntaxError) as error:
        raise document.error(keys, f"{module_name} can't be imported: {error}") from None
    cls = getattr(module, class_name, None)
    actors = [name for name, value in vars(module).items() if _is_actor(value)]
    if cls is None:
        hint = nearest(class_name, actors, otherwise=f"; its actors are {', '.join(actors)}" if actors else "")
        raise document.error(keys, f"{module_name} has no class {class_name}{hint}")
    if not _is_actor(cls):
        hint = nearest(class_name, actors, otherwise="; an actor is a dataclass derived from headrace.runtime.Actor")
        raise document.error(keys, f"{path} is no actor{hint}")
    return cast("type[Actor]", cls)


def _is_actor(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, Actor) and is_dataclass(value)


def _nearest_module(missing: str) -> str:
    parent, _, leaf = missing.rpartition(".")
    package = importlib.util.find_spec(parent) if parent else None
    folders = package.submodule_search_locations if package else None
    names = [module.name for module in pkgutil.iter_modules(folders)] if folders else []
    names += [name.removeprefix(f"{parent}.") for name in sys.modules if name.rpartition(".")[0] == parent]
    match = nearest(leaf, names)
    return match.replace('"', f'"{parent}.', 1) if match else ""


def _build(
    document: Document,
    keys: Keys,
    cls: type[T],
    table: Mapping[str, Any],
    given: Mapping[str, Any],
    also_known: Iterable[str] = (),
) -> T:
    accepted: dict[str, Field[Any]] = {f.name: f for f in fields(cast(Any, cls)) if f.init}
    types = field_types(cls)
    for key in table:
        if key in given:
            raise document.error((*keys, key), f"comes from the table [{key}]; set it there")
        if key not in accepted:
            known = [name for name in accepted if name not in given] + list(also_known)
            raise document.error((*keys, key), f"unknown key{nearest(key, known, otherwise=_choices(known))}")
    values = {key: _convert(document, (*keys, key), types[key], value) for key, value in table.items()}
    for name, spec in accepted.items():
        if name not in values and name not in given and spec.default is MISSING and spec.default_factory is MISSING:
            raise document.error((*keys, name), "missing; this key has no default")
    try:
        return cls(**values, **given)
    except ValueError as error:
        raise _refused(document, keys, str(error), accepted) from None


def _refused(document: Document, keys: Keys, text: str, fields: Iterable[str]) -> ConfigError:
    """What `__post_init__` said, at the field that it names; of several, at one that the user has set."""
    named = [word for word in re.findall(r"\w+", text) if word in fields]
    written = [name for source in (document.overrides, document.lines) for name in named if (*keys, name) in source]
    if not named:
        return document.error(keys, text)
    at = (written or named)[0]
    return document.error((*keys, at), text.removeprefix(f"{at} "))


def _convert(document: Document, keys: Keys, hint: Any, value: Any) -> Any:
    if isinstance(hint, type) and is_dataclass(hint):
        if not isinstance(value, dict):
            raise document.error(keys, f"must be a table, got {dump_value(value)}")
        return _build(document, keys, hint, value, {})
    try:
        # Strict JSON mode: no "5" for 5 and no 1 for true, but an array may become a tuple and 1 a float.
        return TypeAdapter(hint).validate_json(pydantic_core.to_json(value), strict=True)
    except ValidationError as error:
        problems, element = error.errors(include_url=False), ""
        for part in problems[0]["loc"]:
            if isinstance(value, dict) and part in value:
                keys, value = (*keys, str(part)), value[part]
            elif isinstance(value, list) and isinstance(part, int):
                element, value = f"element {part} ", value[part]
        rules = dict.fromkeys(p["msg"].replace("Input should be", "must be").split(", got")[0] for p in problems)
        text = f"{element}{' or '.join(rules)}, got {dump_value(value)}"
        if isinstance(value, int | float) and "string" in text and keys in document.overrides:
            text += f"; quote it: --set '{'.'.join(keys)}=\"{value}\"'"
        raise document.error(keys, text) from None


def field_types(cls: type) -> dict[str, Any]:
    """The annotation of each dataclass field, evaluated. Bases that are no dataclasses are left alone."""
    types: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        if "__dataclass_fields__" in vars(base):
            types |= inspect.get_annotations(base, eval_str=True)
    return types


def _given_to(cls: type, shared: Mapping[str, Any]) -> dict[str, Any]:
    types = field_types(cls)
    own = _OF_RANKS if issubclass(cls, Worker) else {}
    return own | {name: value for name, value in shared.items() if _fits(value, types.get(name))}


def _fits(value: Any, hint: Any) -> bool:
    return isinstance(hint, type) and isinstance(value, hint)


def _table(document: Document, keys: Keys) -> dict[str, Any]:
    value: Any = document.table
    for key in keys:
        value = value.get(key, {})
    if not isinstance(value, dict):
        raise document.error(keys, f"must be a table, got {dump_value(value)}")
    return value


def _names(document: Document, kind: str) -> list[str]:
    names = list(_table(document, (kind,)))
    for name in names:
        if not _NAME.fullmatch(name):
            raise document.error((kind, name), "a name is made of letters, digits, '_' and '-', at most 64 of them")
    return names


def _choices(known: Iterable[str]) -> str:
    return f"; known are {', '.join(known)}"


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value) if f.init}
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value
