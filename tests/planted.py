"""Plants a fault in a copy of a kernel, to show that a test sees it."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from headrace.kernels.build import SOURCES
from headrace.kernels.launch import KernelSpec


def plant(patch: pytest.MonkeyPatch, folder: Path, module: ModuleType, file: str, right: str, wrong: str) -> None:
    """Lets `module` run its kernels from copies in `folder`, where `file` has `wrong` in the place of `right`."""
    for path in SOURCES.iterdir():
        shutil.copy(path, folder / path.name)
    text = (folder / file).read_text()
    assert right in text, f"{file} has no {right!r}"
    (folder / file).write_text(text.replace(right, wrong))
    for name, spec in vars(module).copy().items():
        if isinstance(spec, KernelSpec):
            patch.setattr(module, name, replace(spec, source=str(folder / spec.source)))
