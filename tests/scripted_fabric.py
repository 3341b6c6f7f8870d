"""A communicator library without GPUs, on a loop without waiting: it moves versions of buckets and fails by a script.

    World(faults)    what all members share; the n-th call of a step at a member hangs, fails, or ends its process
    Process          one member: a real Communicator, memory that holds a version per bucket, restarts when it dies

Ways to fail, where they make sense: `error` (the call reports one), `hang` (returns only when aborted), `stuck` (never
returns), `stall` (the bytes never come), `die` (the process ends). What is under way when a member dies or aborts never
ends by itself at the others: the most unhelpful that a library may be.
"""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from headrace.runtime.errors import ActorDied, CommunicatorHung, TransferFailed
from headrace.runtime.exchange.communicator import Communicator, Fabric, Limits, Part, Wave
from headrace.runtime.exchange.header import Manifest, Route

LIMITS = Limits(init_s=2.0, connect_s=0.5, look_s=0.5, abort_s=0.5, poll_s=0.1, check_s=0.2)
DEADLINE_S = 5.0
STALL_S = 0.5
RESTART_S = 0.2
NUM_BUCKETS = 3
PUBLISHERS = ("p0", "p1")

IN_A_GROUP = "run group_start send receive group_end record".split()
WAYS = {
    "init": ("error", "stuck", "die"),
    **dict.fromkeys(IN_A_GROUP, ("error", "hang", "stuck", "die")),
    "done": ("error", "stuck", "stall", "die"),
    "check": ("error", "stuck", "die"),
    "abort": ("error", "stuck", "die"),
    "finalize": ("error", "stuck", "die"),
}


@dataclass(frozen=True)
class Fault:
    member: str
    step: str
    way: str
    nth: int = 1
    """Call of this step at this member, counted from when the fault before it has struck."""


def faults(members: Sequence[str], nths: Sequence[int] = (1,)) -> Iterator[Fault]:
    """Every fault that these members can have."""
    for member in members:
        for step, ways in WAYS.items():
            if step == ("receive" if member in PUBLISHERS else "send"):
                continue  # Publishers receive nothing, and members send nothing.
            for way in ways:
                for nth in nths:
                    yield Fault(member, step, way, nth)


class _Hang(Exception):
    """The call returns when its communicator is aborted, or never."""

    def __init__(self, until: asyncio.Event) -> None:
        self.until = until


class World:
    """Strikes with the faults one after the other."""

    def __init__(self, script: Sequence[Fault]) -> None:
        self.script = list(script)
        self.struck: list[Fault] = []
        self.always: Fault | None = None
        """Strikes every time."""
        self.calls: Counter[tuple[str, str]] = Counter()
        self.joined: dict[bytes, dict[int, ScriptedFabric]] = defaultdict(dict)
        self.complete: dict[bytes, asyncio.Event] = defaultdict(asyncio.Event)

    def at(self, process: Process, step: str) -> str:
        """A call is made: in which way it fails, if it does."""
        self.calls[process.name, step] += 1
        if self.always and (self.always.member, self.always.step) == (process.name, step):
            return self.always.way
        if not self.script or (fault := self.script[0]).member != process.name or fault.step != step:
            return ""
        if self.calls[process.name, step] < fault.nth:
            return ""
        self.struck.append(self.script.pop(0))
        self.calls.clear()
        return fault.way


