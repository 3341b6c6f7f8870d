"""One sandbox: started ahead, used for one run, ended.

    box = spawn(...)              bubblewrap, and in it the keeper
    await box.ready()             the keeper has said that it is
    await box.run(order)          at most once; Outcome, or SandboxFailed
    box.end()                     at any time: the namespace and all in it are killed

What goes in and comes out are memory files and pipes whose descriptors are handed over the socket: input and output are
not pumped, a flood ends at the size limit of a file, and what was written before a kill is there after it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from . import bubble, cgroup, seccomp
from .bubble import Isolation
from .cgroup import Cgroup
from .keeper import PATIENCE
from .order import Order, Outcome, SandboxFailed

START_S = 30.0
"""Longest start, on a machine that may be busy."""

SLACK_S = 10.0
"""How much later than at its last moment a keeper may report before the sandbox is taken for broken."""

END_S = 10.0
"""Longest wait for a killed process to be gone."""

SPARE_BYTES = 96 << 20
"""What a control group allows beyond the run's own memory, its streams and the work folder: the keeper and bwrap."""

SPARE_PROCESSES = 8

MAX_REPORT = 1 << 16
MAX_STDERR = 1 << 16
"""So much of it is read, from the end."""


class Box:
    """A running sandbox."""

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        channel: socket.socket,
        complaints: int,
        folder: str,
        group: Cgroup | None,
        disk_bytes: int,
    ) -> None:
        self._process, self._channel, self._complaints, self._folder = process, channel, complaints, folder
        self._group, self._disk_bytes = group, disk_bytes
        self._ended = self._reading = False
        self._inner = -1

    async def ready(self) -> None:
        """Waits until it is. Raises SandboxFailed if it does not come up."""
        try:
            async with asyncio.timeout(START_S):
                word = await self._read_line()
        except TimeoutError:
            raise SandboxFailed(f"a sandbox was not ready within {START_S:g} s") from None
        if word != b"ready":
            raise SandboxFailed(f"a sandbox did not start: {bubble.explain(self._complaint())}")
        child, self._inner = _child_of(self._process.pid)
        if self._group is not None:
            try:
                self._group.admit([self._process.pid, child])  # Nothing else is in there before there is an order.
            except OSError as error:
                raise SandboxFailed(f"a sandbox could not be put into its control group: {error}") from None

    async def run(
        self, order: Order, *, stdin: bytes | int = b"", stdout: int | None = None, more: Sequence[int] = ()
    ) -> Outcome:
        """Runs it, and ends the sandbox. Raises SandboxFailed.

        Descriptors may stand in place of `stdin` and of the stdout that is brought back, and `more` become 3, 4 ... of
        the program; they are closed here once they are handed over.
        """
        given = [fd for fd in (stdin, stdout, *more) if isinstance(fd, int)]
        with contextlib.ExitStack() as stack:
            stack.callback(self.end)
            handing = stack.enter_context(contextlib.ExitStack())
            for fd in given:
                handing.callback(os.close, fd)
            first = stdin if isinstance(stdin, int) else _file(stack, stdin)
            taken, wrong, collected = _file(stack), _file(stack), _file(stack)
            last = taken if stdout is None else stdout
            fds = [_file(stack, _written(order)), collected, first, last, wrong, *more]
            try:
                self._limit(order)
                socket.send_fds(self._channel, [b"r"], fds)
                handing.close()
                async with asyncio.timeout(PATIENCE * order.limits.wall_s + SLACK_S):
                    report = json.loads(await self._read_line() or b"{}")
            except TimeoutError:
                raise SandboxFailed("the sandbox does not answer") from None
            except (OSError, ValueError) as error:
                raise SandboxFailed(f"the sandbox broke: {error}") from None
            if "code" not in report:
                raise SandboxFailed(str(report.get("failed", "the sandbox died; was it short of memory?")))
            brought = _read(collected, order.limits.output_bytes + 1)
            return Outcome(
                **report,
                stdout=_read(taken, order.limits.output_bytes),
                stderr=_read(wrong, MAX_STDERR, from_end=True),
                collected=brought[1:] if brought else None,
            )

    def end(self) -> None:
        """Kills it, and all in it. May be called twice."""
        if self._ended:
            return
        self._ended = True
        with contextlib.suppress(OSError):
            self._channel.shutdown(socket.SHUT_RDWR)  # Whoever reads it sees its end.
        if not self._reading:
            self._channel.close()
        os.close(self._complaints)
        with contextlib.suppress(ProcessLookupError):
            if self._inner >= 0:  # Else it is coming up, finds its socket at an end, and ends.
                signal.pidfd_send_signal(self._inner, signal.SIGKILL)  # bwrap ends once all of the namespace has.

    def reap(self) -> None:
        """Waits, within END_S, until all its processes are gone; blocks."""
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._inner >= 0:
            os.close(self._inner)
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)
        if self._group is not None:
            self._group.remove()

    @property
    def pid(self) -> int:
        """Process number of bubblewrap, outside."""
        return self._process.pid

    def _limit(self, order: Order) -> None:
        if self._group is not None:
            limits = order.limits
            streams = 3 * limits.output_bytes
            self._group.limit(
                memory_bytes=limits.memory_bytes + streams + self._disk_bytes + SPARE_BYTES,
                processes=limits.processes + SPARE_PROCESSES,
            )

    async def _read_line(self) -> bytes:
        """The next line of the keeper, without its end; b"" if the keeper has gone."""
        loop, line = asyncio.get_running_loop(), b""
        self._reading = True
        try:
            while not line.endswith(b"\n"):
                part = await loop.sock_recv(self._channel, 4096)
                line += part
                if not part or len(line) > MAX_REPORT:
                    return b""
        finally:
            self._reading = False
            if self._ended:
                self._channel.close()
        return line[:-1]

    def _complaint(self) -> str:
        return "" if self._ended else _read(self._complaints, 4096, from_end=True).decode(errors="replace")


