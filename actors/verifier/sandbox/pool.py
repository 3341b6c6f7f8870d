"""Sandboxes that are started ahead, each used for one run, replaced in the background.

    await pool.start()            raises SandboxUnavailable: nothing is ever run without a sandbox
    await pool.run(order, ...)    Outcome, or SandboxFailed
    await pool.close()            kills everything, within a bound

Bounded by its users: a sandbox is warm, or belongs to a run. One start is under way at a time, two where runs wait.
Knows nothing of what is run.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor

from . import bubble, cgroup, seccomp
from .box import END_S, START_S, Box, spawn
from .bubble import Isolation, SandboxUnavailable
from .order import Order, Outcome, RunLimits, SandboxFailed

PROBE_LIMITS = RunLimits(cpu_s=5.0, wall_s=20.0)
CLOSED = "the verifier is shutting down"
PAUSE_S = 0.5
"""After a start that failed, so that a machine in trouble is not kept busy with more of them."""


class SandboxPool:
    """Keeps `warm` sandboxes ready."""

    def __init__(self, isolation: Isolation, *, warm: int) -> None:
        self._isolation, self._warm = isolation, warm
        self._ready: asyncio.Queue[Box | SandboxFailed] = asyncio.Queue()
        self._lacking = asyncio.Event()
        self._waiting = 0
        self._making: set[asyncio.Future[Box]] = set()
        self._boxes: set[Box] = set()
        self._ending: set[asyncio.Future[None]] = set()
        self._starters: list[asyncio.Task[None]] = []
        self._closed = False

    async def start(self) -> None:
        """Proves that a program can be run, and begins to keep sandboxes ready. Raises SandboxUnavailable."""
        self._spawner = ThreadPoolExecutor(2, thread_name_prefix="sandbox")
        self._reaper = ThreadPoolExecutor(4, thread_name_prefix="sandbox-end")
        try:
            python = await asyncio.to_thread(bubble.interpreter, self._isolation.python)
            self.python = python.path
            box = await self._begin()
            argv = [self.python, "-I", "-S", "-c", "import os; print(os.getpid() > 1)"]
            try:
                outcome = await box.run(Order(argv=argv, limits=PROBE_LIMITS))
            finally:
                self._end(box)
            if outcome.stdout != b"True\n":
                raise SandboxFailed(
                    f"a trial run ended with {outcome.code}: {outcome.stderr[-300:].decode(errors='replace')}"
                )
        except SandboxUnavailable:
            await self.close()
            raise
        except SandboxFailed as error:
            await self.close()
            raise SandboxUnavailable(f"no sandbox works here: {error}") from None
        self._starters = [asyncio.create_task(self._keep_ready(spare)) for spare in (False, True)]

    def describe(self) -> str:
        """What holds the programs, in words."""
        if self._isolation.unsafe:
            return "UNSAFE: no isolation"
        calls = f"{len(seccomp.REFUSED)} system calls refused" if seccomp.supported() else "no filter of system calls"
        who = "as nobody" if bubble.user() else "as this user"
        group = "a control group each" if cgroup.parents() else "no control groups"
        return f"bubblewrap {who}, own namespaces, no network, rlimits, {calls}, {group}, watched by the keeper"

    async def run(self, order: Order, *, stdin: bytes = b"") -> Outcome:
        """Runs it in a sandbox that nothing has run in. Raises SandboxFailed."""
        async with self.taken() as box:
            return await box.run(order, stdin=stdin)

    async def run_cold(self, order: Order) -> Outcome:
        """Runs it where all of /usr is to be seen, for compilers, in a sandbox that is started for it."""
        box = await self._begin(whole_usr=True)
        try:
            return await box.run(order)
        finally:
            self._end(box)

    @contextlib.asynccontextmanager
    async def taken(self) -> AsyncIterator[Box]:
        """A warm sandbox, ended after the block. Raises SandboxFailed if none comes up."""
        box = await self._take()
        try:
            yield box
        finally:
            self._end(box)

    async def close(self) -> None:
        """Kills all. May be called twice."""
        self._closed = True
        for task in self._starters:
            task.cancel()
        await asyncio.gather(*self._starters, return_exceptions=True)
        if self._making:
            await asyncio.wait(self._making, timeout=END_S)
        for box in list(self._boxes):
            self._end(box)
        while not self._ready.empty():
            self._ready.get_nowait()
        for _ in range(self._waiting):
            self._ready.put_nowait(SandboxFailed(CLOSED))
        if self._ending:
            await asyncio.wait(self._ending, timeout=2 * END_S)
        for executor in (self._spawner, self._reaper):
            executor.shutdown(wait=False)

    async def _take(self) -> Box:
        if self._closed:
            raise SandboxFailed(CLOSED)
        self._waiting += 1
        self._lacking.set()
        try:
            async with asyncio.timeout(2 * START_S):
                found = await self._ready.get()
        except TimeoutError:
            raise SandboxFailed(f"no sandbox within {2 * START_S:g} s") from None
        finally:
            self._waiting -= 1
        self._lacking.set()
        if isinstance(found, SandboxFailed):
            raise found
        return found

    async def _begin(self, *, whole_usr: bool = False) -> Box:
        loop = asyncio.get_running_loop()
        making = loop.run_in_executor(self._spawner, spawn, self._isolation, whole_usr)
        self._making.add(making)
        making.add_done_callback(self._made)
        try:
            box = await asyncio.shield(making)
        except asyncio.CancelledError:
            making.add_done_callback(self._unwanted)
            raise
        try:
            await box.ready()
        except BaseException:
            self._end(box)
            raise
        return box

    def _made(self, making: asyncio.Future[Box]) -> None:
        self._making.discard(making)
        if not making.exception():
            self._boxes.add(making.result())

    def _unwanted(self, making: asyncio.Future[Box]) -> None:
        if not making.exception():
            self._end(making.result())

    def _end(self, box: Box) -> None:
        if box not in self._boxes:
            return
        self._boxes.discard(box)
        box.end()
        ending = asyncio.get_running_loop().run_in_executor(self._reaper, box.reap)
        self._ending.add(ending)
        ending.add_done_callback(self._ending.discard)

    async def _keep_ready(self, spare: bool) -> None:
        """Starts sandboxes as they are lacking; the spare one, only while runs wait."""
        while True:
            while self._ready.qsize() >= (self._waiting if spare else self._warm + self._waiting):
                self._lacking.clear()
                await self._lacking.wait()
            try:
                self._ready.put_nowait(await self._begin())
            except SandboxFailed as error:
                if self._waiting:
                    self._ready.put_nowait(error)
                await asyncio.sleep(PAUSE_S)
