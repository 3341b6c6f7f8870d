"""Starts node processes on this host and reports their exit. Knows nothing of actors or messages.

A node gets its spec on standard input, an own session (so that Ctrl-C at the terminal reaches the launcher only), and
its output goes to the run's logs. It dies with its launcher: see process.py. Exits are seen by pidfd, in milliseconds.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from .errors import LaunchError
from .exits import Exit

LOG_TAIL_BYTES = 2000


@dataclass(frozen=True, kw_only=True)
class NodeSpec:
    """One node process."""

    name: str
    env: dict[str, str] = field(default_factory=dict)
    """Added to the launcher's environment."""
    transport: Literal["ipc", "tcp"] = "ipc"
    """ipc: on the root's host only. tcp: encrypted, and watched by heartbeats as a node on another host is."""
    address: str = "127.0.0.1:0"
    """Host and port where a node on tcp can be reached; port 0 for any."""


class NodeProcess:
    """A started process. `exited` is done when it has ended, with how."""

    def __init__(self, popen: subprocess.Popen[bytes], log: Path) -> None:
        self._popen = popen
        self.pid = popen.pid
        self.log = log
        loop = asyncio.get_running_loop()
        self.exited: asyncio.Future[Exit] = loop.create_future()
        self._pidfd = os.pidfd_open(popen.pid)
        loop.add_reader(self._pidfd, self._on_exit)

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        """Signals the whole process group; does nothing once it has ended."""
        if not self.exited.done():
            try:
                os.killpg(self.pid, number)
            except ProcessLookupError:
                return

    def log_tail(self) -> str:
        """The end of its output."""
        with self.log.open("rb") as file:
            file.seek(max(0, self.log.stat().st_size - LOG_TAIL_BYTES))
            return file.read().decode("utf-8", "replace").strip()

    def _on_exit(self) -> None:
        asyncio.get_running_loop().remove_reader(self._pidfd)
        os.close(self._pidfd)
        code = self._popen.wait()
        # What the node had started must not outlive it.
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        if self.exited.done():
            return
        if code < 0:
            exit = Exit(kind="signal", detail=f"killed by {signal.Signals(-code).name}", code=-code)
        else:
            exit = Exit(kind="exit_code", detail=f"exit code {code}", code=code)
        self.exited.set_result(exit)


def start_process(spec: NodeSpec, stdin: bytes, log: Path) -> NodeProcess:
    """Starts `headrace.runtime.process.main` in a process of its own with `stdin` as its spec. Raises LaunchError."""
    package = __package__ or "headrace.runtime"
    command = [sys.executable, "-P", "-c", f"from {package}.process import main; main()"]
    env = {**os.environ, "PYTHONSAFEPATH": "1", **spec.env}
    try:
        with log.open("ab") as output:
            popen = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=output, stderr=output, env=env, start_new_session=True
            )
    except OSError as error:
        raise LaunchError(f"node {spec.name}: can't start {' '.join(command)}: {error}") from None
    assert popen.stdin is not None
    try:
        popen.stdin.write(stdin)
        popen.stdin.close()
    except BrokenPipeError:
        pass  # It is gone already; its exit is reported as any other.
    return NodeProcess(popen, log)