def spawn(isolation: Isolation, whole_usr: bool) -> Box:
    """Starts one; blocks for some milliseconds. Raises SandboxFailed.

    Not with `--die-with-parent`: bwrap 0.8, killed while it starts, leaves a process that waits for it forever. The
    keeper sees its socket close instead, however this process ends.
    """
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    complaints = os.memfd_create("complaints", os.MFD_CLOEXEC)
    folder, group = "", None
    try:
        if not isolation.unsafe and (parents := cgroup.parents()) is not None:
            group = Cgroup(parents)
        with theirs, contextlib.ExitStack() as stack:
            python = bubble.interpreter(isolation.python).path
            if isolation.unsafe:
                folder = tempfile.mkdtemp(prefix="headrace-unsafe-")
                command, fds, who = bubble.keeper_command(python, theirs.fileno(), folder), [theirs.fileno()], {}
            else:
                filter_fd = _file(stack, seccomp.program()) if seccomp.supported() else -1
                outer = bubble.command(isolation, whole_usr=whole_usr, filter_fd=filter_fd)
                command = [*outer, *bubble.keeper_command(python, theirs.fileno(), bubble.WORK)]
                fds, who = [fd for fd in (theirs.fileno(), filter_fd) if fd >= 0], bubble.identity()
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=complaints, stderr=complaints, pass_fds=fds, cwd="/",
                env=dict(bubble.environment()), start_new_session=True, **who,
            )  # fmt: skip
    except BaseException as error:
        ours.close()
        os.close(complaints)
        if group is not None:
            group.remove()
        if isinstance(error, OSError):
            raise SandboxFailed(f"a sandbox could not be started: {error}") from None
        raise
    return Box(process, ours, complaints, folder, group, isolation.disk_bytes)


def _child_of(pid: int) -> tuple[int, int]:
    """The only child of `pid`, and a pidfd of it; -1 if there is none to be seen."""
    try:
        child = int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])
        return child, os.pidfd_open(child)
    except (OSError, IndexError):
        return -1, -1


def _written(order: Order) -> bytes:
    """As the keeper reads it: a JSON line, then the files."""
    head = {
        "argv": list(order.argv),
        "environment": dict(order.environment),
        "files": [[name, len(content), mode] for name, (content, mode) in order.files.items()],
        "limits": asdict(order.limits),
        "collect": order.collect,
    }
    return json.dumps(head).encode() + b"\n" + b"".join(content for content, _ in order.files.values())


def _file(stack: contextlib.ExitStack, content: bytes = b"") -> int:
    """A memory file, to be read from its beginning."""
    fd = os.memfd_create("headrace", os.MFD_CLOEXEC)
    stack.callback(os.close, fd)
    view = memoryview(content)
    while view:
        view = view[os.write(fd, view) :]
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def _read(fd: int, limit: int, *, from_end: bool = False) -> bytes:
    size = os.fstat(fd).st_size
    start = max(0, size - limit) if from_end else 0
    return os.pread(fd, limit, start)
