"""The Python stacks of all threads: of this process, and of another one that answers no more.

Another process is asked by a signal whose handler is C code: it writes to its log even while Python runs nothing there,
because a loop is blocked or a thread never lets go of the interpreter. Knows nothing of nodes.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

DUMP_SIGNAL = signal.SIGRTMIN + 8
"""Neither SIGUSR1 nor SIGUSR2: programs use those."""

MAX_STACK_BYTES = 32 * 1024
DUMP_S = 0.25
"""Time that a process gets to write its stacks."""

_STATES = {
    "T": "stopped by a signal", "t": "stopped by a debugger", "D": "in a system call that can't be interrupted",
    "Z": "ended", "X": "ended",
}  # fmt: skip


def enable_dump() -> None:
    """Lets others see the stacks of this process, in its standard error."""
    faulthandler.register(DUMP_SIGNAL, file=os.dup(2), all_threads=True, chain=False)


def dump(pid: int, log: Path) -> str:
    """The stacks of a child process that has called `enable_dump`, whose standard error is `log`. Blocks for up to
    DUMP_S. If there are none: why, in brackets."""
    state = state_of(pid)
    if state in _STATES:
        return f"[no stacks: the process is {_STATES[state]}]"
    begin = written = log.stat().st_size
    try:
        os.kill(pid, DUMP_SIGNAL)
    except ProcessLookupError:
        return "[no stacks: the process has ended]"
    end = time.monotonic() + DUMP_S
    while time.monotonic() < end:
        time.sleep(0.003)
        size = log.stat().st_size
        if size == written > begin:
            break
        written = size
    with log.open("rb") as file:
        file.seek(begin)
        text = file.read(MAX_STACK_BYTES).decode("utf-8", "replace").strip()
    return text or f"[no stacks: the process wrote none within {DUMP_S:g} s]"


def state_of(pid: int) -> str:
    """The kernel's letter for what a process does: R running, S sleeping, T stopped ...; X if there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "X"


def own_stacks() -> str:
    """The stacks of all threads of this process, by name, the main thread first."""
    frames, names = sys._current_frames(), {thread.ident: thread.name for thread in threading.enumerate()}
    main = threading.main_thread().ident
    parts = []
    for ident in sorted(frames, key=lambda ident: ident != main):
        lines = "".join(traceback.format_stack(frames[ident]))
        parts.append(f"Thread {names.get(ident, ident)}:\n{lines}")
    return "\n".join(parts)[:MAX_STACK_BYTES]
