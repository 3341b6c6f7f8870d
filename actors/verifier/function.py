"""A verifier of the user's own: a function or a class, named "module:name" in cluster.toml.

    def judge(question: str, reference: str, response: str) -> bool | float: ...

    class Judge:
        def __init__(self, **options): ...                           the table [actors.verifier.options]
        def __call__(self, question, reference, response): ...

It returns whether the response is correct, or its reward as a finite number (above 0 counts as correct). What it
raises is an error value, never a wrong answer; OSError and TimeoutError may pass by, so it is asked again. It runs in a
process of its own, one case at a time: it may crash or hang there. It must not start threads when it is imported.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

from ...runtime.toml import nearest
from ..types import Verdict
from .case import Case

Function = Callable[[str, str, str], Any]


def load_function(path: str) -> Any:
    """The function or class at "module:name". Raises ValueError that says what is missing."""
    if not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", path):
        raise ValueError(f'function must be "module:name", got {path!r}')
    module_name, _, name = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and f"{module_name}.".startswith(f"{error.name}."):
            raise ValueError(
                f"function {path}: there is no module {error.name}; is its folder on PYTHONPATH?"
            ) from None
        raise ValueError(f"function {path}: {module_name} needs {error.name!r}, which is not installed") from None
    except (Exception, SystemExit) as error:  # noqa: BLE001  # Whatever it does.
        raise ValueError(f"function {path}: {module_name} can't be imported: {type(error).__name__}: {error}") from None
    found = getattr(module, name, None)
    if found is None:
        raise ValueError(f"function {path}: {module_name} has no {name}{nearest(name, _callables(module))}")
    if not callable(found):
        raise ValueError(f"function {path}: is a {type(found).__name__}, must be a function or a class")
    asked = vars(found).get("__call__") if isinstance(found, type) else found
    if inspect.iscoroutinefunction(asked):
        raise ValueError(f"function {path}: is async, must be a plain `def`; it has a process to itself")
    return found


def make(found: Any, options: Mapping[str, Any]) -> Function:
    """What judges: the function itself, or an instance of the class. Raises whatever the class raises."""
    if isinstance(found, type):
        return found(**options)  # type: ignore[no-any-return]
    return found  # type: ignore[no-any-return]


def check_options(found: Any, options: Mapping[str, Any]) -> None:
    """Raises ValueError if the function takes no options, or the class not these; makes no instance."""
    if not isinstance(found, type):
        if options:
            raise ValueError("options are for a class; a function has none")
        return
    try:
        inspect.signature(found).bind(**options)
    except TypeError as error:
        raise ValueError(f"options don't fit {found.__name__}(): {error}") from None


def ask(function: Callable[[], Function], case: Case) -> Verdict:
    """The verdict by what `function` makes; what it raises, or returns that is no finite number, is an error value."""
    try:
        answer = function()(case.question, case.reference, case.response)
        if isinstance(answer, bool):
            return Verdict(correct=answer)
        return Verdict(correct=float(answer) > 0, reward=float(answer))
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001  # Whatever the user's function raises is an error value.
        text = f"{type(error).__name__}: {error}"[:500]
        return Verdict(correct=False, error=text, kind="raised", retryable=isinstance(error, OSError))


def _callables(module: Any) -> list[str]:
    return [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
