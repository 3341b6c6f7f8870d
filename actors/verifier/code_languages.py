"""The languages that a response may be written in. A new one is one more row.

Knows nothing of sandboxes but what a command line sees in one: the work folder, and /usr.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .code_tests import Language

_PYTHON_ENVIRONMENT = {"PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONIOENCODING": "utf-8"}
ENVIRONMENT = {
    "PATH": "/usr/bin:/bin", "HOME": "/work", "TMPDIR": "/work", "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}  # fmt: skip


@dataclass(frozen=True)
class LanguageRow:
    """How programs of one language are recognized, built and run."""

    tags: tuple[str, ...]
    """After the three back-ticks of a code block; the language's own name first."""
    source: str
    """Name of the file."""
    run: Callable[[str], Sequence[str]]
    """The command, given the interpreter of the sandbox."""
    build: Callable[[], Sequence[str]] | None = None
    """The command that makes BINARY of it; None = it runs as it is."""
    environment: Mapping[str, str] | None = None
    syntax_error: re.Pattern[bytes] | None = None
    """What an interpreter writes if it could not even begin."""
    out_of_memory: re.Pattern[bytes] = re.compile(rb"MemoryError|std::bad_alloc|Cannot allocate memory")


BINARY = "program"

LANGUAGES: Mapping[Language, LanguageRow] = {
    "python": LanguageRow(
        ("python", "python3", "py"),
        "main.py",
        run=lambda python: (python, "main.py"),
        environment=_PYTHON_ENVIRONMENT,
        syntax_error=re.compile(
            rb'(?:\A|\n)  File "/[^"\n]*main\.py", line \d+\n(?:.*\n)*?(?:Syntax|Indentation|Tab)Error: '
            rb"|\ASyntaxError: "
        ),
    ),
    "cpp": LanguageRow(
        ("cpp", "c++", "cc", "cxx"),
        "main.cpp",
        run=lambda python: ("./" + BINARY,),
        build=lambda: (
            compiler(), "-std=c++20", "-O2", "-pipe", "-w", "-fmax-errors=3", "-fdiagnostics-color=never",
            "-o", BINARY, "main.cpp",
        ),
    ),
}  # fmt: skip


def compiler() -> str:
    """The path of g++ as a sandbox sees it. Raises LookupError if there is none."""
    found = shutil.which("g++")
    path = str(Path(found).resolve()) if found else ""
    if not path.startswith("/usr/"):
        raise LookupError("C++ needs g++ in /usr/bin (Debian and Ubuntu: apt-get install g++)")
    return path
