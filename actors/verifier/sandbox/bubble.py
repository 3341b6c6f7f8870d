"""The command line that starts a sandbox, and whether it works on this machine.

    bwrap    own user, pid, mount, network, ipc, uts and cgroup namespaces; no capabilities; no new privileges; a new
             session; a filter of system calls
      /              read-only; /usr/lib and the interpreter, read-only (for a compiler: all of /usr); /proc; /dev
      /work          memory, of a fixed size; the only place that can be written

Started as root it gives that up first: it runs as the user `nobody`, who must be able to read the interpreter. Knows
nothing of what is run.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge

from ....runtime.codec import wire

WORK = "/work"
NOBODY = 65534
_INSIDE_ID = "1000"
_NAMESPACES = ("user", "ipc", "pid", "net", "uts")
_REMEDY = (
    "install bubblewrap (Debian and Ubuntu: apt-get install bubblewrap), or, for programs that you trust only, set "
    "unsafe = true"
)
_NO_NAMESPACES = (
    "user namespaces are forbidden here; allow them (sysctl kernel.unprivileged_userns_clone=1, "
    "user.max_user_namespaces > 0, kernel.apparmor_restrict_unprivileged_userns=0; in a container, start it with a "
    "seccomp profile that permits unshare and mount), or, for programs that you trust only, set unsafe = true"
)


class SandboxUnavailable(RuntimeError):
    """No sandbox can be had on this machine. The text says why, and what to do; nothing has been run."""


@wire
@dataclass(frozen=True, kw_only=True)
class Isolation:
    """How sandboxes are made."""

    unsafe: bool = False
    """Run programs without any isolation, as this user. For tests of programs that you wrote yourself."""
    bwrap: str = ""
    """The program bubblewrap; "" = that on PATH."""
    python: str = ""
    """The interpreter of what runs inside; "" = /usr/bin/python3, or else this one. Its libraries are mounted."""
    disk_bytes: Annotated[int, Ge(1 << 20)] = 64 << 20
    """Size of the work folder, which is memory."""


@dataclass(frozen=True)
class Interpreter:
    """A Python for the inside."""

    path: str
    prefix: str
    """The folder that its library lies in."""


def find_bwrap(isolation: Isolation) -> str:
    """Path of bubblewrap. Raises SandboxUnavailable."""
    found = shutil.which(isolation.bwrap or "bwrap")
    if not found:
        raise SandboxUnavailable(f"there is no {isolation.bwrap or 'bwrap'}: {_REMEDY}")
    return found


def user() -> int | None:
    """Whom sandboxes run as: `nobody` if this is root, else this user (None)."""
    return NOBODY if os.geteuid() == 0 else None


def identity() -> dict[str, Any]:
    """Arguments of subprocess that make the child run as `user()`."""
    who = user()
    return {} if who is None else {"user": who, "group": who, "extra_groups": []}


@cache
def interpreter(python: str) -> Interpreter:
    """The Python at `python`, or the one that is the default. Raises SandboxUnavailable if it can't be used."""
    candidates = [python] if python else ["/usr/bin/python3", sys.executable]
    troubles = []
    for candidate in candidates:
        ask = "import os, sys; print(os.path.realpath(sys._base_executable)); print(sys.base_prefix)"
        try:
            done = subprocess.run(
                [candidate, "-I", "-S", "-c", ask], capture_output=True, text=True, timeout=30, cwd="/", **identity()
            )  # fmt: skip
        except (OSError, subprocess.TimeoutExpired) as error:
            troubles.append(f"{candidate}: {error}")
            continue
        if done.returncode == 0:
            path, prefix = done.stdout.splitlines()
            return Interpreter(path, prefix)
        troubles.append(f"{candidate}: {done.stderr.strip()[-200:]}")
    who = " by the user nobody, whom sandboxes run as" if user() else ""
    raise SandboxUnavailable(f"no Python can be run{who} ({'; '.join(troubles)}): set python to one that can")


def command(isolation: Isolation, *, whole_usr: bool, filter_fd: int) -> list[str]:
    """bwrap and its arguments, up to what runs inside; `filter_fd` holds the filter, or is -1."""
    python = interpreter(isolation.python)
    flags = [f"--unshare-{name}" for name in _NAMESPACES]
    flags += ["--unshare-cgroup-try", "--as-pid-1", "--new-session", "--cap-drop", "ALL"]
    flags += ["--uid", _INSIDE_ID, "--gid", _INSIDE_ID, "--hostname", "sandbox", "--clearenv"]
    flags += _system("/usr" if whole_usr else "/usr/lib")
    if not whole_usr or not _within(python.path, "/usr"):
        flags += ["--ro-bind", python.path, python.path]
    if not _within(python.prefix, "/usr"):
        flags += ["--ro-bind", f"{python.prefix}/lib", f"{python.prefix}/lib"]
    flags += ["--proc", "/proc", "--dev", "/dev", "--size", str(isolation.disk_bytes), "--tmpfs", WORK]
    flags += ["--symlink", WORK[1:], "/tmp", "--remount-ro", "/dev", "--remount-ro", "/", "--chdir", WORK]
    if filter_fd >= 0:
        flags += ["--seccomp", str(filter_fd)]
    return [find_bwrap(isolation), *flags]


def keeper_command(python: str, socket: int, work: str) -> list[str]:
    """What runs inside. The program is passed as text: `nobody` may not be able to read this folder."""
    return [python, "-I", "-S", "-c", _keeper(), str(socket), work]


@cache
def _keeper() -> str:
    return Path(__file__).with_name("keeper.py").read_text()


def explain(text: str) -> str:
    """Why bubblewrap did not start, with the remedy, from what it wrote."""
    denied = ("namespace", "Operation not permitted", "Permission denied", "uid map", "Failed to make / slave")
    if any(word in text for word in denied):
        return f"{text.strip()[-300:]}: {_NO_NAMESPACES}"
    return text.strip()[-300:] or "it ended without a word"


def _system(library: str) -> Sequence[str]:
    flags = ["--ro-bind", library, library]
    for name in ("lib", "lib64", "bin"):
        merged, wide = Path("/") / name, Path("/usr") / name
        if library == "/usr/lib" and name == "lib64" and wide.is_dir():
            flags += ["--ro-bind", str(wide), str(wide)]
        if merged.is_symlink():
            flags += ["--symlink", f"usr/{name}", str(merged)]
        elif merged.is_dir():
            flags += ["--ro-bind", str(merged), str(merged)]
    return flags


def _within(path: str, folder: str) -> bool:
    return Path(folder) in Path(path).parents or path == folder


def environment() -> Mapping[str, str]:
    """What bwrap itself is started with; inside there is nothing of it."""
    return {"PATH": os.environ.get("PATH", "/usr/bin:/bin")}
