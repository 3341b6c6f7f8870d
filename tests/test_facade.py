"""`import headrace`: light, and every public name is the runtime's, or that of a cluster inside a program."""

import subprocess
import sys

import pytest

import headrace
import headrace.cluster
import headrace.runtime


@pytest.mark.parametrize("name", headrace.__all__)
def test_names_are_those_of_the_runtime_and_of_cluster(name: str) -> None:
    home = headrace.runtime if hasattr(headrace.runtime, name) else headrace.cluster
    assert getattr(headrace, name) is getattr(home, name)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Akter'"):
        _ = headrace.Akter


def test_importing_the_package_loads_nothing_else() -> None:
    code = "import sys, headrace; print(sorted(m for m in sys.modules if m.startswith(('headrace.', 'torch', 'zmq'))))"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
