"""Whether anything outlives a root that is killed: nodes, nodes in the middle of their start, and what nodes started.

    python -P _chaos_orphans.py      the root of one trial: opens a system, prints "up", and lives until it is killed

Descendants are known by a word in their environment, which they inherit: none is missed for having lost its parent.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from headrace.runtime import Actor, System, message

MARK = "HEADRACE_CHAOS_TRIAL"
WAIT_S = 0.1
"""After the kill; whatever lives then is an orphan."""
START_S = 20.0
LATEST_S = 0.25
"""The kill comes so long after the root is up, or before, in the middle of a start."""


@dataclass(kw_only=True)
class Parent(Actor):
    """Has a child process of its own."""

    async def start(self) -> None:
        self._child = await asyncio.create_subprocess_exec("sleep", "600")

    async def stop(self, reason: BaseException | None) -> None:
        if self._child.returncode is None:
            self._child.kill()
            await self._child.wait()

    @message
    async def child(self) -> int:
        return self._child.pid


def run(trials: int, seed: int, say: Callable[[str], None]) -> dict[str, float | None]:
    """Kills a root, `trials` times, and counts what lives on."""
    chance = random.Random(f"orphans:{seed}")
    nodes, children, alive = 0, 0, 0
    for trial in range(trials):
        if trial % max(1, trials // 4) == 0:
            say(f"kill -9 of the root, {trial + 1} of {trials}")
        found = _trial(when_up=chance.random() < 0.7, delay_s=chance.uniform(0, LATEST_S))
        alive += found.before
        nodes += sum("sleep" not in name for name in found.after)
        children += sum("sleep" in name for name in found.after)
    return {
        "orphans": nodes + children, "orphan_nodes": nodes, "orphan_children": children, "orphan_trials": trials,
        "processes_per_trial": alive / trials,
    }  # fmt: skip


@dataclass(frozen=True)
class _Trial:
    before: int
    """Descendants at the kill."""
    after: list[str]
    """Command lines of those that lived on."""


def _trial(*, when_up: bool, delay_s: float) -> _Trial:
    mark = uuid.uuid4().hex
    with tempfile.TemporaryDirectory(prefix="headrace-orphans-") as folder:  # A killed root can't remove its own.
        return _kill_root(mark, {**os.environ, MARK: mark, "TMPDIR": folder}, when_up=when_up, delay_s=delay_s)


def _kill_root(mark: str, env: dict[str, str], *, when_up: bool, delay_s: float) -> _Trial:
    root = subprocess.Popen(
        [sys.executable, "-P", str(Path(__file__).resolve())], stdout=subprocess.PIPE, env=env,
        start_new_session=True,
    )  # fmt: skip
    assert root.stdout is not None
    for _ in range(2 if when_up else 1):  # The first line: it opens its nodes. The second: they are up.
        root.stdout.readline()
    time.sleep(delay_s)
    before = len(_marked(mark)) - 1
    os.kill(root.pid, signal.SIGKILL)
    time.sleep(WAIT_S)
    after = _marked(mark)
    root.communicate()
    after.pop(root.pid, None)
    left = after
    while left:
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.01)
        left = _marked(mark)
    return _Trial(before, list(after.values()))


def _marked(mark: str) -> dict[int, str]:
    """Living processes of one trial: id and command line."""
    found = {}
    needle = f"{MARK}={mark}".encode()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            if needle not in (entry / "environ").read_bytes():
                continue
            if (entry / "stat").read_text().rpartition(")")[2].split()[0] in "ZX":
                continue
            found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
        except OSError:
            continue
    return found


async def _root() -> None:
    os.write(1, b"opening\n")
    async with System() as system:
        names = [f"node{n}" for n in range(3)]
        await asyncio.gather(*(system.spawn(Parent(), name=f"parent/{name}", node=name) for name in names))
        os.write(1, b"up\n")
        await asyncio.sleep(START_S)


if __name__ == "__main__":
    import uvloop

    uvloop.run(_root())
