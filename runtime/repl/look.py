"""Looks at an actor from another thread, whatever its loop does: attributes by path, and the names at a path.

    look(node, "trainer", "_learner.step")      names(node, "trainer", "_learner.")

A path is made of names, attributes, constant indices and len(...): nothing waits, and no code of the actor is called
but its properties. What it shows may change at the same moment.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..errors import InspectError
from .show import show

if TYPE_CHECKING:
    from ..node import Node

MAX_NAMES = 500


def look(node: Node, actor: str, at: str = "") -> str:
    """What is at a path, shown; without one, the actor's attributes. Raises InspectError."""
    instance = _actor(node, actor)
    if at:
        return show(_at(node, instance, at))
    rows = {name: show(value, 200) for name, value in vars(instance).items() if name not in _OF_THE_RUNTIME}
    width = max(map(len, rows), default=0)
    return "\n".join([type(instance).__name__, *(f"  {name:<{width}}  {text}" for name, text in rows.items())])


def names(node: Node, actor: str, at: str = "") -> list[str]:
    """Attributes of what is at a path, public ones first; a call's end with "(". For a mapping, its keys too, as
    ["key"]. Raises InspectError."""
    instance = _actor(node, actor)
    value = _at(node, instance, at) if at else instance
    found = []
    for name in dir(value):
        if not name.startswith("__") and not (value is instance and name in _OF_THE_RUNTIME):
            known = vars(value).get(name) if hasattr(value, "__dict__") else None
            is_call = callable(known if known is not None else getattr(type(value), name, None))
            found.append(name + "(" if is_call else name)
    keys: list[object] = list(value)[:MAX_NAMES] if isinstance(value, Mapping) else []
    indices = [f"[{key!r}]" for key in keys if type(key) in (str, int)]
    return [*indices, *sorted(found, key=lambda name: (name.startswith("_"), name))][:MAX_NAMES]


def exposed(node: Node) -> dict[str, str]:
    """Names that actors here have exposed -> actor."""
    return {name: actor._name for name, (actor, _) in list(node.exposed.items()) if _lives(node, actor)}


def exposed_object(node: Node, name: str) -> Any:
    """Raises InspectError."""
    actor, value = node.exposed.get(name, (None, None))
    if actor is None or not _lives(node, actor):
        raise InspectError(f"nothing is exposed as {name!r} here")
    return value


_OF_THE_RUNTIME = frozenset(("_node", "_name", "_epoch", "_memory", "_tasks", "_thread"))


def _lives(node: Node, actor: Any) -> bool:
    cell = node.cells.get(actor._name)
    return cell is not None and cell.actor is actor


def _actor(node: Node, name: str) -> Any:
    cell = node.cells.get(name)
    if cell is None:
        raise InspectError(f"{name} is not here now")
    return cell.actor


def _at(node: Node, actor: Any, path: str) -> Any:
    try:
        tree = ast.parse(path.strip(), mode="eval").body
    except (SyntaxError, ValueError):
        raise InspectError(f"{path!r} is no path; for example _learner.step, state['x'], len(queue)") from None
    return _walk(node, actor, tree, path)


def _walk(node: Node, actor: Any, tree: ast.expr, path: str) -> Any:
    try:
        match tree:
            case ast.Name(id="self"):
                return actor
            case ast.Name(id=name):
                return exposed_object(node, name) if name in node.exposed else getattr(actor, name)
            case ast.Attribute(value=value, attr=name):
                return getattr(_walk(node, actor, value, path), name)
            case ast.Subscript(value=value, slice=index):
                return _walk(node, actor, value, path)[ast.literal_eval(index)]
            case ast.Call(func=ast.Name(id="len"), args=[value], keywords=[]):
                return len(_walk(node, actor, value, path))
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise InspectError(f"{path}: {type(error).__name__}: {error}") from None
    raise InspectError(f"{path}: only attributes, constant indices and len() can be peeked at; else use enter()")
