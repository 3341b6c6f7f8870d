"""Actors for tests of the runtime, in a module of their own so that node processes need not import pytest."""

import asyncio
import os
import random
import signal
import sys
import time
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np

from headrace.runtime import Actor, Lane, message, timeout, wire
from headrace.runtime.errors import RuntimeFault


async def until(condition: Any, seconds: float = 30.0) -> Any:
    """Waits until `condition()` is true; it may be a coroutine function. Returns its value."""
    async with asyncio.timeout(seconds):
        while True:
            value = condition()
            if asyncio.iscoroutine(value):
                value = await value
            if value:
                return value
            await asyncio.sleep(0.002)


@wire
@dataclass(frozen=True, kw_only=True)
class Point:
    x: float
    tags: tuple[str, ...] = ()
    data: np.ndarray | None = None


@dataclass(kw_only=True)
class Echo(Actor):
    """Answers what it is asked, in all ways there are."""

    prefix: str = ""

    async def start(self) -> None:
        self.seen: list[object] = []
        self.release = asyncio.Event()

    @message
    async def echo(self, value: object) -> object:
        return value

    @message
    async def prefixed(self, text: str) -> str:
        return self.prefix + text

    @message
    async def pid(self) -> int:
        return os.getpid()

    @message
    async def note(self, value: object) -> None:
        self.seen.append(value)

    @message(lane=Lane.CONTROL)
    async def note_control(self, value: object) -> None:
        self.seen.append(value)

    @message(concurrent=True, lane=Lane.CONTROL)
    async def noted(self) -> list[object]:
        return list(self.seen)

    @message
    async def raises(self, text: str) -> None:
        raise KeyError(text)

    @message
    async def unsendable(self) -> object:
        return {"inner": object()}

    @message
    async def nap(self, seconds: float) -> float:
        await asyncio.sleep(seconds)
        return seconds

    @message
    async def hold(self) -> None:
        """Keeps its turn until `let_go`, or until it is cancelled."""
        self.seen.append("held")
        try:
            await self.release.wait()
        except asyncio.CancelledError:
            self.seen.append("cancelled")
            raise

    @message(concurrent=True, lane=Lane.CONTROL)
    async def let_go(self) -> None:
        self.release.set()

    @message(concurrent=True)
    async def together(self) -> str:
        self.seen.append("in")
        await self.release.wait()
        return "out"

    @message
    async def exits(self) -> None:
        raise SystemExit(3)

    @message
    async def cancels_itself(self) -> None:
        future = asyncio.get_running_loop().create_future()
        future.cancel()
        await future


@dataclass(kw_only=True)
class Streamer(Actor):
    """Streams numbers, and remembers how far it came."""

    async def start(self) -> None:
        self.made = 0
        self.closed = 0

    @message(concurrent=True)
    async def count(self, until: int, fail_at: int = -1) -> AsyncIterator[int]:
        try:
            for i in range(until):
                if i == fail_at:
                    raise ValueError(f"no {i}")
                self.made += 1
                yield i
        finally:
            self.closed += 1

    @message(concurrent=True)
    async def unsendable(self) -> AsyncIterator[object]:
        try:
            yield 1
            yield object()
        finally:
            self.closed += 1

    @message(concurrent=True, deadline_s=0.5)
    async def silent(self) -> AsyncIterator[int]:
        try:
            yield 1
            await asyncio.sleep(60)
        finally:
            self.closed += 1

    @message(concurrent=True)
    async def state(self) -> tuple[int, int]:
        return self.made, self.closed


@dataclass(kw_only=True)
class Thinker(Actor):
    """Computes on its thread."""

    async def start(self) -> None:
        self.log_: list[str] = []

    @message(thread=True)
    def think(self, seconds: float, tag: str = "") -> str:
        self.log_.append(f"begin {tag}")
        time.sleep(seconds)
        self.log_.append(f"end {tag}")
        return tag

    @message(thread=True)
    def exhausts(self) -> object:
        return next(iter(()))

    @message
    async def between(self, tag: str) -> None:
        self.log_.append(tag)

    @message(concurrent=True, lane=Lane.CONTROL)
    async def history(self) -> list[str]:
        return list(self.log_)

    @message(thread=True)
    def speaks(self) -> None:
        self.log("from_thread", value=1)

    @message(thread=True)
    def casts(self, target: str) -> None:
        self.find(target).note.cast(1)


@dataclass(kw_only=True)
class Fragile(Actor):
    """Fails as it is told."""

    fail_start: str = ""
    """Fails in start while this file does not exist."""
    slow_start_s: float = 0.0
    hang_in_stop: bool = False
    stopped: str = ""
    """File that `stop` writes."""

    async def start(self) -> None:
        await asyncio.sleep(self.slow_start_s)
        if self.fail_start and not self._may_start():
            raise OSError(f"{self.fail_start} is not there")

    async def stop(self, reason: BaseException | None) -> None:
        if self.hang_in_stop:
            await asyncio.sleep(3600)
        await asyncio.sleep(0.05)
        if self.stopped:
            self._note(reason)

    @message
    async def ping(self) -> int:
        return os.getpid()

    @message
    async def boom(self, text: str) -> None:
        raise ValueError(text)

    @message
    async def boom_later(self) -> None:
        self.background(self._boom(), name="boom")

    def _may_start(self) -> bool:
        return Path(self.fail_start).exists()

    def _note(self, reason: BaseException | None) -> None:
        with Path(self.stopped).open("a") as file:
            file.write(f"{reason!r}\n")

    async def _boom(self) -> None:
        raise RuntimeError("in the background")

    @message(thread=True)
    def hang_in_thread(self) -> None:
        while True:
            time.sleep(0.1)

    @message
    async def hang_loop(self) -> None:
        while True:
            pass

    @message
    async def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


