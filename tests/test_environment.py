"""The set-up of bin/_environment.py on a small checkout: real virtual environments, and a stand-in for pip that can be
held, failed and killed."""

import ast
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from headrace import _environment, testing

BIN = Path(_environment.BIN)

PYPROJECT = """
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]
[project]
name = "headrace"
version = "0"
[project.optional-dependencies]
test = []
cuda = []
[tool.setuptools]
[tool.ruff]
"""

DOOR = """
import os, sys, time
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import _environment
if {stub!r}:
    _environment.Environment.venv_command += ("--without-pip",)
    _environment.Environment.pip_arguments = ({stub!r},)
_environment.enter(*os.environ.get("EXTRAS", "").split())
print("in", sys.prefix, sys.argv[1:], flush=True)
while os.path.exists(os.environ.get("RUN_WHILE", "")):
    time.sleep(0.02)
"""

STUB = """
import os, sys, time
os.chdir({folder!r})
print("Collecting torch>=2.11")
print("  Downloading torch-2.13.0-cp311-cp311-manylinux_2_28_x86_64.whl (526.6 MB)", flush=True)
with open("calls", "a") as calls:
    calls.write(" ".join(sys.argv[1:]) + "\\n")
while os.path.exists("hold"):
    time.sleep(0.02)
print("Installing collected packages: mpmath, torch", flush=True)
if os.path.exists("fail"):
    sys.exit(open("fail").read())
"""


class Checkout:
    """A folder with what the set-up reads, and ways to start its door."""

    def __init__(self, folder: Path, stub: bool = True) -> None:
        self.folder = folder
        self.root = folder / "checkout"
        (self.root / "bin").mkdir(parents=True)
        shutil.copy(BIN / "_environment.py", self.root / "bin")
        (self.root / "bin" / "constraints.txt").write_text("setuptools==99.0\n")
        (self.root / "pyproject.toml").write_text(PYPROJECT)
        (folder / "pip.py").write_text(STUB.format(folder=str(folder)))
        (self.root / "bin" / "door").write_text(DOOR.format(stub=str(folder / "pip.py") if stub else ""))
        self.venv = self.root / ".venv"
        self.hold = folder / "hold"

    def start(self, *arguments: str, stderr: int = subprocess.PIPE, **variables: str) -> "subprocess.Popen[str]":
        """Starts the door as a session of its own."""
        environment = {k: v for k, v in os.environ.items() if not k.startswith("HEADRACE_")}
        return subprocess.Popen(
            [sys.executable, str(self.root / "bin" / "door"), *arguments],
            env=environment | {"HEADRACE_VENV": str(self.venv)} | variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            start_new_session=True,
        )

    def run(self, *arguments: str, code: int = 0, **variables: str) -> tuple[str, str]:
        """Runs the door to its end; its stdout and stderr."""
        process = self.start(*arguments, **variables)
        out, err = process.communicate(timeout=60)
        assert process.returncode == code, err
        assert "Traceback" not in err
        return out, err

    def stamp(self) -> dict[str, object]:
        return dict(json.loads((self.venv / "headrace.json").read_text()))

    def calls(self) -> list[str]:
        """What the stand-in for pip was asked for, so far."""
        path = self.folder / "calls"
        return path.read_text().splitlines() if path.exists() else []

    def wait_for_calls(self, number: int) -> None:
        wait_until(lambda: len(self.calls()) == number)


def wait_until(condition) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def read_until(stream, text: str) -> str:
    """What the stream says up to the line that has `text`."""
    said = ""
    while text not in said:
        line = stream.readline()
        assert line, said
        said += line
    return said


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def test_first_start_makes_the_environment_and_the_second_uses_it(checkout):
    out, err = checkout.run("a.toml", "--check")
    assert out == f"in {checkout.venv} ['a.toml', '--check']\n"
    assert "making the environment .venv" in err and "environment ready" in err
    pins = f"-c {checkout.root}/bin/constraints.txt"
    assert checkout.calls() == [
        f"install --no-input --no-user {pins} setuptools",
        f"install --no-input --no-user {pins} --no-build-isolation -e {checkout.root}",
    ]
    out, err = checkout.run()
    assert out == f"in {checkout.venv} []\n"
    assert err == "headrace: using the environment .venv\n"
    assert len(checkout.calls()) == 2


def test_new_pins_are_installed_into_the_same_environment(checkout):
    checkout.run()
    (checkout.venv / "kept").touch()
    (checkout.root / "bin" / "constraints.txt").write_text("setuptools==99.1\n")
    assert "bringing the environment .venv up to date" in checkout.run()[1]
    assert (checkout.venv / "kept").exists() and len(checkout.calls()) == 4
    assert "using the environment" in checkout.run()[1]


