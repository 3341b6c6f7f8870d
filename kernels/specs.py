"""All kernels of this package: what its modules list as SPECS."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from pathlib import Path

from .launch import KernelSpec


def all_specs() -> Iterator[tuple[str, KernelSpec]]:
    """Module name and spec of every kernel, in the order of the names. Imports every module beside this one."""
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        for spec in getattr(importlib.import_module(f".{module.name}", __package__), "SPECS", ()):
            yield module.name, spec
