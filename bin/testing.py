"""Runs the test suite with pytest, in parallel. Knows nothing of what is tested.

The tests are in the checkout, beside this folder; an installed wheel has none.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MAX_WORKERS = 8
INSTALL_S = 120
"""Longest installation of bubblewrap."""


def test_main(arguments: Sequence[str]) -> int:
    """Runs pytest on the checkout, `arguments` after our own, and returns its exit code; paths count from its root.

    Returns 2 with one message if there is no checkout.
    """
    if not (ROOT / "tests" / "conftest.py").exists():
        print(f"headrace: no tests beside {ROOT}: they come with the source tree, not with the wheel", file=sys.stderr)
        return 2
    import pytest

    if not {"--version", "-h", "--help"} & set(arguments):
        get_bubblewrap()
    # Before any process or library starts: one thread each, and no folder of ours as somebody else's module.
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
    os.environ["PYTHONSAFEPATH"] = "1"
    os.chdir(ROOT)
    workers = max(2, min(len(os.sched_getaffinity(0)), MAX_WORKERS))
    debugging = {"--pdb", "--trace"} & set(arguments)
    spread = [] if debugging else ["-n", str(workers), "--dist", "worksteal"]
    return int(pytest.main([*spread, *arguments]))


def get_bubblewrap(tried: Path = Path(sys.prefix) / ".bubblewrap-tried") -> None:
    """Installs bubblewrap, which the tests of the code sandbox need, where that is one command and this is root.

    Tried once in an environment: `tried` says so. Whatever comes of it, the tests find it or skip with the reason.
    """
    apt = shutil.which("apt-get")
    if shutil.which("bwrap") or apt is None or os.geteuid() != 0 or tried.exists():
        return
    print("headrace: installing bubblewrap, for the tests of the code sandbox", file=sys.stderr)
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    try:
        tried.touch()
        for command in ("update", "install"):
            what = ["-y", "--no-install-recommends", "bubblewrap"] if command == "install" else []
            subprocess.run(
                [apt, "-q", command, *what],
                env=environment, capture_output=True, timeout=INSTALL_S, stdin=subprocess.DEVNULL, check=True,
            )  # fmt: skip
    except (OSError, subprocess.SubprocessError) as error:
        print(f"headrace: no bubblewrap ({error}); the tests of the code sandbox are skipped", file=sys.stderr)
