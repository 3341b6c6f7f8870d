"""The README is executed: its program runs, its commands parse, its settings and files are those of the repository."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()

BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def blocks(language: str) -> list[str]:
    return [text for kind, text in BLOCKS if kind == language]


def commands() -> list[str]:
    lines = [line for text in blocks("console") for line in text.splitlines()]
    return [line[2:].split("#")[0].strip() for line in lines if line.startswith("$ ")]


def programs() -> list[Any]:
    """Those that train take a while."""
    return [pytest.param(p, marks=[pytest.mark.slow] * ('"cluster.toml"' in p)) for p in blocks("python")]


@pytest.mark.parametrize("program", programs())
def test_the_programs_run(program: str, tmp_path: Path) -> None:
    shutil.copy(ROOT / "cluster.toml", tmp_path)
    script = tmp_path / "program.py"
    script.write_text(program)
    done = subprocess.run([sys.executable, "-P", script], capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith("bin/")])
def test_the_commands_exist_and_their_arguments_are_accepted(command: str, tmp_path: Path) -> None:
    door, *arguments = shlex.split(command)
    assert os.access(ROOT / door, os.X_OK)
    name = door.removeprefix("bin/")
    if name == "launch":
        arguments = [a for a in arguments if a not in ("--check", "--resume")] + ["--check"]
    else:
        arguments = ["--help"]
    done = subprocess.run(
        [sys.executable, "-P", "-m", "headrace", name, *arguments], capture_output=True, text=True, timeout=60, cwd=ROOT
    )
    shown = README.split(f"$ {command}\n", 1)[1].split("```", 1)[0].strip()
    if done.returncode == 2:
        assert done.stderr.strip() == shown
    else:
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("text", blocks("toml"))
def test_the_settings_are_those_of_the_default_job(text: str) -> None:
    default = tomllib.loads((ROOT / "cluster.toml").read_text())

    def check(shown: dict, real: dict, where: str) -> None:
        for key, value in shown.items():
            if isinstance(value, dict):
                check(value, real[key], f"{where}{key}.")
            else:
                assert real[key] == value, f"{where}{key}"

    check(tomllib.loads(text), default, "")


def test_the_files_that_it_names_exist() -> None:
    prose = re.sub(r"^```.*?^```$", "", README, flags=re.DOTALL | re.MULTILINE)
    named = set(re.findall(r"[`(]((?:bin|actors|runtime|kernels|tests)/[\w./]+)[`)]", prose))
    named = {name.rstrip(".") for name in named}
    assert named
    missing = [name for name in named if not (ROOT / name).exists()]
    assert missing == []
