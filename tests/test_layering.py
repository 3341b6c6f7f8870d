"""Who may import whom, read from the source; and what importing costs and does, seen in a process of its own."""

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

MAY_IMPORT = {
    "bin": {"bin", "actors", "runtime", "kernels"},
    "actors": {"actors", "runtime", "kernels"},
    "runtime": {"runtime"},
    "kernels": {"kernels"},
}
"""Folder -> folders that it may import from."""

MUST_NOT_IMPORT = {
    "bin": set(),
    "actors": set(),
    "runtime": {"torch", "transformers", "cupy"},
    "kernels": {"asyncio", "zmq"},
}
"""Folder -> modules of others that it must not import, not even inside a function."""

DOORS = {"runtime/exchange/cuda.py": {"cupy"}}
"""File -> what it alone may import, inside a function."""


def package_of(path: Path) -> list[str]:
    """The package whose relative imports `path` (relative to the root) writes."""
    folder, *rest = path.parent.parts
    return ["headrace", *([] if folder == "bin" else [folder]), *rest]


def imports(source: str, package: list[str]) -> Iterator[tuple[int, str]]:
    """Line and dotted name of all that `source` imports, anywhere in it, names included: they may be modules."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = base + (node.module or "").split(".") * bool(node.module)
            for alias in node.names:
                yield node.lineno, ".".join([*base, alias.name])
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in ("import_module", "__import__"):
                target = str(node.args[0].value)
                level = len(target) - len(target.lstrip("."))
                base = package[: len(package) - level + 1] if level else []
                yield node.lineno, ".".join([*base, target.lstrip(".")])


def breaches(source: str, path: Path) -> list[str]:
    """What the module at `path` (relative to the root) imports but must not."""
    folder = path.parts[0]
    found = []
    for line, name in imports(source, package_of(path)):
        top, *rest = name.split(".")
        if top in MAY_IMPORT:
            found.append(f"{path}:{line}: {name} is found by accident of the current folder; write headrace.{name}")
        elif top in MUST_NOT_IMPORT[folder] - DOORS.get(str(path), set()):
            found.append(f"{path}:{line}: {folder} must not import {name}")
        elif top == "headrace":
            target = rest[0] if rest and rest[0] in MAY_IMPORT else "bin"
            if target not in MAY_IMPORT[folder]:
                found.append(f"{path}:{line}: {folder} must not import {name}, which is in {target}")
    return found


def sources(*folders: str) -> list[Path]:
    return [path.relative_to(ROOT) for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def test_imports_go_one_way():
    found = [breach for path in sources(*MAY_IMPORT) for breach in breaches((ROOT / path).read_text(), path)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("runtime/cell.py", "from .. import actors"),
        ("runtime/cell.py", "from ..actors.types import Group"),
        ("runtime/cell.py", "def f():\n    import headrace.kernels"),
        ("runtime/cell.py", "from headrace import actors"),
        ("runtime/cell.py", "import torch.nn"),
        ("runtime/cell.py", "from torch import Tensor"),
        ("runtime/cell.py", "importlib.import_module('headrace.actors.trainer')"),
        ("runtime/cell.py", "import_module('..actors', __package__)"),
        ("runtime/cell.py", "from .. import open_cluster"),
        ("runtime/deep/er.py", "from ... import kernels"),
        ("kernels/gate.py", "from ..runtime import Actor"),
        ("kernels/gate.py", "import asyncio"),
        ("kernels/gate.py", "import kernels"),
        ("actors/rollout/worker.py", "from ...cli import launch_main"),
        ("actors/rollout/worker.py", "from ... import open_cluster"),
        ("actors/rollout/worker.py", "from kernels import gate"),
        ("bin/cli.py", "from runtime.actor import Actor"),
    ],
)
def test_a_breach_is_found(path, source):
    assert len(breaches(source, Path(path))) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("runtime/cell.py", "from . import errors\nfrom .errors import CodecError\nimport numpy"),
        ("runtime/__init__.py", "from .actor import Actor as Actor"),
        ("actors/__init__.py", "from ..runtime import Actor"),
        ("actors/rollout/worker.py", "from ...runtime import Actor\nfrom ..types import Group\nfrom . import engine"),
        ("actors/model/moe.py", "from ...kernels import reference\nimport torch"),
        ("bin/__init__.py", "from .runtime import Actor as Actor"),
        ("bin/cli.py", "from .actors.job import run\nfrom . import testing"),
    ],
)
def test_what_is_allowed_is_no_breach(path, source):
    assert breaches(source, Path(path)) == []


def modules_to_import() -> list[str]:
    """All of the runtime, and every module that holds an actor class: what a process without torch imports."""
    found = []
    for path in sources("runtime", "actors"):
        classes = [node for node in ast.walk(ast.parse((ROOT / path).read_text())) if isinstance(node, ast.ClassDef)]
        bases = {ast.unparse(base).rsplit(".", 1)[-1] for node in classes for base in node.bases}
        if path.parts[0] == "runtime" or "Actor" in bases:
            stem = [] if path.stem == "__init__" else [path.stem]
            found.append(".".join([*package_of(path), *stem]))
    return found


PROBE = """
import importlib, json, logging, os, sys, threading
before = dict(os.environ), list(sys.path), os.listdir("/proc/self/fd")
found = {}
for name in json.loads(sys.argv[1]):
    importlib.import_module(name)
    if "torch" in sys.modules and "torch" not in found:
        found["torch"] = name
after = dict(os.environ), list(sys.path), os.listdir("/proc/self/fd")
found["changed"] = [what for what, a, b in zip(("environment", "sys.path", "open files"), before, after) if a != b]
found["threads"] = threading.active_count()
found["handlers"] = len(logging.getLogger().handlers)
print(json.dumps(found))
"""


def test_importing_the_runtime_and_the_actors_loads_no_torch_and_does_nothing():
    names = modules_to_import()
    assert "headrace.runtime.errors" in names
    command = [sys.executable, "-P", "-W", "error", "-c", PROBE, json.dumps(names)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=os.environ | {"PYTHONSAFEPATH": "1"})
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"changed": [], "threads": 1, "handlers": 0}
