"""Finds an algorithm by its name in `[rl] algorithm`: built-in, or "module:Name" of the user's own file.

    class      a frozen dataclass derived from Algorithm; its fields are the keys of the table [algorithm]
    coroutine  async def step(batch, *, policy) -> metrics; the table [algorithm] stays empty

Knows nothing of configuration files.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import re
from dataclasses import dataclass
from typing import Any

from ...runtime.codec import wire
from ...runtime.toml import nearest
from .algorithm import Algorithm
from .dapo import Dapo
from .grpo import Grpo
from .ppo import Ppo
from .vapo import Vapo

BUILT_IN: dict[str, type[Algorithm]] = {"dapo": Dapo, "vapo": Vapo, "ppo": Ppo, "grpo": Grpo}

ROLES = ("policy", "critic")
"""What a step may ask for, by these keywords."""


@functools.cache
def load_algorithm(name: str) -> type[Algorithm]:
    """The algorithm's class. Raises ValueError that says what is missing or wrong."""
    if name in BUILT_IN:
        return BUILT_IN[name]
    if not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", name):
        hint = nearest(name, BUILT_IN, otherwise=f"; built in are {', '.join(BUILT_IN)}")
        raise ValueError(f'must be a built-in algorithm or "module:Name" of your own, got "{name}"{hint}')
    return make_algorithm(_import(name), name)


def make_algorithm(found: Any, name: str) -> type[Algorithm]:
    """The class of an algorithm that is a class or a coroutine function; `name` stands for it in messages. Raises
    ValueError that says what is missing or wrong."""
    cls = _from_function(found) if inspect.isfunction(found) else found
    if not (isinstance(cls, type) and issubclass(cls, Algorithm) and "__dataclass_fields__" in vars(cls)):
        raise ValueError(
            f"{name} must be a class derived from headrace.actors.algorithms.Algorithm, marked "
            f"@dataclass(frozen=True, kw_only=True), or `async def {name.rpartition(':')[2]}(batch, *, policy)`"
        )
    check_signatures(cls, name)
    return wire(cls)


def roles_of(coroutine: Any) -> list[str]:
    """The roles that a step or a pretraining asks for."""
    return [name for name in inspect.signature(coroutine).parameters if name in ROLES]


def needs_critic(algorithm: Algorithm) -> bool:
    """Whether there must be an actor that it calls `critic`."""
    return bool(algorithm.value_steps) or "critic" in roles_of(algorithm.step)


def check_signatures(cls: type[Algorithm], name: str) -> None:
    """Raises ValueError unless `step`, and `pretrain` if there is one, can be called as the controller does."""
    blank = object.__new__(cls)
    _check(blank.step, cls.step is Algorithm.step, f"{name}: step", needs="policy")
    if cls.value_steps is not Algorithm.value_steps or cls.pretrain is not Algorithm.pretrain:
        _check(blank.pretrain, cls.pretrain is Algorithm.pretrain, f"{name}: pretrain", needs="critic")


def _check(coroutine: Any, missing: bool, what: str, *, needs: str) -> None:
    rule = f"must be `async def` and take (batch, *, {needs})"
    if missing:
        raise ValueError(f"{what} is missing; it {rule}")
    if not inspect.iscoroutinefunction(coroutine):
        raise ValueError(f"{what} {rule}, got a plain function; it waits for the roles")
    signature = inspect.signature(coroutine)
    try:
        signature.bind(None, **dict.fromkeys(roles_of(coroutine)))
    except TypeError as error:
        raise ValueError(f"{what} {rule}; roles are {' and '.join(ROLES)}; got {signature} ({error})") from None
    if needs not in signature.parameters:
        raise ValueError(f"{what} {rule}, got {signature}")


def _from_function(function: Any) -> type[Algorithm]:
    """A class whose step is the function."""
    members = {"step": staticmethod(function), "__doc__": function.__doc__, "__module__": function.__module__}
    return dataclass(frozen=True, kw_only=True)(type(function.__name__, (Algorithm,), members))


def _import(path: str) -> Any:
    """The object at "module:Name"."""
    module_name, _, name = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and f"{module_name}.".startswith(f"{error.name}."):
            raise ValueError(f"there is no module {error.name}; is its folder on PYTHONPATH?") from None
        raise ValueError(f"{module_name} needs {error.name!r}, which is not installed") from None
    except (Exception, SystemExit) as error:  # noqa: BLE001  # Whatever it does.
        raise ValueError(f"{module_name} can't be imported: {type(error).__name__}: {error}") from None
    if not hasattr(module, name):
        own = [key for key, value in vars(module).items() if getattr(value, "__module__", "") == module_name]
        raise ValueError(f"{module_name} has no {name}{nearest(name, own)}")
    return getattr(module, name)
