"""The traffic of chaos.py, and who disturbs it.

    chunks of ids -> Sender.run in each sending node -> calls and casts -> Runners
                     a sender dies: what it had not begun goes back

Disturbs nodes by their process ids, from outside, as an operator's worst day would.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections import Counter, defaultdict
from pathlib import Path

from _chaos_actors import DurableCounter, Runner, Sender
from _chaos_ledger import Findings, History, Ledger, audit

from headrace.benchmark import Say
from headrace.runtime import RestartPolicy, System
from headrace.runtime.errors import RuntimeFault

ENDLESS = RestartPolicy(max_restarts=1_000_000, backoff_s=0.01, max_backoff_s=0.05)
SENDERS, RUNNER_NODES, RUNNERS_EACH = 2, 3, 2
CHUNK = 10_000
GAP_S = 0.35
"""Mean time between two faults."""
STOP_S = (0.05, 1.0)
PATIENCE_S = 120.0
"""Beyond a second for each 1,000 messages: then what has not ended is taken as it is."""
QUIET_S = 60.0
KINDS = {"kill_runner": 40, "stop_runner": 25, "crash": 20, "kill_sender": 8, "stop_sender": 7}
"""Faults and how often they are drawn."""


class Disturber:
    """Does harm, by a plan that follows from the seed, and writes down what it did."""

    def __init__(
        self, system: System, senders: list[str], runner_nodes: list[str], runners: list[str], seed: int
    ) -> None:
        self.killed: set[int] = set()
        self.stopped: defaultdict[int, list[tuple[float, float]]] = defaultdict(list)
        self.done: Counter[str] = Counter()
        self._system, self._chance = system, random.Random(f"chaos:{seed}")
        self._victims = {"sender": senders, "runner": runner_nodes}
        self._runners = runners

    async def run(self) -> None:
        """Until it is cancelled. A process that it has stopped goes on, whatever happens."""
        while True:
            await asyncio.sleep(self._chance.expovariate(1 / GAP_S))
            kind = self._chance.choices(list(KINDS), list(KINDS.values()))[0]
            index, seconds = self._chance.randrange(1000), self._chance.uniform(*STOP_S)
            if kind == "crash":
                done = self._crash(self._runners[index % len(self._runners)])
            else:
                action, _, role = kind.partition("_")
                pid = self._system.pids().get(self._victims[role][index % len(self._victims[role])], 0)
                done = self._kill(pid) if action == "kill" else await self._stop(pid, seconds)
            self.done[kind] += done

    def _crash(self, name: str) -> bool:
        try:
            self._system.find(name).crash.cast()
        except RuntimeFault:
            return False  # It is down already.
        return True

    def _kill(self, pid: int) -> bool:
        if pid in self.killed or not _signal(pid, signal.SIGKILL):
            return False
        self.killed.add(pid)
        return True

    async def _stop(self, pid: int, seconds: float) -> bool:
        began = time.monotonic()
        if pid in self.killed or not _signal(pid, signal.SIGSTOP):
            return False
        try:
            await asyncio.sleep(seconds)
        finally:
            _signal(pid, signal.SIGCONT)
            self.stopped[pid].append((began, time.monotonic()))
        return True


def _signal(pid: int, number: int) -> bool:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return pid > 0


async def run(
    folder: Path, messages: int, seed: int, say: Say, *, runner: type[Runner] = Runner, disturbed: bool = True
) -> dict[str, float | None]:
    """Sends the messages, disturbs, waits for quiet, reads the books."""
    (folder / "counters").mkdir(exist_ok=True)
    ledger = Ledger(folder, messages)
    segments = _segments()
    began = time.perf_counter()
    senders = [f"sender{n}" for n in range(SENDERS)]
    nodes = [f"runners{n}" for n in range(RUNNER_NODES)]
    runners = {f"runner/{n}/{i}": nodes[n] for n in range(RUNNER_NODES) for i in range(RUNNERS_EACH)}
    books = {"folder": str(folder), "size": messages}
    async with System() as system:
        for name, node in runners.items():
            await system.spawn(runner(**books), name=name, node=node, policy=ENDLESS)  # type: ignore[arg-type]
        for name in senders:
            actor = Sender(**books, targets=list(runners))  # type: ignore[arg-type]
            await system.spawn(actor, name=name, node=name, policy=ENDLESS)
        disturber = Disturber(system, senders, nodes, list(runners), seed)
        harm = asyncio.create_task(disturber.run() if disturbed else asyncio.sleep(0))
        try:
            hung = not await _send_all(system, senders, messages, say)
        finally:
            harm.cancel()
            await asyncio.gather(harm, return_exceptions=True)
        say("quiet; waiting until all that is under way has ended")
        last_lives, settled = await _settle(system, senders)
        hung = hung or not settled
        counters = Counter(system.node.counters)
        incarnations = {row["name"]: row["incarnation"] for row in system.tree() if "incarnation" in row}
        pids = set(system.pids().values()) - {os.getpid()}
    left = [pid for pid in pids if _signal(pid, 0)]
    seconds = time.perf_counter() - began
    sent, ran = ledger.read()
    ledger.close()
    restarted = {number for number, name in enumerate(runners) if incarnations[name] > 1}
    history = History(
        killed=disturber.killed, stopped=disturber.stopped, last_lives=last_lives, restarted=restarted
    )  # fmt: skip
    findings = audit(sent, ran, history)
    counters = sum((DurableCounter.read(path) for path in (folder / "counters").iterdir()), counters)
    say(f"{messages:,} messages: {_told(findings, disturber.done)}")
    return {
        **figures(findings, counters),
        "hung": int(hung),
        "leaked_segments": len(_segments() - segments),
        "leaked_processes": len(left),
        "messages_per_s": messages / seconds,
        "restarts": sum(number - 1 for number in incarnations.values()),
        **{f"faults_{kind}": disturber.done[kind] for kind in KINDS},
    }


def figures(findings: Findings, counters: Counter[str]) -> dict[str, float | None]:
    """What was found, by the names that have bars. `counters`: of all nodes, the dead ones included.

    silent_messages       what nobody has told of
    counters_disagree     messages that the nodes handled but did not send, or sent, and handled nowhere, and neither
                          refused nor withdrew nor report as lost; None if they don't count what they send
    """
    reported = counters["dead_letters"] + counters["lost"]
    nowhere = counters["sent"] - counters["handled"] - counters["dead_letters"] - counters["withdrawn"]
    disagree = max(-nowhere, nowhere - counters["lost"] - findings.senders_died, 0)
    return {
        "silent_messages": findings.unended + findings.holes + max(0, findings.unhandled_tail - reported),
        "counters_disagree": disagree if counters["sent"] else None,
        "unended_calls": findings.unended,
        "late_calls": findings.late,
        "late_worst_s": findings.worst_late_s,
        "untyped_failures": findings.untyped,
        "wrong_answers": findings.wrong,
        "ran_twice": findings.twice,
        "phantoms": findings.phantom,
        "not_sent": findings.never,
        "calls": findings.calls,
        "casts": findings.casts,
        **{f"ended_{name}": count for name, count in findings.ends.items() if count},
        "casts_missing_within_a_life": findings.holes,
        "casts_with_what_ended": findings.unhandled_tail,
        "senders_died": findings.senders_died,
        **{f"counted_{name}": counters[name] for name in DurableCounter.NAMES},
    }


async def _send_all(system: System, senders: list[str], messages: int, say: Say) -> bool:
    """Hands out the messages. False if they had not ended in time."""
    chunks = [(first, min(first + CHUNK, messages)) for first in reversed(range(0, messages, CHUNK))]
    total, done = len(chunks), 0

    async def keep_busy(name: str) -> None:
        nonlocal done
        while chunks:
            chunk = chunks.pop()
            try:
                await system.find(name).run(*chunk)
            except RuntimeFault:
                chunks.append(chunk)  # It was killed: somebody sends the rest.
                await asyncio.sleep(0.01)
                continue
            done += 1
            if done % max(1, total // 10) == 0:
                say(f"{done * 100 // total}% of {messages:,} messages")

    try:
        async with asyncio.timeout(PATIENCE_S + messages / 1000):
            while done < total:
                await asyncio.gather(*(keep_busy(name) for name in senders))
    except TimeoutError:
        say(f"given up with {total - done} of {total} parts of the messages not done")
        return False
    return True


async def _settle(system: System, senders: list[str]) -> tuple[dict[int, int], bool]:
    """The lives of the runners once each has run what was sent to it; and whether they all came to that in time."""
    lives: dict[int, int] = {}
    try:
        async with asyncio.timeout(QUIET_S):
            for name in senders:
                lives |= await _ask_until_it_lives(system, name)
    except TimeoutError:
        return lives, False
    return lives, True


async def _ask_until_it_lives(system: System, name: str) -> dict[int, int]:
    while True:
        try:
            return {int(number): int(life) for number, life in (await system.find(name).settle()).items()}
        except RuntimeFault:
            await asyncio.sleep(0.05)


def _segments() -> set[str]:
    """Shared memory that has a name of ours, or that this process holds or maps."""
    named = {path.name for path in Path("/dev/shm").glob("*headrace*")}
    held = {f"fd {fd.name} {link}" for fd in Path("/proc/self/fd").iterdir() if "memfd:" in (link := _link(fd))}
    mapped = {line.split()[0] for line in Path("/proc/self/maps").read_text().splitlines() if "memfd:" in line}
    return named | held | mapped


def _link(path: Path) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""


def _told(findings: Findings, done: Counter[str]) -> str:
    harm = ", ".join(f"{count} {kind.replace('_', ' ')}" for kind, count in done.items())
    found = findings.violations() or "nothing"
    return f"after {harm}, the books show {found} that must not be"
