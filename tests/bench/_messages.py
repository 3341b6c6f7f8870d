"""What messages cost: headrace beside raw pyzmq, in one process, on the same cores, turn by turn.

    for each round, for each placement:   floor, ours, floor, ours, ...

Placements, for every thread of both processes:

    same_core     asking and answering side on one core: a hand-off is a context switch
    cross_core    each on a core of its own: a hand-off wakes another core, which costs about five times as much

Both sides of a ratio come from the same round structure with the same pinning; a figure is the median over the rounds.
Control beside bulk is not pinned: two nodes on two cores, free to use both.
"""

from __future__ import annotations

import asyncio
import gc
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from _bench_actors import Born, Callee
from _floor import Floor, memcpy_s

from headrace.benchmark import Say
from headrace.runtime import Ref, System, timeout
from headrace.runtime.errors import MailboxFull, RuntimeFault

PAYLOAD = bytes(80)
SAMPLES = {"100kb": 100_000, "500kb": 500_000}
LARGE_BYTES = 64 << 20
IN_FLIGHT = (100, 1000)
WARM_UP = 200
SPIN_S = 0.0003

Call = Callable[[], Awaitable[Any]]
Numbers = dict[str, list[float]]


def pin(pid: int, cores: set[int]) -> None:
    """Every thread of a process; threads that it starts later inherit it."""
    for thread in os.listdir(f"/proc/{pid}/task"):
        try:
            os.sched_setaffinity(int(thread), cores)
        except ProcessLookupError:
            continue


def cpu_s(*pids: int) -> float:
    """Processor time that all threads of these processes have used."""
    total = 0
    for pid in pids:
        for thread in Path(f"/proc/{pid}/task").iterdir():
            total += int((thread / "schedstat").read_text().split()[0])
    return total / 1e9


async def seconds_of(call: Call, count: int) -> list[float]:
    """Of each of `count` calls, one after the other."""
    times = []
    for _ in range(count):
        began = time.perf_counter()
        await call()
        times.append(time.perf_counter() - began)
    return times


async def calls_per_s(call: Call, in_flight: int, seconds: float) -> float:
    """Calls answered per second by `in_flight` tasks that each ask again as soon as they are answered."""
    done = 0
    began = time.perf_counter()
    end = began + seconds

    async def ask() -> None:
        nonlocal done
        while time.perf_counter() < end:
            await call()
            done += 1

    await asyncio.gather(*(ask() for _ in range(in_flight)))
    return done / (time.perf_counter() - began)


async def cast_all(ref: Ref, payload: bytes, count: int) -> int:
    """Casts `count` messages, as fast as the mailbox takes them; returns how many were handled.

    A cast that is refused tells nobody when there will be room: this looks again at every turn of the loop, and after
    SPIN_S every millisecond, to leave a core that both sides share to the other.
    """
    cast = ref.note.cast
    for _ in range(count):
        full_since = 0.0
        while True:
            try:
                cast(payload)
                break
            except MailboxFull:
                now = time.perf_counter()
                full_since = full_since or now
                await asyncio.sleep(0 if now - full_since < SPIN_S else 0.001)
    return int(await ref.noted())


def quantile(times: Sequence[float], share: float) -> float:
    return sorted(times)[min(len(times) - 1, int(share * len(times)))]


class Rounds:
    """Takes each figure once per round; the median over the rounds counts."""

    def __init__(self) -> None:
        self.numbers: Numbers = defaultdict(list)

    def latency(self, name: str, times: Sequence[float]) -> None:
        for suffix, share in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99)):
            self.numbers[f"{name}_{suffix}_us"].append(quantile(times, share) * 1e6)

    def add(self, name: str, value: float) -> None:
        self.numbers[name].append(value)

    def median(self, name: str) -> float | None:
        return statistics.median(self.numbers[name]) if self.numbers.get(name) else None

    def ratio(self, name: str, of: str) -> float | None:
        """Of the medians."""
        top, bottom = self.median(name), self.median(of)
        return None if top is None or not bottom else top / bottom