def test_settings_of_tools_do_not_change_the_environment(checkout):
    checkout.run()
    with (checkout.root / "pyproject.toml").open("a") as file:
        file.write("line-length = 100\n")
    assert "using the environment" in checkout.run()[1]


def test_extras_are_added_and_kept(checkout):
    checkout.run()
    checkout.run(EXTRAS="test")
    assert checkout.calls()[-1].endswith(f"-e {checkout.root}[test]")
    checkout.run()
    assert len(checkout.calls()) == 4


def test_nvidia_driver_adds_cuda(checkout):
    tools = checkout.folder / "tools"
    tools.mkdir()
    (tools / "nvidia-smi").write_text("#!/bin/sh\nexit 0\n")
    (tools / "nvidia-smi").chmod(0o755)
    checkout.run(EXTRAS="test", PATH=f"{tools}:{os.environ['PATH']}")
    assert checkout.calls()[-1].endswith(f"-e {checkout.root}[cuda,test]")
    checkout.run(PATH=f"{tools}:{os.environ['PATH']}")
    assert len(checkout.calls()) == 2


def test_kill_in_the_middle_makes_the_next_start_begin_anew(checkout):
    checkout.hold.touch()
    first = checkout.start()
    checkout.wait_for_calls(1)
    (checkout.venv / "half done").touch()
    first.kill()
    first.communicate()
    second = checkout.start()
    read_until(second.stderr, "waiting: ")  # for the orphaned pip, which still writes
    checkout.hold.unlink()
    out, err = second.communicate(timeout=60)
    assert second.returncode == 0 and "making the environment" in err
    assert out.startswith(f"in {checkout.venv}")
    assert not (checkout.venv / "half done").exists()


def test_interrupt_ends_in_one_line_and_is_made_good(checkout):
    checkout.run()
    (checkout.root / "bin" / "constraints.txt").write_text("setuptools==99.1\n")
    checkout.hold.touch()
    process = checkout.start()
    checkout.wait_for_calls(3)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.splitlines()[-1] == "headrace: interrupted; the next start makes good what is half done"
    assert "Traceback" not in err
    assert checkout.stamp() == {}
    checkout.hold.unlink()
    assert "making the environment" in checkout.run()[1]


def test_of_two_starts_at_once_one_makes_and_one_waits(checkout):
    checkout.hold.touch()
    first = checkout.start()
    checkout.wait_for_calls(1)
    second = checkout.start()
    read_until(second.stderr, "waiting: another start is making the environment (log: .venv.log)")
    checkout.hold.unlink()
    for process in (first, second):
        out, _ = process.communicate(timeout=60)
        assert process.returncode == 0 and out.startswith(f"in {checkout.venv}")
    assert len(checkout.calls()) == 2


def test_packages_are_added_but_not_replaced_beneath_a_command(checkout):
    running = checkout.folder / "running"
    running.touch()
    first = checkout.start(RUN_WHILE=str(running))
    read_until(first.stdout, "in ")
    _, err = checkout.run(EXTRAS="test")
    assert "waiting" not in err and len(checkout.calls()) == 4
    (checkout.root / "bin" / "constraints.txt").write_text("setuptools==99.1\n")
    second = checkout.start()
    read_until(second.stderr, "waiting: the environment must be changed")
    assert len(checkout.calls()) == 4
    running.unlink()
    first.communicate(timeout=60)
    second.communicate(timeout=60)
    assert second.returncode == 0 and len(checkout.calls()) == 6


@pytest.mark.parametrize(
    ("output", "told"),
    [
        ("ERROR: [Errno 28] No space left on device", "free some 3 GB"),
        ("ERROR: No matching distribution found for torch==2.13.0", "bin/constraints.txt"),
        ("WARNING: Retrying after connection broken by 'x'\nERROR: No matching distribution found", "can't reach"),
        ("error: [Errno 13] Permission denied: '/x'", "HEADRACE_VENV"),
        ("ERROR: it\nERROR: did not work.", "ERROR: did not work (log"),
    ],
)
def test_failure_of_pip_is_one_line_with_the_remedy(checkout, output, told):
    (checkout.folder / "fail").write_text(output)
    _, err = checkout.run(code=2)
    last = err.splitlines()[-1]
    assert last.startswith("headrace: installing setuptools failed: ") and told in last
    assert "(log: .venv.log)" in last and output in (checkout.root / ".venv.log").read_text()
    (checkout.folder / "fail").unlink()
    assert "making the environment" in checkout.run()[1]


def test_folder_made_by_others_is_left_alone(checkout):
    checkout.venv.mkdir()
    (checkout.venv / "work").write_text("mine")
    _, err = checkout.run(code=2)
    assert "was not made by headrace; move it" in err
    assert (checkout.venv / "work").read_text() == "mine"


