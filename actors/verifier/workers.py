"""A pool of processes that judge, each behind a guard that survives what it judges (worker.py).

    run(request) -> report        waits for a free worker; starts one if there are fewer than `size`
    close()                       ask, bounded wait, kill; what is under way is given up

Knows nothing of rules, verdicts or retries.
"""

from __future__ import annotations

import asyncio
import os
import signal
import struct
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Annotated, Any

from annotated_types import Ge, Gt

from ...runtime.codec import wire
from .worker import Report, pack, unpack

START_S = 60.0
"""Longest start of a worker: it imports the rule, on a machine that may be busy."""

SLACK_S = 5.0
"""How much later than the wall deadline a guard may report before it is taken for dead itself."""

STOP_S = 1.0
"""Longest polite stop, before the kill."""

MAX_CASES = 5000
"""After so many cases a worker's child is replaced: libraries keep caches."""

_PASSED_ON = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "TMPDIR")


@wire
@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one case may use."""

    cpu_s: Annotated[float, Gt(0)] = 5.0
    """Processor seconds, of all threads."""
    wall_s: Annotated[float, Gt(0)] = 30.0
    """Seconds on the clock; well above `cpu_s`, since a busy machine must not decide verdicts."""
    memory_bytes: Annotated[int, Ge(0)] = 2 << 30
    """Address space of the process, its program included; 0 = no limit."""


class WorkerFailed(Exception):
    """A worker could not be started, or is gone with its guard. `retryable` says whether another one may do better."""

    def __init__(self, text: str, *, retryable: bool) -> None:
        super().__init__(text)
        self.retryable = retryable


class WorkerPool:
    """At most `size` workers that make their judge by tasks.py: `task(**arguments)`."""

    def __init__(self, task: str, arguments: Mapping[str, Any], *, size: int, limits: Limits, harden: bool) -> None:
        self._spec: dict[str, Any] = {
            "judge": f"{__package__}.tasks:{task}",
            "arguments": dict(arguments),
            "harden": harden,
            "max_cases": MAX_CASES,
            **asdict(limits),
        }
        self._slots = asyncio.Semaphore(size)
        self._idle: list[_Worker] = []
        self._busy: set[_Worker] = set()
        self._ending: set[asyncio.Task[None]] = set()
        self._closed = False

    async def run(self, request: Any) -> Report:
        """The report of a worker on `request`. Raises WorkerFailed."""
        async with self._slots:
            if self._closed:
                raise WorkerFailed("the verifier is shutting down", retryable=False)
            worker = self._idle.pop() if self._idle else _Worker(self._spec)
            self._busy.add(worker)
            healthy = False
            try:
                report = await worker.ask(pack(request))
                healthy = not self._closed
                return report
            finally:
                self._busy.remove(worker)
                if healthy:
                    self._idle.append(worker)
                else:
                    ending = asyncio.create_task(worker.end())
                    self._ending.add(ending)
                    ending.add_done_callback(self._ending.discard)

    async def close(self) -> None:
        """Ends all workers, within about STOP_S. May be called twice."""
        self._closed = True
        idle, self._idle = self._idle, []
        await asyncio.gather(*(worker.end() for worker in (*idle, *self._busy)), *self._ending)

    @property
    def pids(self) -> list[int]:
        """Process ids of the idle workers' guards."""
        return [worker.process.pid for worker in self._idle if worker.process is not None]


class _Worker:
    """One guard and the pipes to it."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self._spec = spec
        self.process: asyncio.subprocess.Process | None = None

    async def ask(self, request: bytes) -> Report:
        if self.process is None:
            await self._start()
        async with asyncio.timeout(self._spec["wall_s"] + SLACK_S) as limit:
            with suppress(TimeoutError):
                return await self._exchange(request)
        assert limit.expired()
        raise WorkerFailed("the worker's guard does not answer", retryable=True)

    async def _start(self) -> None:
        spec = self._spec
        command = (sys.executable, "-P", "-c", f"from {__package__}.worker import main; main()")
        env = {name: os.environ[name] for name in _PASSED_ON if name in os.environ} if spec["harden"] else os.environ
        self.process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            start_new_session=True,
            env={**env, "PYTHONSAFEPATH": "1"},
        )
        try:
            async with asyncio.timeout(START_S):
                hello = await self._exchange(pack({**spec, "parent": os.getpid(), "path": sys.path}))
        except TimeoutError:
            raise WorkerFailed(f"a worker was not ready within {START_S:g} s", retryable=True) from None
        if "unready" in hello:
            raise WorkerFailed(hello["unready"], retryable=False)

    async def _exchange(self, frame: bytes) -> Report:
        assert self.process is not None and self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(frame)
            await self.process.stdin.drain()
            (length,) = struct.unpack("<I", await self.process.stdout.readexactly(4))
            report: Report = unpack(await self.process.stdout.readexactly(length))
            return report
        except (ConnectionError, asyncio.IncompleteReadError):
            raise WorkerFailed("the worker died", retryable=True) from None

    async def end(self) -> None:
        """Ask, bounded wait, kill."""
        if self.process is None:
            return
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            async with asyncio.timeout(STOP_S):
                await self.process.wait()
        except TimeoutError:
            pass
        finally:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
        await self.process.wait()