async def measure_messages(scale: Any, say: Say) -> dict[str, float | None]:
    """All figures of the message path, by the plan in the module's docstring."""
    cores = sorted(os.sched_getaffinity(0))
    rounds = Rounds()
    async with System() as system:
        ref = await system.spawn(Callee(), name="callee", node="callee")
        floor = Floor()
        try:
            bench = _Bench(ref, system.pids()["callee"], floor, rounds, scale)
            for number in range(scale.rounds):
                for placement, ours, theirs in _placements(cores):
                    say(f"messages, round {number + 1} of {scale.rounds}, {placement.replace('_', ' ')}")
                    for pid, core in (
                        (os.getpid(), ours),
                        (floor.process.pid, theirs),
                        (system.pids()["callee"], theirs),
                    ):
                        pin(pid, {core})
                    gc.collect()
                    await bench.small(placement)
                    await bench.samples(placement)
                    if placement == "cross_core" or len(cores) == 1:
                        await bench.large()
            for pid in (os.getpid(), floor.process.pid, system.pids()["callee"]):
                pin(pid, set(cores))
        finally:
            pin(os.getpid(), set(cores))
            floor.close()
        say("a control call, idle and beside 64 MiB arrays")
        await _control(ref, rounds, scale)
        await _born(system, rounds, scale, say)
    return _figures(rounds, [placement for placement, _, _ in _placements(cores)])


def _placements(cores: Sequence[int]) -> list[tuple[str, int, int]]:
    """Name, the asking side's core, the answering side's core. With one core there is only one."""
    same, cross = ("same_core", cores[-1], cores[-1]), ("cross_core", cores[0], cores[-1])
    return [same, cross] if len(cores) > 1 else [same]


