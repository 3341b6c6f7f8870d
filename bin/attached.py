"""`bin/launch --attach`: the run as a process of its own, and a prompt into it on this terminal.

    bin/launch cluster.toml --attach --> the run, its lines in runs/NAME.log      Ctrl-D --> the run goes on
                                    '--> bin/attach, once the run can be reached

Knows nothing of what the run does.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from .attach import attach_main, is_living

UP_S = 120.0
"""How long a run may take until it can be reached."""

LOOK_S = 0.05
LAST_LINES = 20


def launch_attached(run: Path, arguments: Sequence[str]) -> int:
    """Starts `bin/launch` with `arguments`, which have been checked, for the run at `run`; returns attach's exit code,
    or the run's if it ends before it can be reached."""
    log = run.with_name(f"{run.name}.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        # In a session of its own: Ctrl-C at the prompt is not for the run.
        child = subprocess.Popen(
            [sys.executable, "-P", "-m", "headrace", "launch", *arguments, "--plain"],
            stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
        )  # fmt: skip
    deadline = time.monotonic() + UP_S
    while child.poll() is None and not is_living(run) and time.monotonic() < deadline:
        time.sleep(LOOK_S)
    if child.poll() is not None:
        print("".join(log.read_text().splitlines(keepends=True)[-LAST_LINES:]), end="", file=sys.stderr)
        return int(child.returncode)
    print(f"the run is process {child.pid}; its lines are in {log}")
    code = attach_main([str(run)])
    if child.poll() is None:
        print(f"the run goes on; come back with: bin/attach {run}; end it with: kill -INT {child.pid}")
    return code