def test_environment_of_another_python_is_made_anew(checkout):
    checkout.run()
    stamp = checkout.stamp() | {"python": ["3", "9"]}
    (checkout.venv / "headrace.json").write_text(json.dumps(stamp))
    out, err = checkout.run()
    assert "making the environment" in err and out.startswith(f"in {checkout.venv}")


def test_moved_checkout_is_made_anew(checkout):
    checkout.run()
    checkout.root = checkout.root.rename(checkout.folder / "elsewhere")
    checkout.venv = checkout.root / ".venv"
    assert "making the environment" in checkout.run()[1]


def test_environment_that_has_headrace_is_used(checkout):
    out, err = checkout.run("x", HEADRACE_VENV="", EXTRAS="test")
    assert out == f"in {sys.prefix} ['x']\n"
    assert f"using the environment {sys.prefix}, which has the headrace of {BIN}" in err
    assert not checkout.venv.exists()


def test_environment_without_pytest_is_told_what_to_add(monkeypatch):
    monkeypatch.setattr(_environment, "TEST_MODULES", ("no_such_module",))
    assert _environment.has_headrace(())
    with pytest.raises(_environment.SetupError, match=r"not no_such_module; .* or add it: .* -e '.*\[test\]'"):
        _environment.has_headrace(("test",))


def test_progress_is_shown_on_a_terminal(checkout):
    ours, theirs = pty.openpty()
    checkout.hold.touch()
    process = checkout.start(stderr=theirs)
    os.close(theirs)
    seen = b""
    while b"downloading torch-2.13.0 (526.6 MB)" not in seen:
        seen += os.read(ours, 1024)
    checkout.hold.unlink()
    while b"environment ready" not in seen:
        seen += os.read(ours, 1024)
    process.communicate(timeout=60)
    os.close(ours)
    assert process.returncode == 0


def test_old_python_is_told_in_one_line():
    with pytest.raises(_environment.SetupError, match=r"^Python 3\.11 or newer is needed, but .* is 3\.9; .*$"):
        _environment.check_python((3, 9))
    for name in ("_environment.py", "launch", "test", "bench", "chaos"):
        ast.parse((BIN / name).read_text(), feature_version=(3, 6))


def test_missing_module_names_the_package_to_install():
    _environment.check_modules("venv")
    with pytest.raises(_environment.SetupError, match=r"no_such_module; install it .*apt install python3-venv"):
        _environment.check_modules("venv", "no_such_module")


def test_tests_run_in_parallel_unless_debugged(monkeypatch):
    started = []
    monkeypatch.setattr(pytest, "main", lambda arguments: started.append(arguments) or 5)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64))
    assert testing.test_main(["-m", "not slow"]) == 5
    assert testing.test_main(["--pdb"]) == 5
    assert started == [["-n", "8", "--dist", "worksteal", "-m", "not slow"], ["--pdb"]]


BACKEND = """
import zipfile
def build_editable(folder, config_settings=None, metadata_directory=None):
    name = "headrace-0-py3-none-any.whl"
    info = "headrace-0.dist-info/"
    with zipfile.ZipFile(folder + "/" + name, "w") as wheel:
        wheel.writestr("headrace.py", "")
        wheel.writestr(info + "METADATA", "Metadata-Version: 2.1\\nName: headrace\\nVersion: 0\\n")
        wheel.writestr(info + "WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        wheel.writestr(info + "RECORD", "")
    return name
build_wheel = build_editable
"""


@pytest.mark.slow
def test_with_the_real_pip(tmp_path):
    checkout = Checkout(tmp_path, stub=False)
    (checkout.root / "backend.py").write_text(BACKEND)
    wheel = tmp_path / "setuptools-99.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        info = "setuptools-99.0.dist-info/"
        file.writestr(info + "METADATA", "Metadata-Version: 2.1\nName: setuptools\nVersion: 99.0\n")
        file.writestr(info + "WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(info + "RECORD", "")
    pip = {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path)}
    out, _ = checkout.run(EXTRAS="test", **pip)
    assert out.startswith(f"in {checkout.venv}")
    installed = {path.name for path in checkout.venv.glob("lib/python*/site-packages/*.dist-info")}
    assert {"headrace-0.dist-info", "setuptools-99.0.dist-info"} <= installed
    assert checkout.stamp()["extras"] == ["test"]
    (checkout.root / "bin" / "constraints.txt").write_text("setuptools==99.1\n")
    _, err = checkout.run(code=2, **pip)
    assert "failed: ERROR: Cannot install setuptools" in err and "bin/constraints.txt" in err
