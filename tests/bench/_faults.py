"""What deaths, starts and crowds cost: kill -9, a blocked loop, spawning, a thousand callers.

Nothing is pinned. A spec that this runtime can't be given yet (`NodeSpec(start="warm")`) makes its figures None.
"""

from __future__ import annotations

import asyncio
import dataclasses
import importlib
import os
import random
import signal
import statistics
import time
from typing import Any

from _bench_actors import Callee, Callers, Idle, Nursery, Sink, private_bytes
from _messages import quantile

from headrace.benchmark import Say
from headrace.runtime import NodeSpec, RestartPolicy, System
from headrace.runtime.errors import RuntimeFault

ENDLESS = RestartPolicy(max_restarts=1_000_000, backoff_s=0.0, max_backoff_s=0.0)
NEVER_AGAIN = RestartPolicy(restart="temporary")
CALLER_NODES = 4
CALLERS = 1000
AT_ONCE = 8
PAYLOAD_BYTES = 16_384

Found = dict[str, float | None]


def node_spec(name: str, start: str) -> NodeSpec | None:
    """None if nodes can't be started that way."""
    if any(field.name == "start" for field in dataclasses.fields(NodeSpec)):
        return NodeSpec(name=name, start=start)  # type: ignore[arg-type]
    return NodeSpec(name=name) if start == "cold" else None


async def measure_faults(scale: Any, say: Say) -> Found:
    """All figures of the lives and deaths of actors and nodes."""
    say(f"kill -9, {scale.kills} times, and {scale.cold_kills} times without a warm process")
    warm, cold = (
        await _kills("warm", scale.kills),
        await _kills("cold", scale.cold_kills if _has_warm() else scale.kills),
    )
    figures = {**_deaths(warm or cold), **_returns("warm", warm), **_returns("cold", cold)}
    say(f"a blocked loop, {scale.blocks} times")
    figures |= await _suspected(scale.blocks)
    say("spawning actors")
    figures |= await _spawn(scale)
    say("spawning nodes")
    figures |= await _warm_nodes(scale.nodes)
    figures["first_answer_s"] = statistics.median([await _first_answer_s() for _ in range(scale.systems)])
    say(f"fan-in: {CALLERS} callers in {CALLER_NODES} processes on one actor")
    return figures | await _fan_in(scale.fan_in_calls)


# kill -9 ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Kill:
    """Seconds from SIGKILL."""

    error_s: float
    back_s: float


def _has_warm() -> bool:
    return node_spec("probe", "warm") is not None


async def _kills(start: str, count: int) -> list[_Kill]:
    """A call waits in a node that is killed; it ends in an error, and the next call in an answer."""
    spec = node_spec("victim", start)
    if spec is None:
        return []
    kills, chance = [], random.Random(0)
    async with System(nodes={"victim": spec}) as system:
        ref = await system.spawn(Callee(), name="victim", node="victim", policy=ENDLESS)
        for _ in range(count):
            held = asyncio.create_task(ref.hold())
            await ref.pid()
            await asyncio.sleep(chance.uniform(0.01, 0.03))
            pid = await ref.pid()
            began = time.perf_counter()
            os.kill(pid, signal.SIGKILL)
            try:
                await held
            except RuntimeFault:
                error_s = time.perf_counter() - began
            assert await ref.pid() != pid
            kills.append(_Kill(error_s, time.perf_counter() - began))
    return kills


def _deaths(kills: list[_Kill]) -> Found:
    errors = [kill.error_s * 1e6 for kill in kills]
    return {
        "error_p50_us": statistics.median(errors),
        "error_p90_us": quantile(errors, 0.9),
        "error_max_us": max(errors),
    }


def _returns(start: str, kills: list[_Kill]) -> Found:
    times = [kill.back_s * 1e6 for kill in kills]
    if not times:
        return {f"{start}_back_p50_us": None}
    return {
        f"{start}_back_p50_us": statistics.median(times), f"{start}_back_p90_us": quantile(times, 0.9),
        f"{start}_back_max_us": max(times),
    }  # fmt: skip


# A blocked loop -----------------------------------------------------------------------------------------------


async def _suspected(count: int) -> Found:
    """From the standstill of a node's loop to the event, by turns asleep and holding the interpreter lock."""
    beats, beat_s = [], _beat_s()
    if beat_s is None:
        return {"suspected_beats_ratio": None}
    async with System() as system:
        ref = await system.spawn(Callee(), name="blocked", node="blocked")
        seen: asyncio.Queue[float] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def listen(event: dict[str, Any]) -> None:
            if event["event"] == "node_suspect":
                loop.call_soon_threadsafe(seen.put_nowait, time.time())

        system.events.listeners.append(listen)
        for number in range(count):
            await asyncio.sleep(4 * beat_s)  # It must be well again before it falls ill again.
            blocking = asyncio.create_task(ref.block(6 * beat_s, number % 2 == 1))
            try:
                async with asyncio.timeout(10 * beat_s):
                    when = await seen.get()
            except TimeoutError:
                when = None
            began = await blocking
            if when is None:
                return {"suspected_beats_ratio": None}
            beats.append((when - began) / beat_s)
    return {"suspected_beats_ratio": max(beats), "suspected_p50_beats_ratio": statistics.median(beats)}


