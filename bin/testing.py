"""Runs the test suite with pytest, in parallel. Knows nothing of what is tested.

The tests are in the checkout, beside this folder; an installed wheel has none.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MAX_WORKERS = 8


def test_main(arguments: Sequence[str]) -> int:
    """Runs pytest on the checkout, `arguments` after our own, and returns its exit code; paths count from its root.

    Returns 2 with one message if there is no checkout.
    """
    if not (ROOT / "tests" / "conftest.py").exists():
        print(f"headrace: no tests beside {ROOT}: they come with the source tree, not with the wheel", file=sys.stderr)
        return 2
    import pytest

    # Before any process or library starts: one thread each, and no folder of ours as somebody else's module.
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
    os.environ["PYTHONSAFEPATH"] = "1"
    os.chdir(ROOT)
    workers = max(2, min(len(os.sched_getaffinity(0)), MAX_WORKERS))
    debugging = {"--pdb", "--trace"} & set(arguments)
    spread = [] if debugging else ["-n", str(workers), "--dist", "worksteal"]
    return int(pytest.main([*spread, *arguments]))