class _Bench:
    """One pair of processes of ours, and one of the floor's."""

    def __init__(self, ref: Ref, callee: int, floor: Floor, rounds: Rounds, scale: Any) -> None:
        self.ref, self.callee, self.floor, self.rounds, self.scale = ref, callee, floor, rounds, scale
        self._samples = {name: np.zeros(size, np.uint8) for name, size in SAMPLES.items()}
        self._source, self._target = np.ones(LARGE_BYTES, np.uint8), np.zeros(LARGE_BYTES, np.uint8)
        self.lost = 0

    async def small(self, where: str) -> None:
        scale, rounds, floor, echo = self.scale, self.rounds, self.floor, partial(self.ref.echo, PAYLOAD)
        single, coalesced = partial(floor.call, PAYLOAD), partial(floor.call_coalesced, PAYLOAD)
        for call in (single, coalesced, echo):
            await seconds_of(call, WARM_UP)
        rounds.latency(f"{where}_floor", await seconds_of(single, scale.calls))
        rounds.latency(f"{where}_call", await seconds_of(echo, scale.calls))
        for number in IN_FLIGHT:
            await self._rate(f"{where}_floor_{number}", coalesced, number, self.floor.process.pid)
            await self._rate(f"{where}_calls_{number}", echo, number, self.callee)
        began = time.perf_counter()
        arrived = await floor.casts(PAYLOAD, scale.casts)
        rounds.add(f"{where}_floor_casts_per_s", arrived / (time.perf_counter() - began))
        await self.ref.noted()
        began = time.perf_counter()
        handled = await cast_all(self.ref, PAYLOAD, scale.casts)
        rounds.add(f"{where}_casts_per_s", handled / (time.perf_counter() - began))
        rounds.add("casts_lost", scale.casts - handled)

    async def _rate(self, name: str, call: Call, in_flight: int, other: int) -> None:
        """Calls per second, and what a call costs both processes; the latter hardly depends on who else is busy."""
        before, began = cpu_s(os.getpid(), other), time.perf_counter()
        rate = await calls_per_s(call, in_flight, self.scale.seconds)
        calls = rate * (time.perf_counter() - began)
        self.rounds.add(f"{name}_per_s", rate)
        self.rounds.add(f"{name}_cpu_us", (cpu_s(os.getpid(), other) - before) / calls * 1e6)

    async def samples(self, where: str) -> None:
        for name, array in self._samples.items():
            theirs, ours = partial(self.floor.call_array, array), partial(self.ref.ends, array)
            for call in (theirs, ours):
                await seconds_of(call, WARM_UP // 10)
            self.rounds.latency(f"{where}_floor_{name}", await seconds_of(theirs, self.scale.samples))
            self.rounds.latency(f"{where}_{name}", await seconds_of(ours, self.scale.samples))

    async def large(self) -> None:
        copies, calls = [], []
        self._source[0] = self._source[-1] = 1
        assert await self.ref.ends(self._source) == 2
        for _ in range(self.scale.large):
            copies.append(memcpy_s(self._target, self._source))
            began = time.perf_counter()
            await self.ref.ends(self._source)
            calls.append(time.perf_counter() - began)
        self.rounds.add("memcpy_64mib_us", statistics.median(copies) * 1e6)
        self.rounds.add("copy_in_64mib_us", statistics.median(calls) * 1e6)


async def _control(ref: Ref, rounds: Rounds, scale: Any) -> None:
    """A control call between two nodes, idle and while arrays are copied between the same two."""
    array = np.ones(LARGE_BYTES, np.uint8)
    await ref.ends(array)
    for _ in range(scale.rounds):
        rounds.latency("control_idle", await pings(ref, scale.seconds))
        stop = asyncio.Event()
        flow = asyncio.create_task(_push(ref, array, stop))
        await ref.ends(array)
        rounds.latency("control_beside_bulk", await pings(ref, scale.seconds))
        stop.set()
        rounds.add("bulk_beside_control", await flow)


async def pings(ref: Ref, seconds: float) -> list[float]:
    """Seconds of each of as many control calls as fit into `seconds`."""
    times, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end:
        times += await seconds_of(ref.ping, 1)
    return times


async def _push(ref: Ref, array: np.ndarray, stop: asyncio.Event) -> float:
    """Sends an array again and again; returns bytes per second."""
    sent, began = 0, time.perf_counter()
    while not stop.is_set():
        await ref.ends(array)
        sent += array.nbytes
    return sent / (time.perf_counter() - began)


async def _born(system: System, rounds: Rounds, scale: Any, say: Say) -> None:
    """Arrays that were made in shared memory: the hand-over alone, and control calls while they flow."""
    sender = await system.spawn(Born(), name="born", node="born")
    await system.spawn(Callee(), name="target", node="target")
    try:
        async with timeout(60):
            times = await sender.hand_over("target", LARGE_BYTES, scale.large * scale.rounds)
            if times is None:
                say("arrays born in shared memory are left out: this runtime has no Actor.empty")
                return
            rounds.latency("born_64mib", times[1:] or times)
            for _ in range(scale.rounds):
                rounds.latency("control_idle_between_nodes", await sender.pings("target", scale.seconds))
                flow = asyncio.create_task(sender.flow("target", LARGE_BYTES, scale.seconds * 1.5))
                await asyncio.sleep(scale.seconds / 4)
                rounds.latency("control_beside_born", await sender.pings("target", scale.seconds))
                rounds.add("born_beside_control_per_s", await flow / (scale.seconds * 1.5))
    except (RuntimeFault, TimeoutError) as error:
        say(f"arrays born in shared memory failed: {error}")


def _figures(rounds: Rounds, placements: Sequence[str]) -> dict[str, float | None]:
    figures: dict[str, float | None] = {}
    for where in ("same_core", "cross_core"):
        known = where in placements
        pairs = [(f"call_{q}_ratio", f"call_{q}_us", f"floor_{q}_us") for q in ("p50", "p90", "p99")]
        pairs += [(f"calls_{n}_ratio", f"calls_{n}_per_s", f"floor_{n}_per_s") for n in IN_FLIGHT]
        pairs += [("casts_ratio", "casts_per_s", "floor_casts_per_s")]
        pairs += [(f"{s}_{q}_ratio", f"{s}_{q}_us", f"floor_{s}_{q}_us") for s in SAMPLES for q in ("p50", "p90")]
        for name, ours, theirs in pairs:
            figures[f"{where}_{name}"] = rounds.ratio(f"{where}_{ours}", f"{where}_{theirs}") if known else None
            if known:
                figures[f"{where}_{ours}"] = rounds.median(f"{where}_{ours}")
                figures[f"{where}_{theirs}"] = rounds.median(f"{where}_{theirs}")
        for side in (f"{side}_{n}_cpu_us" for n in IN_FLIGHT for side in ("calls", "floor") if known):
            figures[f"{where}_{side}"] = rounds.median(f"{where}_{side}")
    figures["casts_lost"] = sum(rounds.numbers["casts_lost"])
    figures["copy_in_64mib_ratio"] = rounds.ratio("memcpy_64mib_us", "copy_in_64mib_us")
    idle = "control_idle_p50_us"
    figures["control_beside_bulk_ratio"] = rounds.ratio("control_beside_bulk_p50_us", idle)
    figures["control_beside_born_ratio"] = rounds.ratio(
        "control_beside_born_p50_us", "control_idle_between_nodes_p50_us"
    )
    rest = ["memcpy_64mib_us", "copy_in_64mib_us", "born_64mib_p50_us", "born_64mib_p90_us"]
    rest += [f"control_{what}_{q}_us" for what in ("idle", "beside_bulk", "beside_born") for q in ("p50", "p90", "p99")]
    figures |= {name: rounds.median(name) for name in rest}
    figures["bulk_beside_control_bytes_per_s"] = rounds.median("bulk_beside_control")
    figures["born_beside_control_per_s"] = rounds.median("born_beside_control_per_s")
    return figures
