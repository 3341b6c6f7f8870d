"""Brings a door into a Python environment that has headrace; on a fresh clone, makes one first.

    enter() -- headrace is importable here --------------------------------------------> returns
       |
       +-> .venv is complete? -- yes --> exec .venv/bin/python -P <the same command> --> enter() again, returns
                 | no                                    ^
                 +--> empty the stamp, venv, pip, write the stamp

The stamp says what an environment was made from. It is empty while anything changes, so that one whose making was
interrupted, at whatever point, is known and made anew. One file lock keeps two starts from making it at once; another
keeps what is installed from being replaced while a command runs with it (packages may be added).

Needs only the standard library, and parses under Python 3.6, to say that this is too old. Knows nothing of what it
starts.
"""

import glob
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import typing

OLDEST_PYTHON = (3, 11)
BIN = os.path.dirname(os.path.realpath(__file__))
ROOT = os.path.dirname(BIN)

TEST_MODULES = ("pytest", "pytest_asyncio", "pytest_timeout", "xdist", "hypothesis")
"""What bin/test can't start without, in an environment that is not ours."""


class SetupError(Exception):
    """There is no environment to run in. The text says why, and what to do."""


def enter(*extras: str) -> None:
    """Returns in an interpreter that can import headrace with `extras`; to get there, this process may exec itself.

    If that can't be: one message and exit code 2; after Ctrl-C, 130.
    """
    sys.path[:] = [path for path in sys.path if os.path.realpath(path or ".") != BIN]
    os.environ["PYTHONSAFEPATH"] = "1"  # the checkout has a folder `kernels`, and so does another project
    try:
        check_python(sys.version_info[:2])
        chosen = os.environ.get("HEADRACE_VENV", "")
        environment = Environment(ROOT, chosen or os.path.join(ROOT, ".venv"))
        inside, again = environment.is_running(), os.environ.pop("HEADRACE_ENTERING", "") == str(os.getpid())
        if not inside and not chosen and has_headrace(extras):
            return
        if again and not inside:
            raise SetupError(f"{environment.python} does not run in {environment.path}; remove that folder")
        changed = environment.open(set(extras))
        if inside and not changed:
            return
        if not changed and not again:
            say("using the environment " + environment.shown(environment.path))
        os.environ["HEADRACE_ENTERING"] = str(os.getpid())
        os.execv(environment.python, [environment.python, "-P", os.path.abspath(sys.argv[0]), *sys.argv[1:]])
    except SetupError as error:
        say(str(error))
        sys.exit(2)
    except OSError as error:
        say(f"no environment can be made: {explain(str(error))}")
        sys.exit(2)
    except KeyboardInterrupt:
        say("interrupted; the next start makes good what is half done")
        sys.exit(130)


def check_python(version: "tuple[int, ...]") -> None:
    """Raises SetupError if Python `version` is too old, or the system is no Unix."""
    if version < OLDEST_PYTHON:
        oldest, this = ("{}.{}".format(*numbers) for numbers in (OLDEST_PYTHON, version))
        raise SetupError(
            f"Python {oldest} or newer is needed, but {sys.executable} is {this}; "
            f"run it with a newer one: python{oldest} {' '.join(sys.argv)}"
        )
    if os.name != "posix":
        raise SetupError("Linux is needed; on Windows, use WSL 2")


def has_headrace(extras: "tuple[str, ...]") -> bool:
    """Whether the environment that we run in has headrace; if so, says whose files will run."""
    spec = importlib.util.find_spec("headrace")
    if spec is None or spec.origin is None:
        return False
    missing = [name for name in TEST_MODULES if "test" in extras and importlib.util.find_spec(name) is None]
    if missing:
        raise SetupError(
            f"the environment {sys.prefix} has headrace but not {missing[0]}; leave that environment, or add it: "
            f"{sys.executable} -m pip install -c {BIN}/constraints.txt -e '{ROOT}[test]'"
        )
    origin = os.path.dirname(os.path.realpath(spec.origin))
    say("using the environment " + sys.prefix + ("" if origin == BIN else ", which has the headrace of " + origin))
    return True


