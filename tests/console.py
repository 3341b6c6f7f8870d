"""A console of bin/attach as a person has it: a process at the end of a pseudo-terminal. Holds no tests."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self

ATTACH = Path(__file__).parents[1] / "bin" / "attach"

_ESCAPES = re.compile(rb"\x1b\[[0-9;?]*[A-Za-z]|\x1b[=>]|\x1b\][^\x07]*\x07|\r")


class Console:
    """A running `bin/attach ARGUMENTS`. Use as a context manager; leaving it kills what is left."""

    def __init__(self, arguments: Sequence[str], state: Path) -> None:
        """`state`: folder for its history."""
        master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 150, 0, 0))
        env = os.environ | {
            "XDG_STATE_HOME": str(state), "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1", "PYTHONSAFEPATH": "1",
        }  # fmt: skip
        self.master = master
        self.began = time.perf_counter()
        self.process = subprocess.Popen(
            [sys.executable, str(ATTACH), *arguments], stdin=slave, stdout=slave, stderr=slave, env=env,
            start_new_session=True, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )  # fmt: skip
        os.close(slave)
        self.seen = b""

    def write(self, text: str) -> None:
        """Types."""
        self.seen = b""
        os.write(self.master, text.encode())

    def read_until(self, *words: str, seconds: float = 30.0) -> float:
        """Waits until all words have appeared since the last `write`, and the last of them is at the end if it is a
        prompt; returns when (time.perf_counter)."""
        end = time.perf_counter() + seconds
        while not all(word.encode() in self.text for word in words) or (
            words[-1].endswith(">>>") and not self.text.rstrip().endswith(words[-1].encode())
        ):
            left = end - time.perf_counter()
            if left < 0 or not select.select([self.master], [], [], left)[0]:
                raise TimeoutError(f"{words} did not appear within {seconds:g} s in: {self.text!r}")
            try:
                self.seen += os.read(self.master, 1 << 16)
            except OSError:
                raise EOFError(f"it ended, and {words} did not appear in: {self.text!r}") from None
        return time.perf_counter()

    @property
    def text(self) -> bytes:
        """What was shown since the last `write`, without colours and cursor movements."""
        return _ESCAPES.sub(b"", self.seen)

    def drain(self) -> None:
        """Reads what is there, so that the console never waits for a reader."""
        while select.select([self.master], [], [], 0)[0]:
            self.seen = os.read(self.master, 1 << 16)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        os.close(self.master)