def _beat_s() -> float | None:
    """How often the loop of a node shows that it lives; None if it does not."""
    try:
        liveness = importlib.import_module("headrace.runtime.liveness")
    except ImportError:
        return None
    return float(liveness.BEAT_S)


# Starting -----------------------------------------------------------------------------------------------------


async def _spawn(scale: Any) -> Found:
    """Actors in a running node, by the node itself; and in the root's own process, supervised."""
    async with System() as system:
        began = time.perf_counter()
        for number in range(scale.supervised):
            await system.spawn(Idle(), name=f"supervised/{number}")
        supervised = scale.supervised / (time.perf_counter() - began)
        nursery = await system.spawn(Nursery(), name="nursery", node="nursery", policy=NEVER_AGAIN)
        hosted, each = await nursery.host(scale.actors)
        os.kill(system.pids()["nursery"], signal.SIGKILL)  # Thousands of orderly stops would only take time.
    return {"spawn_in_process_per_s": hosted, "spawn_supervised_per_s": supervised, "actor_private_bytes": each}


async def _warm_nodes(count: int) -> Found:
    """Many nodes at a time, from warm processes."""
    specs = {f"warm{number}": node_spec(f"warm{number}", "warm") for number in range(count + 1)}
    if None in specs.values():
        return {"warm_nodes_per_s": None, "warm_nodes_answering_per_s": None, "warm_node_private_bytes": None}
    names = list(specs)[1:]
    async with System(nodes=specs) as system:  # type: ignore[arg-type]
        await system._nodes.open("warm0")  # What every node is forked from is started with the first.
        half, rest = names[: count // 2], names[count // 2 :]
        began = time.perf_counter()
        await asyncio.gather(*(system._nodes.open(name) for name in half))
        opened = len(half) / (time.perf_counter() - began)
        began = time.perf_counter()
        await asyncio.gather(*(_answering(system, name) for name in rest))
        answering = len(rest) / (time.perf_counter() - began)
        await asyncio.sleep(0.2)
        private = statistics.median([private_bytes(system.pids()[name]) for name in names])
    return {
        "warm_nodes_per_s": opened, "warm_nodes_answering_per_s": answering, "warm_node_private_bytes": private,
    }  # fmt: skip


async def _answering(system: System, node: str) -> None:
    ref = await system.spawn(Callee(), name=f"{node}/actor", node=node)
    await ref.pid()


async def _first_answer_s() -> float:
    """Of the first actor of a new system, in a node of its own."""
    began = time.perf_counter()
    async with System() as system:
        ref = await system.spawn(Callee(), name="first", node="first")
        await ref.pid()
        return time.perf_counter() - began


# Fan-in -------------------------------------------------------------------------------------------------------


async def _fan_in(calls: int) -> Found:
    """Messages that wait at the one actor are bounded by its senders' credits, whatever they would like to send."""
    nodes = [f"callers{number}" for number in range(CALLER_NODES)]
    async with System() as system:
        sink = await system.spawn(Sink(), name="sink", node="sink")
        callers = [await system.spawn(Callers(target="sink"), name=f"at/{node}", node=node) for node in nodes]
        pid = system.pids()["sink"]
        before = private_bytes(pid)
        watch = asyncio.create_task(_peak_bytes(pid))
        began = time.perf_counter()
        each = CALLERS // CALLER_NODES
        right = sum(await asyncio.gather(*(ref.run(each, calls, AT_ONCE, PAYLOAD_BYTES) for ref in callers)))
        seconds = time.perf_counter() - began
        watch.cancel()
        peak_bytes = await watch
        handled, peak = await sink.report()
        credit = CALLER_NODES * system.node.directory.get("sink").window
    sent = CALLERS * (calls // AT_ONCE) * AT_ONCE
    return {
        "fan_in_lost": sent - min(right, handled),
        "fan_in_peak_to_credits_ratio": peak / credit,
        "fan_in_growth_to_credits_ratio": (peak_bytes - before) / (credit * PAYLOAD_BYTES),
        "fan_in_growth_bytes": peak_bytes - before,
        "fan_in_credit_bytes": credit * PAYLOAD_BYTES,
        "fan_in_wanted_bytes": CALLERS * AT_ONCE * PAYLOAD_BYTES,
        "fan_in_calls_per_s": sent / seconds,
    }


async def _peak_bytes(pid: int) -> int:
    """The most private memory that a process has until this is cancelled."""
    peak = private_bytes(pid)
    try:
        while True:
            await asyncio.sleep(0.05)
            peak = max(peak, private_bytes(pid))
    except asyncio.CancelledError:
        return peak
