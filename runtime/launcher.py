"""Starts node processes on this host and reports their exit. Knows nothing of actors or messages.

    cold: exec of a new interpreter, 0.2 s, for what sets its own environment        \\  spec on standard input,
    warm: fork of the zygote, some milliseconds                                      /  output to the run's logs

A node has a session of its own, so that Ctrl-C at the terminal reaches the launcher only, and a process group, which is
killed with it. It dies with its launcher: see process.py and zygote.py. Exits are seen by pidfd, in milliseconds.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

from .errors import LaunchError, ZygoteGone
from .exits import OOM_READ_S, Exit, OomKills, exit_of
from .zygote import Zygote, die_with_parent, reap_group

LOG_TAIL_BYTES = 2000

ORDER_S = 20.0
"""Time that the zygote may take to fork, its own start included."""

KILL_S = 2.0
"""Time that the kernel may take to end a process that was killed."""


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
    start: Literal["auto", "warm", "cold"] = "auto"
    """warm: a fork of a process that has the imports, in milliseconds; its numeric libraries have one thread. cold: a
    new interpreter, for settings that are read when it or a library starts. auto: cold if there is an `env`."""
    hang_s: float | None = 30.0
    """Seconds for which its loop may be blocked; then it is killed and counts as hung. None: for ever."""

    @property
    def warm(self) -> bool:
        """Whether it is forked."""
        return self.start == "warm" or (self.start == "auto" and not self.env)


class NodeProcess:
    """A started process, a child of this one. `exited` is done when it has ended."""

    def __init__(self, pid: int, log: Path, reap: Callable[[], int], oom_kills: OomKills) -> None:
        self.pid = pid
        self.log = log
        self._reap = reap
        self._oom_kills = oom_kills
        self._verdict: Exit | None = None
        self._killed = False
        loop = asyncio.get_running_loop()
        self.exited: asyncio.Future[Exit] = loop.create_future()
        self._pidfd = os.pidfd_open(pid)
        loop.add_reader(self._pidfd, self._on_exit)

    def kill(self, number: signal.Signals = signal.SIGKILL, *, verdict: Exit | None = None) -> None:
        """Signals the whole process group; does nothing once it has ended. `verdict`: why, if that says more than the
        signal."""
        if self.exited.done():
            return
        self._killed = True
        self._verdict = verdict or self._verdict
        with suppress(ProcessLookupError):
            os.killpg(self.pid, number)
        with suppress(ProcessLookupError):  # It may not have a group yet.
            signal.pidfd_send_signal(self._pidfd, number)

    def log_tail(self) -> str:
        """The end of its output."""
        with self.log.open("rb") as file:
            file.seek(max(0, self.log.stat().st_size - LOG_TAIL_BYTES))
            return file.read().decode("utf-8", "replace").strip()

    def _on_exit(self) -> None:
        asyncio.get_running_loop().remove_reader(self._pidfd)
        os.close(self._pidfd)
        code = self._reap()
        # What the node had started must not outlive it.
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        reap_group(self.pid)
        end = exit_of(code, out_of_memory=not self._killed and self._oom_kills.rose())
        if self._verdict is not None and code == -signal.SIGKILL:
            end = self._verdict
        if not self.exited.done():
            self.exited.set_result(end)


class Launcher:
    """Starts the nodes of one system, any number at a time."""

    def __init__(self, folder: Path, logs: Path, beats: int) -> None:
        """`folder`: of the sockets; `logs`: where output goes; `beats`: file of the liveness words."""
        self.oom_kills = OomKills()
        self._logs = logs
        self._beats = beats
        self._zygote = Zygote(folder, logs / "zygote.log")
        self._starting: set[asyncio.Task[NodeProcess]] = set()
        self._living: set[NodeProcess] = set()
        self._refresh()

    @property
    def zygote_pid(self) -> int:
        """Its process id; 0 while there is none."""
        return self._zygote.pid

    async def start(self, spec: NodeSpec, stdin: bytes) -> NodeProcess:
        """Starts `headrace.runtime.process` in a process of its own with `stdin` as its spec. Raises LaunchError.

        Cancelled, it leaves nothing.
        """
        work = asyncio.get_running_loop().create_task(self._start(spec, stdin), name=f"start of {spec.name}")
        self._starting.add(work)
        work.add_done_callback(self._starting.discard)
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            work.add_done_callback(_discard)
            raise

    async def close(self) -> None:
        """Ends the zygote, and kills the nodes that have not ended."""
        self._timer.cancel()
        await self._zygote.close()
        while self._starting:
            await asyncio.wait(self._starting)
        for process in self._living:
            process.kill()
        if self._living:
            await asyncio.wait([process.exited for process in self._living], timeout=KILL_S)

    def _refresh(self) -> None:
        self.oom_kills.refresh()
        self._timer = asyncio.get_running_loop().call_later(OOM_READ_S, self._refresh)

    async def _start(self, spec: NodeSpec, stdin: bytes) -> NodeProcess:
        log = self._logs / f"{spec.name}.log"
        source = os.memfd_create("headrace-spec")
        try:
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        except OSError as error:
            os.close(source)
            raise LaunchError(f"node {spec.name}: can't write its log {log}: {error.strerror}") from None
        try:
            while stdin:
                stdin = stdin[os.write(source, stdin) :]
            os.lseek(source, 0, os.SEEK_SET)
            process = await self._fork(log, source, output) if spec.warm else None
            if process is None:
                process = self._exec(spec, log, source, output)
        finally:
            os.close(source)
            os.close(output)
        self._living.add(process)
        process.exited.add_done_callback(lambda _: self._on_end(process))
        return process

    def _on_end(self, process: NodeProcess) -> None:
        self._living.discard(process)
        self._zygote.forget(process.pid)

    async def _fork(self, log: Path, source: int, output: int) -> NodeProcess | None:
        """None if there is no zygote to be had."""
        for _ in range(2):
            try:
                order = self._zygote.fork(source, output, self._beats)
                await asyncio.wait([order], timeout=ORDER_S)
                if not order.done():
                    self._zygote.kill()
                pid = order.result()
            except ZygoteGone:
                continue
            with suppress(ProcessLookupError):  # It was killed, and somebody else took its exit code.
                return NodeProcess(pid, log, partial(_wait, pid), self.oom_kills)
        return None

    def _exec(self, spec: NodeSpec, log: Path, source: int, output: int) -> NodeProcess:
        package = __package__ or "headrace.runtime"
        code = f"{die_with_parent(signal.SIGKILL)}; from {package}.process import run; run({self._beats})"
        command = [sys.executable, "-P", "-c", code]
        env = {**os.environ, "PYTHONSAFEPATH": "1", **spec.env}
        try:
            popen = subprocess.Popen(
                command, stdin=source, stdout=output, stderr=output, env=env, start_new_session=True,
                pass_fds=(self._beats,),
            )  # fmt: skip
        except OSError as error:
            raise LaunchError(f"node {spec.name}: can't start {' '.join(command)}: {error}") from None
        self._zygote.watch(popen.pid)
        # Besides its own use, it watches over the groups of all nodes. Its start delays nobody.
        with suppress(ZygoteGone):
            self._zygote.start()
        return NodeProcess(popen.pid, log, popen.wait, self.oom_kills)


def _wait(pid: int) -> int:
    try:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    except ChildProcessError:
        return 0  # This program ignores SIGCHLD, or waits for children that are not its own.


def _discard(work: asyncio.Task[NodeProcess]) -> None:
    if not work.cancelled() and work.exception() is None:
        work.result().kill()
