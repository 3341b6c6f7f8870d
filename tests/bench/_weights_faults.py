"""Publishes weights while processes are killed and stopped, and looks at every tensor of those that live.

    publisher (a process) --shm or tree--> two receivers (processes), led by an Exchange in this one
    each trial: a version is published; at a random moment of it somebody gets SIGKILL or SIGSTOP

Weights are a function of version and place, so that a receiver can tell a mixture from a whole version by itself.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from headrace.benchmark import Bar
from headrace.runtime import Actor, Lane, Ref, RestartPolicy, System, message, timeout
from headrace.runtime.errors import RuntimeFault
from headrace.runtime.exchange import Exchange, Intake, Manifest, Patience, Publisher, Route, Seat
from headrace.runtime.exchange.header import checksum
from headrace.runtime.exchange.intake import place_of, tree_sinks
from headrace.runtime.exchange.tree import TreeSink

FAULT_BARS = [
    Bar("fault_trials_count", ">=", 100),
    Bar("fault_hangs_count", "<=", 0),
    Bar("fault_mixed_versions_count", "<=", 0),
    Bar("fault_versions_lost_count", "<=", 0),
    Bar("fault_survivors_whole_s", "<=", 1.0),
]

NUM_TENSORS = 12
TENSOR_WORDS = 1 << 20
"""Of 4 bytes: 48 MiB in all."""

RECEIVERS = ("receiver", "receiver_2")
HANG_S = 30.0
WITHIN_S = 1.0
"""In which those that are well must hold a version."""

LOOPBACK = "tcp://127.0.0.1:0"
ALWAYS = RestartPolicy(max_restarts=100_000, window_s=1.0, backoff_s=0.0)


def tensor(version: int, index: int) -> np.ndarray:
    """uint32 [TENSOR_WORDS]: each word tells of which version, tensor and place it is."""
    return np.arange(TENSOR_WORDS, dtype=np.uint32) * np.uint32(2 * version + 1) + np.uint32(index << 24)


@dataclass(kw_only=True)
class Teller(Actor):
    """Publishes any version that it is asked for."""

    async def start(self) -> None:
        self._publisher = Publisher("policy")
        address, keys = place_of(self)
        self._publisher.serve(address or LOOPBACK, keys)

    async def stop(self, reason: BaseException | None) -> None:
        self._publisher.close()

    @message(thread=True)
    def publish(self, version: int, keep: dict[int, list[str]]) -> Manifest:
        tensors = {str(index): tensor(version, index) for index in range(NUM_TENSORS)}
        return self._publisher.publish(version, tensors, keep=keep)


@dataclass(kw_only=True)
class Taker(Actor):
    """Takes what it is given, beside what it serves."""

    async def start(self) -> None:
        self._intake: Intake[dict[str, np.ndarray]] = Intake(_copies, tree_sinks(self) or {"tree": TreeSink(LOOPBACK)})
        self._serves: tuple[int, dict[str, np.ndarray]] = -1, {}

    async def stop(self, reason: BaseException | None) -> None:
        await self._intake.close()

    @message(concurrent=True, lane=Lane.CONTROL)
    async def seat(self) -> Seat:
        return self._intake.seat()

    @message(concurrent=True, lane=Lane.CONTROL)
    async def load(self, manifest: Manifest, route: Route) -> int:
        self._serves = manifest.version, await self._intake.load(manifest, route)
        return manifest.version

    @message(concurrent=True, lane=Lane.CONTROL)
    async def audit(self) -> tuple[int, int]:
        """The version that it serves, and how many of its tensors are not wholly of it."""
        version, tensors = self._serves
        return version, int(await self.in_thread(_mixed, version, tensors))


def _copies(version: int, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: array.copy() for name, array in tensors.items()}


def _mixed(version: int, tensors: Mapping[str, np.ndarray]) -> int:
    return sum(checksum(array) != checksum(tensor(version, int(name))) for name, array in tensors.items())


@dataclass(kw_only=True)
class Counts:
    """What `fault_trials` saw."""

    trials: int = 0
    hangs: int = 0
    """Trials that did not end."""
    mixed: int = 0
    """Receivers with a tensor that was not of the version that they served, after a fault."""
    late: int = 0
    """Receivers without a fault that held the version later than `WITHIN_S` after it."""
    slowest_s: float = 0.0
    """The latest of them."""
    audits: int = 0
    went_back: int = 0
    """Receivers that served an older version than before, or one that was never published."""
    faults: dict[str, int] | None = None
    stuck: list[str] | None = None
    """Of each hang: the fault, and what was waited for."""


class Trials:
    """The processes, which live on from trial to trial, or are restarted."""

    def __init__(self, system: System, refs: Mapping[str, Ref], seed: int) -> None:
        self._system = system
        self._refs = refs
        self._random = random.Random(seed)
        self._held: dict[str, list[tuple[int, float]]] = {name: [] for name in RECEIVERS}
        self._version = 0
        self._incarnation = 0
        self._doing = "nothing"
        self.counts = Counts(faults={}, stuck=[])

    async def one(self) -> None:
        """One trial; raises TimeoutError if it hangs."""
        carrier = self._random.choice(["shm", "tree"])
        exchange = Exchange(
            self._refs["publisher"].publish,
            carrier=carrier,
            patience=Patience(base_s=3.0, stall_s=0.15, again_s=(0.05, 0.2)),
            on_held=lambda name, version: self._held[name].append((version, time.monotonic())),
        )
        try:
            async with asyncio.timeout(HANG_S):
                await asyncio.gather(*(self._join(exchange, name) for name in RECEIVERS))
                before = time.monotonic()
                await self._publish(exchange)
                await exchange.settled()
                await self._fault(exchange, carrier, time.monotonic() - before)
        except TimeoutError:
            assert self.counts.stuck is not None
            self.counts.stuck.append(f"{self._doing}: {exchange.holds} {exchange.waits()}")
            raise
        finally:
            await exchange.close()

    async def _join(self, exchange: Exchange, name: str) -> None:
        self._incarnation += 1
        await exchange.join(name, self._refs[name], self._incarnation)

    async def _publish(self, exchange: Exchange) -> None:
        """The next version, by whichever incarnation of the publisher there is."""
        self._version += 1
        while True:
            with suppress(RuntimeFault):
                await exchange.publish(self._version)
                return

    async def _fault(self, exchange: Exchange, carrier: str, usual_s: float) -> None:
        victim = self._random.choice([*RECEIVERS, "publisher"])
        kind = self._random.choice([signal.SIGKILL, signal.SIGSTOP])
        assert self.counts.faults is not None
        name = f"{kind.name} of {victim.partition('_')[0]}, {carrier}"
        self.counts.faults[name] = self.counts.faults.get(name, 0) + 1
        self._doing = name
        publishing = asyncio.create_task(self._publish(exchange))
        await asyncio.sleep(self._random.random() * 1.1 * usual_s)
        pid = self._system.pids()[victim]
        os.kill(pid, kind)
        struck = time.monotonic()
        try:
            others = [name for name in RECEIVERS if name != victim]
            if victim == "publisher":
                await asyncio.sleep(0.1)
                await self._audit(others)
            else:
                await publishing
                await self._whole_soon(others, max(struck, time.monotonic() - usual_s))
                await self._audit(others)
        finally:
            if kind == signal.SIGSTOP:
                os.kill(pid, signal.SIGCONT)
        await publishing
        if victim != "publisher" and kind == signal.SIGKILL:
            await self._join_again(exchange, victim)
        while set((await exchange.settled()).values()) != {self._version}:  # noqa: ASYNC110 (one may be tried again)
            await asyncio.sleep(0.01)
        await self._audit(RECEIVERS)

    async def _join_again(self, exchange: Exchange, name: str) -> None:
        """As who watches a member does when its supervisor has restarted it."""
        self._incarnation += 1
        exchange.enter(name, self._refs[name], self._incarnation)

    async def _whole_soon(self, names: list[str], since: float) -> None:
        for name in names:
            while not self._held[name] or self._held[name][-1][0] != self._version:  # noqa: ASYNC110 (it tells nobody)
                await asyncio.sleep(0.001)
            late_s = self._held[name][-1][1] - since
            self.counts.slowest_s = max(self.counts.slowest_s, late_s)
            self.counts.late += late_s > WITHIN_S

    async def _audit(self, names: list[str] | tuple[str, ...]) -> None:
        for name in names:
            async with timeout(HANG_S):
                version, mixed = await self._refs[name].audit()
            self.counts.audits += 1
            self.counts.mixed += mixed > 0
            self.counts.went_back += not self._version - 1 <= version <= self._version


async def _trials(number: int, seed: int) -> Counts:
    async with System() as system:
        refs = {"publisher": await system.spawn(Teller(), name="publisher", node="publisher", policy=ALWAYS)}
        for name in RECEIVERS:
            refs[name] = await system.spawn(Taker(), name=name, node=name, policy=ALWAYS)
        trials = Trials(system, refs, seed)
        for _ in range(number):
            try:
                await trials.one()
            except TimeoutError:
                trials.counts.hangs += 1
            trials.counts.trials += 1
        return trials.counts


def fault_trials(number: int, seed: int) -> dict[str, Any]:
    """`number` trials; see Counts for what is counted."""
    counts = asyncio.run(_trials(number, seed))
    return {field: getattr(counts, field) for field in counts.__dataclass_fields__}


async def measure_faults(trials: int, say: Callable[[str], None], seed: int = 0) -> dict[str, float]:
    """The figures of FAULT_BARS."""
    counts = await _trials(trials, seed)
    say(f"faults: {', '.join(f'{count} {name}' for name, count in sorted((counts.faults or {}).items()))}")
    for stuck in counts.stuck or []:
        say(f"a trial hung: {stuck}")
    return {
        "fault_trials_count": counts.trials,
        "fault_hangs_count": counts.hangs,
        "fault_mixed_versions_count": counts.mixed,
        "fault_versions_lost_count": counts.went_back,
        "fault_survivors_whole_s": counts.slowest_s,
        "fault_audits_count": counts.audits,
    }