class ScriptedFabric:
    """See communicator.Fabric. An address is the number of a bucket."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self.world = process.world
        self.mates: dict[int, ScriptedFabric] = {}
        self.rank = 0
        self.operations: list[tuple[str, int, int]] = []
        """(what, bucket, peer) in the order they were enqueued."""
        self.copied = 0
        self.grouped: list[tuple[str, int, int]] = []
        self.stalled = self.ended = False
        self.aborted = asyncio.Event()

    def _at(self, step: str) -> None:
        way = self.world.at(self.process, step)
        if way == "die":
            self.process.die("killed")
        if way in ("die", "stuck"):
            raise _Hang(asyncio.Event())
        if way == "hang":
            raise _Hang(self.aborted)
        if way == "error":
            raise TransferFailed(f"{step}: remote process exited or there was a network error")
        if way == "stall":
            self.stalled = True

    def init(self, size: int, token: bytes, rank: int) -> None:
        self._at("init")
        self.rank, self.mates = rank, self.world.joined[token]
        assert rank not in self.mates, "a rank has formed the same communicator twice"
        self.mates[rank] = self
        if len(self.mates) < size:
            raise _Hang(self.world.complete[token])
        self.world.complete[token].set()

    def run(self, work: Callable[[], None]) -> None:
        self._at("run")
        work()

    def group_start(self) -> None:
        self._at("group_start")
        self.grouped = []

    def send(self, address: int, num_bytes: int, peer: int) -> None:
        self._at("send")
        self.grouped.append(("send", address, peer))

    def receive(self, address: int, num_bytes: int, peer: int) -> None:
        self._at("receive")
        self.grouped.append(("receive", address, peer))

    def group_end(self) -> None:
        self._at("group_end")
        self.operations += self.grouped

    def record(self) -> int:
        self._at("record")
        return len(self.operations)

    def done(self, event: int) -> bool:
        self._at("done")
        while self.copied < event and self._moves(self.copied):
            self.copied += 1
        return self.copied >= event

    def check(self) -> None:
        self._at("check")

    def abort(self) -> None:
        self._at("abort")
        self.ended = True
        self.aborted.set()

    def finalize(self) -> None:
        self._at("finalize")
        self.ended = True

    def _moves(self, index: int) -> bool:
        """Whether an operation can happen: it does, if the peer has its half of it."""
        what, bucket, peer = self.operations[index]
        mate = self.mates.get(peer)
        if self.stalled or self.ended or mate is None or mate.ended or mate.process.dead:
            return False
        half = ({"send": "receive", "receive": "send"}[what], self.rank)
        nth = sum((w, p) == (what, peer) for w, _, p in self.operations[:index])
        halves = [b for w, b, p in mate.operations if (w, p) == half]
        if nth >= len(halves):
            return False
        if what == "receive":
            self.process.second[bucket] = mate.process.live[halves[nth]]
        return True


class ScriptedLane:
    """See lane.Lane: calls are tasks, so that time can jump."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self.running = 0

    @property
    def idle(self) -> bool:
        return not self.running

    def start(self, function: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:
        outcome: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        if self.process.dead:
            return outcome
        self.running += 1
        self.process.task(self._run(outcome, function, args))
        return outcome

    def close(self) -> None:
        pass

    async def _run(self, outcome: asyncio.Future[Any], function: Callable[..., Any], args: tuple[Any, ...]) -> None:
        try:
            result = function(*args)
        except _Hang as hang:
            await hang.until.wait()
            self.running -= 1
            if not outcome.done():
                outcome.set_result(None)  # Of init, when all have come; of others, after an abort.
        except TransferFailed as error:
            self.running -= 1
            if not outcome.done():
                outcome.set_exception(error)
        else:
            self.running -= 1
            if not outcome.done():
                outcome.set_result(result)


class Process:
    """A member's process: what is asked of it fails with ActorDied from when it dies until it is there again."""

    def __init__(self, world: World, name: str) -> None:
        self.world, self.name = world, name
        self.deaths: list[str] = []
        self.tasks: set[asyncio.Task[Any]] = set()
        self.reborn: asyncio.Task[None] | None = None
        self._begin()

    def _begin(self) -> None:
        self.dead = False
        self.live = [0] * NUM_BUCKETS
        """The version of each bucket that is served."""
        self.second = [0] * NUM_BUCKETS
        self.communicator = Communicator(self.name, self._fabric, LIMITS, lambda _: ScriptedLane(self))

    def _fabric(self) -> Fabric:
        return ScriptedFabric(self)

    def task(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.get_running_loop().create_task(work, name=self.name)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task

    def die(self, why: str) -> None:
        if self.dead:
            return
        self.dead = True
        self.deaths.append(why)
        for task in self.tasks:
            task.cancel()
        self.reborn = asyncio.get_running_loop().create_task(self._restart())

    async def _restart(self) -> None:
        while self.tasks:
            for task in self.tasks:  # Nothing goes on in a process that is dead, no clearing up either.
                task.cancel()
            await asyncio.sleep(0)
        await asyncio.sleep(RESTART_S)
        self._begin()

    async def ask(self, work: Coroutine[Any, Any, Any]) -> Any:
        """As a message to an actor in this process."""
        if self.dead:
            work.close()
            raise ActorDied(f"{self.name} is dead")
        task = self.task(work)
        await asyncio.wait({task})
        if task.cancelled() or self.dead:
            if not task.cancelled():
                task.exception()
            raise ActorDied(f"{self.name} died: {self.deaths[-1:]}")
        return task.result()

    @property
    def version(self) -> int:
        """What it serves; -1 for a mixture."""
        return self.live[0] if len(set(self.live)) == 1 else -1

    async def open(self, epoch: int) -> bytes:
        async def open() -> bytes:
            return b"%d" % epoch

        return bytes(await self.ask(open()))

    async def transfer(self, manifest: Manifest, route: Route) -> None:
        await self.ask(self._transfer(manifest.version, route))

    async def retire(self, epoch: int) -> None:
        if not self.dead:
            self.communicator.tell(epoch, "another member has failed")
        await self.ask(self._retire(epoch))

    async def _transfer(self, version: int, route: Route) -> None:
        """A receiver swaps only when all has come."""
        receivers = [rank for rank, name in enumerate(route.members) if name not in PUBLISHERS]
        if self.name in PUBLISHERS:
            self.live = [version] * NUM_BUCKETS
        await self._or_die(
            self.communicator.transfer(
                route.epoch, lambda fabric: self._waves(route.rank, receivers), rank=route.rank,
                size=len(route.members), token=route.token, deadline_s=route.deadline_s, stall_s=route.stall_s,
            )
        )  # fmt: skip
        if self.name not in PUBLISHERS:
            self.live = list(self.second)

    async def _retire(self, epoch: int) -> None:
        while self.communicator.waits():  # noqa: ASYNC110 (as a thread would wait for the other)
            await asyncio.sleep(0.1)
        await self._or_die(self.communicator.retire(epoch))

    async def _or_die(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except CommunicatorHung as hung:
            self.die(str(hung))
            raise

    def _waves(self, rank: int, receivers: list[int]) -> list[Wave]:
        """Buckets 0 and 2 go to each receiver from the first publisher, bucket 1 from the second."""
        waves = []
        for bucket in range(NUM_BUCKETS):
            sends = [Part(r, bucket, 1) for r in receivers] if rank == bucket % 2 else []
            receives = [Part(bucket % 2, bucket, 1)] if rank in receivers else []
            waves.append(Wave(label=f"bucket {bucket}", sends=sends, receives=receives))
        return waves