@dataclass(kw_only=True)
class Parent(Actor):
    """Has children of its own."""

    @message
    async def bears(self) -> int:
        """Starts a process that ends by itself only much later."""
        child = await asyncio.create_subprocess_exec("sleep", "600")
        return child.pid

    @message
    async def bears_and_dies(self) -> int:
        await self.bears()
        os.kill(os.getpid(), signal.SIGKILL)
        return 0

    @message
    async def describe(self) -> dict[str, Any]:
        """The process it lives in."""
        return {
            "pid": os.getpid(), "parent": os.getppid(), "group": os.getpgrp(), "session": os.getsid(0),
            "stdin": sys.stdin.read(), "environment": dict(os.environ),
            "blocked": [int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, ())],
            "interrupts": signal.Handlers(signal.getsignal(signal.SIGINT)).name,  # type: ignore[arg-type]
            "random": [random.random(), float(np.random.random())],
        }  # fmt: skip


def _spin(times: int) -> None:
    deque(repeat(None, times), maxlen=0)


@dataclass(kw_only=True)
class Hog(Actor):
    """Does what no actor should."""

    @message
    async def block(self, seconds: float) -> None:
        """Keeps the loop."""
        time.sleep(seconds)  # noqa: ASYNC251

    @message
    async def keep_the_gil(self, seconds: float) -> None:
        """Keeps the interpreter, too: for about so long in C code that gives no other thread a turn."""
        begun, trial = time.perf_counter(), 10**6
        _spin(trial)
        _spin(round(trial * seconds / (time.perf_counter() - begun)))


@dataclass(kw_only=True)
class Relay(Actor):
    """Asks another actor on behalf of its caller."""

    target: str = ""

    async def start(self) -> None:
        self.outcomes: list[str] = []

    @message
    async def ask(self, method: str, *args: object) -> object:
        return await getattr(self.find(self.target), method)(*args)

    @message
    async def ask_within(self, seconds: float, method: str, *args: object) -> object:
        async with timeout(seconds):
            return await getattr(self.find(self.target), method)(*args)

    @message
    async def cast(self, method: str, values: list[object]) -> int:
        """Casts until one is refused; returns how many went out."""
        for sent, value in enumerate(values):
            try:
                getattr(self.find(self.target), method).cast(value)
            except RuntimeFault as error:
                self.outcomes.append(f"{type(error).__name__}: {error}")
                return sent
        return len(values)

    @message(concurrent=True)
    async def flood(self, method: str, callers: int, calls: int) -> int:
        """`callers` tasks of `calls` calls each; returns how many answers came that were right."""
        right = 0
        bound = getattr(self.find(self.target), method)

        async def caller(number: int) -> None:
            nonlocal right
            for i in range(calls):
                answer = await bound((number, i))
                right += answer == (number, i)

        await asyncio.gather(*(caller(number) for number in range(callers)))
        return right

    @message(concurrent=True)
    async def wait_for_fate(self, method: str) -> str:
        try:
            return str(await getattr(self.find(self.target), method)())
        except RuntimeFault as error:
            return f"{type(error).__name__}: {error}"

    @message(concurrent=True)
    async def incarnations(self, until: int) -> list[tuple[str, int]]:
        """What `watch` shows of the target until it is up in an incarnation of at least `until`."""
        seen = []
        async for status in self.watch(self.target):
            seen.append((status.state, status.incarnation))
            if status.state == "up" and status.incarnation >= until:
                break
        return seen

    @message(concurrent=True)
    async def counters(self) -> dict[str, int]:
        assert self._node is not None
        return dict(self._node.counters)

    @message(concurrent=True)
    async def credits(self) -> int:
        """Messages that may still be sent to the target."""
        assert self._node is not None
        return self._node.routes.available(self.target)

    @message(concurrent=True)
    async def refused(self) -> list[str]:
        """Why casts were refused."""
        return list(self.outcomes)

    @message(concurrent=True)
    async def consume(self, method: str, *args: object) -> int:
        """Number of items of a stream."""
        number = 0
        async for _ in getattr(self.find(self.target), method).stream(*args):
            number += 1
        return number


@dataclass(kw_only=True)
class Early(Relay):
    """Asks before it is up."""

    async def start(self) -> None:
        await super().start()
        async with timeout(10):
            await self.find(self.target).echo(1)


@dataclass(kw_only=True)
class Small(Echo):
    """Has room for few messages."""

    mailbox_capacity = 4
