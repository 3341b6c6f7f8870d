"""bin/test gets bubblewrap where it can, once, and says what it does; the package manager is a script of ours."""

import os
import shutil
from pathlib import Path

import pytest

from headrace import testing


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A PATH with apt-get alone, which writes down what it is asked, and fails if a file `broken` is there."""
    apt = tmp_path / "apt-get"
    apt.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n[ ! -e {tmp_path}/broken ]\n')
    apt.chmod(0o755)
    shutil.copy("/bin/sh", tmp_path / "sh")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    return tmp_path


def asked(folder: Path) -> list[str]:
    file = folder / "asked"
    return file.read_text().splitlines() if file.exists() else []


def test_it_is_installed_once(machine, capsys):
    for _ in range(2):
        testing.get_bubblewrap(machine / "tried")
    assert asked(machine) == ["-q update", "-q install -y --no-install-recommends bubblewrap"]
    assert capsys.readouterr().err.count("installing bubblewrap") == 1


def test_a_failure_is_said_and_not_tried_again(machine, capsys):
    (machine / "broken").touch()
    for _ in range(2):
        testing.get_bubblewrap(machine / "tried")
    assert asked(machine) == ["-q update"]
    assert "no bubblewrap" in capsys.readouterr().err


def test_nothing_is_done_where_it_is_there_or_this_is_not_root(machine, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    testing.get_bubblewrap(machine / "tried")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    (machine / "bwrap").write_text("#!/bin/sh\n")
    (machine / "bwrap").chmod(0o755)
    testing.get_bubblewrap(machine / "tried")
    assert asked(machine) == []
