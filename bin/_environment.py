"""Brings a door into a Python environment that has headrace; on a fresh clone, makes one first.

    enter() -- headrace is importable here --------------------------------------------> returns
       |
       +-> .venv is complete? -- yes --> exec .venv/bin/python -P <the same command> --> enter() again, returns
                 | no                                    ^
                 +--> empty the stamp, venv, pip, write the stamp

The stamp says what an environment was made from. It is empty while anything changes, so that one whose making was
interrupted, at whatever point, is known and made anew. A file lock keeps two starts from making it at once, and keeps
it unchanged while a command runs in it.

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
            raise SetupError("{0.python} does not run in {0.path}; remove that folder".format(environment))
        changed = environment.open(set(extras))
        if inside and not changed:
            return
        if not changed and not again:
            say("using the environment " + environment.shown(environment.path))
        os.environ["HEADRACE_ENTERING"] = str(os.getpid())
        os.execv(environment.python, [environment.python, "-P", os.path.abspath(sys.argv[0])] + sys.argv[1:])
    except SetupError as error:
        say(str(error))
        sys.exit(2)
    except OSError as error:
        say("no environment can be made: " + explain(str(error)))
        sys.exit(2)
    except KeyboardInterrupt:
        say("interrupted; the next start makes good what is half done")
        sys.exit(130)


def check_python(version: "tuple[int, ...]") -> None:
    """Raises SetupError if Python `version` is too old, or the system is no Unix."""
    if version < OLDEST_PYTHON:
        raise SetupError(
            "Python {}.{} or newer is needed, but {} is {}.{}; run it with a newer one: python{}.{} {}".format(
                *(OLDEST_PYTHON + (sys.executable,) + tuple(version) + OLDEST_PYTHON + (" ".join(sys.argv),))
            )
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
            "the environment {} has headrace but not {}; add it: {} -m pip install -c {}/constraints.txt -e '{}[test]'; "
            "or leave that environment".format(sys.prefix, missing[0], sys.executable, BIN, ROOT)
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
        self._lock = -1

    def is_running(self) -> bool:
        """Whether the running interpreter is this environment's."""
        return os.path.realpath(sys.prefix) == os.path.realpath(self.path)

    def open(self, extras: "set[str]") -> bool:
        """Makes or completes the environment if need be, and keeps it from changing until this process ends.

        Returns whether it was changed. Raises SetupError, OSError.
        """
        self._acquire(exclusive=False)
        if self._is_complete(extras):
            return False
        self._acquire(exclusive=True)
        if not self._is_complete(extras):  # another start may have come first
            self._make(extras)
        self._acquire(exclusive=False)
        return True

    def shown(self, path: str) -> str:
        """`path` as a person would write it: relative to the checkout if inside."""
        return os.path.relpath(path, self.root) if path.startswith(self.root + os.sep) else path

    def _make(self, extras: "set[str]") -> None:
        started = time.monotonic()
        stamp = self._read_stamp()
        update = self._is_sound(stamp)
        extras = extras.union(stamp.get("extras", ()), ["cuda"] if has_nvidia_driver() else [])
        target = self.root + "[{}]".format(",".join(sorted(extras))) if extras else self.root
        with open(self.log, "w") as log:
            if update:
                say("bringing the environment {} up to date (log: {})".format(*map(self.shown, (self.path, self.log))))
                self._write_stamp(self.path, {})
            else:
                say(
                    "making the environment {} with Python {}.{}; this is done once (log: {})".format(
                        self.shown(self.path), sys.version_info[0], sys.version_info[1], self.shown(self.log)
                    )
                )
                check_modules("venv", "ensurepip")
                self._clear()
                self._run("creating it", self.venv_command + (self.path,), log)
            pip = (self.python,) + self.pip_arguments + ("install", "--no-input", "--no-user", "-c", self._constraints)
            # pip's own build isolation would take the newest setuptools; this takes the pinned one.
            self._run("installing setuptools", pip + ("setuptools",), log)
            self._run("resolving versions", pip + ("--no-build-isolation", "-e", target), log)
        version = subprocess.check_output([self.python, "-I", "-c", "import sys; print(*sys.version_info[:2])"])
        made_from = {"root": self.root, "python": version.decode().split(), "inputs": self._inputs()}
        self._write_stamp(self.path, dict(made_from, extras=sorted(extras)))
        say("environment ready after {:.0f} s".format(time.monotonic() - started))

    def _is_complete(self, extras: "set[str]") -> bool:
        stamp = self._read_stamp()
        if not self._is_sound(stamp) or stamp["inputs"] != self._inputs() or not extras.issubset(stamp["extras"]):
            return False
        return "cuda" in stamp["extras"] or not has_nvidia_driver()

    def _is_sound(self, stamp: "dict") -> bool:
        """Whether the environment was finished once, in this place and for its present Python: pip can go on from it."""
        if stamp.get("root") != self.root or not os.path.exists(self.python):
            return False
        return not self.is_running() or stamp["python"] == [str(part) for part in sys.version_info[:2]]

    def _inputs(self) -> str:
        """Digest of what decides what is installed."""
        import tomllib

        with open(os.path.join(self.root, "pyproject.toml"), "rb") as file:
            settings = tomllib.load(file)
        decisive = [settings["build-system"], settings["project"], settings["tool"]["setuptools"]]
        with open(self._constraints, "rb") as file:
            return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode() + file.read()).hexdigest()

    def _read_stamp(self) -> "dict":
        try:
            with open(os.path.join(self.path, "headrace.json")) as file:
                stamp = json.load(file)
        except (OSError, ValueError):
            return {}
        return stamp if isinstance(stamp, dict) else {}

    def _write_stamp(self, folder: str, stamp: "dict") -> None:
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
                raise SetupError(
                    "{0} is there but was not made by headrace; move it away, or name another path in "
                    "HEADRACE_VENV".format(self.path)
                )
            os.rename(self.path, old)
            shutil.rmtree(old, ignore_errors=True)
        os.makedirs(new)
        self._write_stamp(new, {})
        os.rename(new, self.path)

    def _acquire(self, exclusive: bool) -> None:
        """Takes the lock: shared by those who run in the environment, exclusive for the one that changes it."""
        import fcntl

        if self._lock < 0:
            os.makedirs(os.path.dirname(self.path), exist_ok=True)
            self._lock = os.open(self.path + ".lock", os.O_RDWR | os.O_CREAT, 0o666)
        kind = fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH
        try:
            fcntl.flock(self._lock, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            say(
                "waiting: the environment has to be changed, but another command is running in it"
                if exclusive
                else "waiting: another start is making the environment (log: {})".format(self.shown(self.log))
            )
            fcntl.flock(self._lock, kind)

    def _run(self, phase, command, log):  # type: ignore[no-untyped-def]
        """Runs `command`, its output to the file `log`, its progress to stderr. Raises SetupError if it fails."""
        # The child shares the lock: if this process is killed, the next start waits for the child to end.
        process = subprocess.Popen(
            command,
            cwd=self.root,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=[self._lock],
            universal_newlines=True,
            errors="replace",
        )
        progress = Progress(phase, self.path)
        output = []

        def read() -> None:
            for line in process.stdout:
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
            raise SetupError("{} failed: {} (log: {})".format(phase, explain("".join(output)), self.shown(self.log)))


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
        elif line.startswith("Collecting "):
            self._phase = "resolving " + line.split()[1]
        elif line.startswith("Installing collected packages: "):
            self._phase = "of {} packages installed".format(line.count(",") + 1)
            self._before = len(glob.glob(self._packages))

    def show(self) -> None:
        """To be called several times a second."""
        phase, now = self._phase, time.monotonic()
        if self._before >= 0:
            phase = "{} {}".format(max(0, len(glob.glob(self._packages)) - self._before), phase)
        text = "  {:4.0f} s  {}".format(now - self._began, phase)
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
                "{} lacks the module {}; install it (Debian and Ubuntu: apt install python3-venv) and start "
                "again".format(sys.executable, name)
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
    errors = [line for line in lines if line.lower().startswith("error")] or lines
    reason = errors[0] if "ResolutionImpossible" in output else errors[-1]
    if "No space left on device" in output:
        return reason + "; free some 2 GB (10 GB with CUDA), there and in the folder for temporary files, and start again"
    if "ermission denied" in output or "Read-only file system" in output:
        return reason + "; make it writable, or name a path in HEADRACE_VENV that is"
    if "No matching distribution" in output or "ResolutionImpossible" in output:
        return reason + "; see that pip reaches its package index and finds the versions of bin/constraints.txt there"
    return reason


def say(text: str) -> None:
    """A line to stderr: what is printed to stdout belongs to the command."""
    sys.stderr.write("headrace: " + text + "\n")
    sys.stderr.flush()
