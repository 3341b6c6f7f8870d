"""Chaos in a network in memory with a virtual clock: it drops, delays, doubles, reorders, and is cut in two.

    each round, from a seed of its own:   three nodes, callers in each; partitions come and go; at last each is cut off
                                          and declares the others dead, as a root does it

Hours pass in seconds, so lateness is exact: no machine is too busy for it. Every call must have ended by its deadline +
100 ms, in a reply, a remote error or a typed failure; nothing runs twice; a cast that was taken and did not run must be
among those that the nodes count as lost or as dead letters; nobody waits any more when all is over.
"""

from __future__ import annotations

import asyncio
import importlib.util
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from _chaos_ledger import GRACE_S

from headrace.benchmark import FOLDER
from headrace.runtime import Actor, Status, message, timeout
from headrace.runtime.agent import NodeAgent, agent_status, interface_of
from headrace.runtime.errors import MailboxFull, RemoteError, RuntimeFault
from headrace.runtime.node import Node

NAMES = ("a", "b", "c")
CALLERS = 4
CALLS = 60
CASTS = 150
DEADLINES_S = (0.05, 0.3, 1.0, 3.0)
ROUNDS = 20
PARTITIONS = 12
LIMIT_S = 3600.0


@dataclass(kw_only=True)
class Counting(Actor):
    """Knows how often it ran what."""

    async def start(self) -> None:
        self.runs: Counter[int] = Counter()

    @message
    async def take(self, id: int) -> int:
        self.runs[id] += 1
        return id

    @message(concurrent=True)
    async def nap(self, id: int) -> int:
        self.runs[id] += 1
        await asyncio.sleep(0.5)
        return id

    @message
    async def refuse(self, id: int) -> None:
        self.runs[id] += 1
        raise ValueError(f"no {id}")

    @message
    async def note(self, id: int) -> None:
        self.runs[id] += 1


def run(seed: int, say: Callable[[str], None], rounds: int = ROUNDS) -> dict[str, float | None]:
    """Violations over all rounds; None where the runtime has no network in memory."""
    try:
        from headrace.runtime.memory_transport import LinkQuality, MemoryNetwork  # type: ignore[import-not-found]

        virtual_loop = _virtual_loop()
    except ImportError as error:
        say(f"partitions are left out: {error}")
        return {"partition_violations": None}
    say(f"partitions in memory, {rounds} rounds")
    total: Counter[str] = Counter()
    for number in range(rounds):
        quality = LinkQuality(drop=0.002, duplicate=0.01, reorder=0.05, delay_s=(0.0005, 0.01))
        found: Counter[str] = Counter()

        async def main(number: int = number, quality: Any = quality, found: Counter[str] = found) -> None:
            world = _World(MemoryNetwork(seed * 1000 + number, quality), seed * 1000 + number, found)
            await world.run()

        try:
            virtual_loop.run(main, limit_s=LIMIT_S, max_turns=10_000_000)
        except (virtual_loop.Stuck, AssertionError) as error:
            found["hung"] += 1
            say(f"round {number}: {str(error).splitlines()[0]}")
        total += found
    bad = {name: total[name] for name in ("late", "untyped", "wrong", "twice", "phantom", "silent", "waiting", "hung")}
    for name, count in bad.items():
        if count:
            say(f"partitions: {count} {name}")
    return {
        "partition_violations": sum(bad.values()),
        **{f"partition_{name}": count for name, count in bad.items()},
        **{f"partition_{name}": total[name] for name in ("calls", "casts", "replies", "faults", "unknown", "told")},
    }


