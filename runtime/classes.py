"""How a class of actor is named on its way to another process, and found there. Knows nothing of nodes."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from types import ModuleType

from .actor import Actor

_PROGRAM = "headrace_program"


def class_path(kind: type[Actor], *, here: bool) -> str:
    """`module:Class`, or `file.py:Class` for a class of the program itself; `here` says that this process will load it.

    Raises ValueError if the loading process could not find it.
    """
    module, name = kind.__module__, kind.__qualname__
    if module == "__main__" and not here:
        module = getattr(sys.modules["__main__"], "__file__", None) or ""
        module = os.path.abspath(module) if module.endswith(".py") else ""
    if not module or "." in name:
        raise ValueError(
            f"{kind.__module__}.{name} can't be found by the process of a node: "
            "define actor classes at the top level of a file or module"
        )
    return f"{module}:{name}"


def load_actor(path: str) -> type[Actor]:
    """The class at `class_path`. The path comes from the root's own configuration, never from an actor's message."""
    module, _, name = path.rpartition(":")
    loaded = getattr(_load_program(module) if module.endswith(".py") else importlib.import_module(module), name)
    assert isinstance(loaded, type) and issubclass(loaded, Actor), path
    return loaded


def _load_program(file: str) -> ModuleType:
    """The program that was started, as a module here; what is under its `__name__ == "__main__"` does not run again."""
    main = sys.modules["__main__"]
    if os.path.abspath(getattr(main, "__file__", None) or "") == file:
        return main
    if _PROGRAM not in sys.modules:
        spec = importlib.util.spec_from_file_location(_PROGRAM, file)
        assert spec is not None and spec.loader is not None, file
        module = sys.modules[_PROGRAM] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[_PROGRAM]
