"""What is in the wheel: every module and kernel, and nothing else. The wheel is built from a copy, without network."""

import importlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from headrace.__main__ import COMMANDS

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("bin", "actors", "runtime", "kernels")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def installed_path(path: Path) -> str:
    """Where the file at `path` (relative to the root) is in the wheel."""
    folder, *rest = path.parts
    return "/".join(["headrace", *([] if folder == "bin" else [folder]), *rest])


def modules() -> list[Path]:
    return [path.relative_to(ROOT) for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]


def canonical(requirement: str) -> str:
    return re.split(r"[<>=\[;! ]", requirement)[0].lower().replace("_", "-")


def test_listed_packages_are_the_folders_with_modules():
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == {
        installed_path(path.parent).replace("/", ".") for path in modules()
    }
    assert all((ROOT / path.parent / "__init__.py").exists() for path in modules())


def test_tests_shadow_nothing():
    """A package tests/ or a folder tests/kernels would put the checkout's `kernels` before that of another project."""
    assert not list((ROOT / "tests").rglob("__init__.py"))
    assert not (ROOT / "conftest.py").exists()
    assert not [path for path in (ROOT / "tests").iterdir() if path.name in FOLDERS]
    stems = [path.stem for path in (ROOT / "tests").rglob("test_*.py")]
    assert len(stems) == len(set(stems)), "two test files of one name"


def test_every_command_has_its_function():
    for module, function, purpose in COMMANDS.values():
        assert callable(getattr(importlib.import_module(module), function)) and purpose


def test_every_dependency_is_pinned_once():
    lines = (ROOT / "bin" / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins)
    names = [canonical(pin) for pin in pins]
    assert len(names) == len(set(names))
    project = PROJECT["project"]
    wanted = [project["dependencies"], PROJECT["build-system"]["requires"], *project["optional-dependencies"].values()]
    assert {canonical(requirement) for group in wanted for requirement in group} <= set(names)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, made through the source distribution as for a release."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("out")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    command = [sys.executable, "-P", "-m", "build", "--no-isolation", "--outdir", str(out), str(tree)]
    done = subprocess.run(command, cwd=out, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stdout + done.stderr
    [path] = out.glob("*.whl")
    return path


def test_wheel_holds_every_module_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
    metadata = {name for name in names if ".dist-info/" in name}
    files = {installed_path(path.relative_to(ROOT)) for path in (ROOT / "bin" / "clusters").glob("*.toml")}
    cuda = {f"headrace/kernels/cuda/{path.name}" for path in (ROOT / "kernels" / "cuda").iterdir()}
    assert files and cuda
    assert names - metadata == {installed_path(path) for path in modules()} | files | cuda | {"headrace/py.typed"}
    assert any(name.endswith("licenses/LICENSE") for name in metadata)


def test_wheel_runs_from_where_it_is_unpacked(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as file:
        file.extractall(tmp_path)
    here = os.environ | {"PYTHONPATH": str(tmp_path), "PYTHONSAFEPATH": "1"}
    script = "import headrace, headrace.actors; from headrace.kernels.build import kernel_names; "
    script += "assert kernel_names('align.cu'); print(headrace.__file__)"
    done = subprocess.run([sys.executable, "-c", script], env=here, capture_output=True, text=True, timeout=60)
    assert done.stdout == f"{tmp_path}/headrace/__init__.py\n", done.stderr
    for arguments, code, text in [
        (["--help"], 0, "launch"),
        (["lunch"], 2, "no command 'lunch'"),
        (["test"], 2, "source tree"),
    ]:
        command = [sys.executable, "-m", "headrace", *arguments]
        done = subprocess.run(command, env=here, cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert done.returncode == code and text in done.stdout + done.stderr
        assert "Traceback" not in done.stderr