def _virtual_loop() -> ModuleType:
    """The one of the tests. Raises ImportError."""
    path = FOLDER.parent / "virtual_loop.py"
    if not path.exists():
        raise ImportError(f"there is no {path}")
    spec = importlib.util.spec_from_file_location("virtual_loop", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class _World:
    """Three nodes, their actors, and what is done to the net between them."""

    def __init__(self, network: Any, seed: int, found: Counter[str]) -> None:
        self._network, self._chance, self._found = network, random.Random(seed), found
        self._next = 0
        self._accepted: dict[int, str] = {}
        self._answered: set[int] = set()

    async def run(self) -> None:
        self._nodes = {name: Node(f"{name}#1", name, transport=self._network.transport) for name in NAMES}  # type: ignore[call-arg]
        self._actors = {name: Counting() for name in NAMES}
        agents = {name: NodeAgent() for name in NAMES}
        for name, node in self._nodes.items():
            for other in self._nodes.values():
                if other is not node:
                    node.transport.connect(other.key, other.transport.address)
                node.directory.update(agent_status(other.key))
            for other_name, other in self._nodes.items():
                interface = interface_of(Counting)
                status = Status(name=f"actor/{other_name}", node=other.key, state="up", incarnation=1, **interface)
                node.directory.update(status)
            await agents[name].host(node, agents[name], f"$node@{name}", 1).up
            await agents[name].host(node, self._actors[name], f"actor/{name}", 1).up
        cutting = asyncio.create_task(self._cut())
        await asyncio.gather(
            *(self._call_all(name) for name in NAMES for _ in range(CALLERS)), *(self._cast_all(name) for name in NAMES)
        )
        await cutting
        await self._part()
        await asyncio.sleep(120.0)
        self._count()
        for name in NAMES:
            await agents[name].shutdown()
            await agents[name].close()
        for node in self._nodes.values():
            await node.close()

    async def _cut(self) -> None:
        for _ in range(PARTITIONS):
            await asyncio.sleep(self._chance.uniform(0.05, 2.0))
            alone = self._chance.choice(NAMES)
            self._network.partition({alone}, set(NAMES) - {alone})
            await asyncio.sleep(self._chance.uniform(0.01, 4.0))
            self._network.heal()

    async def _part(self) -> None:
        """Each node is alone, and declares the others dead."""
        self._network.partition(*({name} for name in NAMES))
        await asyncio.sleep(1.0)
        for node in self._nodes.values():
            for other in self._nodes.values():
                if other is not node:
                    node.peer_down(other.key, "no heartbeat: partitioned")

    async def _call_all(self, here: str) -> None:
        for _ in range(CALLS):
            await self._call(self._nodes[here], self._chance.choice([n for n in NAMES if n != here]))

    async def _call(self, node: Node, there: str) -> None:
        id, seconds, method = (
            self._id(),
            self._chance.choice(DEADLINES_S),
            self._chance.choice(["take"] * 8 + ["nap", "refuse"]),
        )
        loop, found = asyncio.get_running_loop(), self._found
        began = loop.time()
        found["calls"] += 1
        try:
            async with timeout(seconds):
                answer = await getattr(node.ref(f"actor/{there}"), method)(id)
            found["replies"] += 1
            found["wrong"] += answer != id
            self._answered.add(id)
        except RemoteError as error:
            found["wrong"] += f"no {id}" not in str(error)
            self._answered.add(id)
        except (RuntimeFault, TimeoutError):
            found["faults"] += 1
        except Exception:  # noqa: BLE001 (it is what we look for)
            found["untyped"] += 1
        found["late"] += loop.time() > began + seconds + GRACE_S

    async def _cast_all(self, here: str) -> None:
        for _ in range(CASTS):
            there = self._chance.choice([n for n in NAMES if n != here])
            id = self._id()
            try:
                self._nodes[here].ref(f"actor/{there}").note.cast(id)
                self._accepted[id] = there
                self._found["casts"] += 1
            except MailboxFull:
                await asyncio.sleep(0.5)
            except RuntimeFault:
                continue
            await asyncio.sleep(self._chance.uniform(0, 0.1))

    def _count(self) -> None:
        found = self._found
        runs: Counter[int] = sum((actor.runs for actor in self._actors.values()), Counter())
        found["twice"] += sum(count > 1 for count in runs.values())
        found["phantom"] += sum(not runs[id] for id in self._answered)
        missing = sum(not runs[id] for id in self._accepted)
        told = sum(node.counters["lost"] + node.counters["dead_letters"] for node in self._nodes.values())
        found["unknown"] += missing
        found["told"] += told
        found["silent"] += max(0, missing - told)
        found["waiting"] += sum(len(node.waits.rows()) for node in self._nodes.values())

    def _id(self) -> int:
        self._next += 1
        return self._next