class Environment:
    """The virtual environment at `path` for the checkout at `root`."""

    venv_command = (getattr(sys, "_base_executable", sys.executable), "-m", "venv")
    """Makes an empty environment at the path that is added."""

    pip_arguments = ("-I", "-m", "pip")
    """How the environment's Python runs pip: isolated from PYTHONPATH and from the current folder."""

    def __init__(self, root: str, path: str) -> None:
        self.root = root
        self.path = os.path.abspath(path)
        self.python = os.path.join(self.path, "bin", "python")
        self.log = self.path + ".log"
        self._constraints = os.path.join(root, "bin", "constraints.txt")
        self._making = Lock(self.path + ".making")
        self._running = Lock(self.path + ".running")

    def is_running(self) -> bool:
        """Whether the running interpreter is this environment's."""
        return os.path.realpath(sys.prefix) == os.path.realpath(self.path)

    def open(self, extras: "set[str]") -> bool:
        """Makes or completes the environment if need be, and keeps its packages from change until this process ends.

        Returns whether it was changed. Raises SetupError, OSError.
        """
        another = f"another start is making the environment (log: {self.shown(self.log)})"
        self._making.acquire(shared=True, reason=another)
        changed = not self._is_complete(extras)
        if changed:
            self._making.acquire(shared=False, reason=another)
            if not self._is_complete(extras):  # another start may have come first
                self._make(extras)
        self._running.acquire(shared=True, reason=another)
        self._making.release()
        return changed

    def shown(self, path: str) -> str:
        """`path` as a person would write it: relative to the checkout if inside."""
        return os.path.relpath(path, self.root) if path.startswith(self.root + os.sep) else path

    def _make(self, extras: "set[str]") -> None:
        started = time.monotonic()
        stamp = self._read_stamp()
        update = self._is_sound(stamp)
        extras = extras.union(stamp.get("extras", ()), ["cuda"] if has_nvidia_driver() else [])
        if not update or stamp.get("inputs") != self._inputs():
            self._running.acquire(
                shared=False, reason="the environment must be changed, but a command is running in it"
            )
        target = f"{self.root}[{','.join(sorted(extras))}]" if extras else self.root
        with open(self.log, "w") as log:
            if update:
                say(f"bringing the environment {self.shown(self.path)} up to date (log: {self.shown(self.log)})")
                self._write_stamp(self.path, {})
            else:
                say(f"making the environment {self.shown(self.path)}; this is done once (log: {self.shown(self.log)})")
                check_modules("venv", "ensurepip")
                self._clear()
                self._run("creating it", [*self.venv_command, self.path], log)
            pip = [self.python, *self.pip_arguments, "install", "--no-input", "--no-user", "-c", self._constraints]
            # pip's own build isolation would take the newest setuptools; this takes the pinned one.
            self._run("installing setuptools", [*pip, "setuptools"], log)
            self._run("resolving versions", [*pip, "--no-build-isolation", "-e", target], log)
        version = subprocess.check_output([self.python, "-I", "-c", "import sys; print(*sys.version_info[:2])"])
        made_from = {"root": self.root, "python": version.decode().split(), "inputs": self._inputs()}
        self._write_stamp(self.path, dict(made_from, extras=sorted(extras)))
        say(f"environment ready after {time.monotonic() - started:.0f} s")

    def _is_complete(self, extras: "set[str]") -> bool:
        stamp = self._read_stamp()
        if not self._is_sound(stamp) or stamp.get("inputs") != self._inputs():
            return False
        present = stamp.get("extras", ())
        return extras.issubset(present) and ("cuda" in present or not has_nvidia_driver())

    def _is_sound(self, stamp: "dict[str, typing.Any]") -> bool:
        """Whether it was finished once, in this place and for the Python that it has now: pip can go on from there."""
        if stamp.get("root") != self.root or not os.path.exists(self.python):
            return False
        return not self.is_running() or stamp.get("python") == [str(part) for part in sys.version_info[:2]]

    def _inputs(self) -> str:
        """Digest of what decides what is installed."""
        import tomllib

        with open(os.path.join(self.root, "pyproject.toml"), "rb") as file:
            settings = tomllib.load(file)
        decisive = [settings["build-system"], settings["project"], settings["tool"]["setuptools"]]
        with open(self._constraints, "rb") as file:
            return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode() + file.read()).hexdigest()

    def _read_stamp(self) -> "dict[str, typing.Any]":
        try:
            with open(os.path.join(self.path, "headrace.json")) as file:
                stamp = json.load(file)
        except (OSError, ValueError):
            return {}
        return stamp if isinstance(stamp, dict) else {}

    def _write_stamp(self, folder: str, stamp: "dict[str, typing.Any]") -> None:
        path = os.path.join(folder, "headrace.json")
        with open(path + ".new", "w") as file:
            json.dump(stamp, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(path + ".new", path)

    def _clear(self) -> None:
        """Leaves a folder with nothing but an empty stamp. Refuses to remove one that has none."""
        old, new = self.path + ".old", self.path + ".new"
        for leftover in (old, new):
            shutil.rmtree(leftover, ignore_errors=True)
        if os.path.lexists(self.path):
            if not os.path.exists(os.path.join(self.path, "headrace.json")):
                raise SetupError(f"{self.path} was not made by headrace; move it, or set HEADRACE_VENV to another path")
            os.rename(self.path, old)
            shutil.rmtree(old, ignore_errors=True)
        os.makedirs(new)
        self._write_stamp(new, {})
        os.rename(new, self.path)

    def _run(self, phase: str, command: "list[str]", log: "typing.IO[str]") -> None:
        """Runs `command`, its output to the file `log`, its progress to stderr. Raises SetupError if it fails."""
        # The child shares the lock: if this process is killed, the next start waits for the child to end.
        process = subprocess.Popen(
            command,
            cwd=self.root,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=[self._making.descriptor],
            universal_newlines=True,
            errors="replace",
        )
        progress = Progress(phase, self.path)
        output = []

        def read() -> None:
            for line in process.stdout or ():
                output.append(line)
                log.write(line)
                log.flush()
                progress.read(line)

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        try:
            while reader.is_alive():
                reader.join(0.2)
                progress.show()
            code = process.wait()
        finally:
            process.kill()  # it has ended, unless we were interrupted
            process.wait()
            reader.join(2)
            progress.close()
        if code:
            raise SetupError(f"{phase} failed: {explain(''.join(output))} (log: {self.shown(self.log)})")


class Lock:
    """A lock on a file: shared by many or exclusive to one, until it is released or the process ends."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._told = False
        self.descriptor = -1

    def acquire(self, shared: bool, reason: str) -> None:
        """Takes the lock, or turns shared into exclusive and back. If that takes waiting, gives the `reason` once."""
        import fcntl  # not on Windows, which is told so before this

        if self.descriptor < 0:
            os.makedirs(os.path.dirname(self._path), exist_ok=True)
            self.descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
        kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        try:
            fcntl.flock(self.descriptor, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if not self._told:
                say("waiting: " + reason)
            self._told = True
            fcntl.flock(self.descriptor, kind)

    def release(self) -> None:
        os.close(self.descriptor)
        self.descriptor = -1


class Progress:
    """What pip is doing, in a few words: one line rewritten on a terminal, else a line every ten seconds."""

    def __init__(self, phase: str, path: str) -> None:
        self._phase = phase
        self._packages = os.path.join(path, "lib", "python*", "site-packages", "*.dist-info")
        self._before = -1
        self._began = self._said = time.monotonic()
        self._terminal = sys.stderr.isatty()

    def read(self, line: str) -> None:
        """Takes a line of pip's output."""
        found = re.match(r"\s*Downloading (?:\S*/)?(\w+-[^-\s]+)\S* (\(\S+ \S+\))", line)
        if found:
            self._phase = "downloading {} {}".format(*found.groups())
        elif "connection broken" in line:
            self._phase = "pip can't reach its package index and tries again"
        elif line.startswith("Collecting "):
            self._phase = "resolving " + line.split()[1]
        elif line.startswith("Installing collected packages: "):
            self._phase = f"of {line.count(',') + 1} packages installed"
            self._before = len(glob.glob(self._packages))

    def show(self) -> None:
        """To be called several times a second."""
        phase, now = self._phase, time.monotonic()
        if self._before >= 0:
            phase = f"{max(0, len(glob.glob(self._packages)) - self._before)} {phase}"
        text = f"  {now - self._began:4.0f} s  {phase}"
        if self._terminal:
            sys.stderr.write("\r\x1b[K" + text[: shutil.get_terminal_size().columns - 1])
            sys.stderr.flush()
        elif now - self._said > 10:
            self._said = now
            say(text)

    def close(self) -> None:
        """Wipes the line."""
        if self._terminal:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()


def check_modules(*names: str) -> None:
    """Raises SetupError if Python was installed without one of these."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise SetupError(
                f"{sys.executable} lacks the module {name}; install it (Debian and Ubuntu: apt install python3-venv)"
            )


def has_nvidia_driver() -> bool:
    """Whether an NVIDIA driver is loaded (in WSL 2 only nvidia-smi tells)."""
    if os.path.exists("/proc/driver/nvidia/version"):
        return True
    smi = shutil.which("nvidia-smi")
    try:
        return smi is not None and subprocess.run([smi, "-L"], stdout=-3, stderr=-3, timeout=20).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def explain(output: str) -> str:
    """The reason for a failure, out of all that was printed, and what to do."""
    lines = [line.strip() for line in output.splitlines() if line.strip()] or ["it printed nothing"]
    errors = [line.rstrip(".") for line in lines if line.lower().startswith("error")] or lines
    if "No space left on device" in output:
        return f"{errors[-1]}; free some 3 GB (10 GB with CUDA) there and in the folder for temporary files"
    if "ermission denied" in output or "Read-only file system" in output:
        return f"{errors[-1]}; make it writable, or set HEADRACE_VENV to a path that is"
    if "connection broken" in output:
        return "pip can't reach its package index; look at the network and at `pip config list`"
    if "No matching distribution" in output or "ResolutionImpossible" in output:
        return f"{errors[0]}; pip's package index must have the versions that bin/constraints.txt names"
    return errors[-1]


def say(text: str) -> None:
    """A line to stderr: what is printed to stdout belongs to the command."""
    sys.stderr.write(f"headrace: {text}\n")
    sys.stderr.flush()
