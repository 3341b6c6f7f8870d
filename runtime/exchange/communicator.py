"""One member's end of a collective transfer: forms the communicator of an epoch, moves waves of bytes, never hangs.

                transfer(epoch 3)                                  transfer(epoch 3): the next version, no init
    NONE --finalize the old, init--> FORMED --group: sends, receives--> moving --events done--> FORMED
      ^                                |                                  |
      '------------- abort <-----------+--- error, stall, deadline, told -+
                       '-- it fails, or something does not return even then --> LOST: this process must end

Every call of the library may block for ever, so each is made on a lane (lane.py): one for the calls, one for the looks
of the watchdog (event query, asynchronous error), a new one for each abort. Whoever awaits `transfer` is the watchdog:
it sees the first error, the first wave that does not end in time, the deadline, or that it was told to stop; then it
aborts and waits, for a bounded time, until nothing of the transfer runs any more. An init that hangs has no handle
that could be aborted (cupy's init blocks): it is the one fault that costs the process.

What has failed once stays failed: an epoch that is over is refused, so that no member forms it alone. Knows nothing of
weights, versions or cupy.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from ..errors import CommunicatorHung, TransferFailed
from .lane import Lane, ThreadLane, ended


class Fabric(Protocol):
    """A communicator of the library, before and after it was formed; made anew for each epoch.

    Raises TransferFailed for what the library reports. `init` to `record` are called from one thread, `done` and
    `check` from another, `abort` from a third at any time; `finalize` when nothing is under way.
    """

    def init(self, size: int, token: bytes, rank: int) -> None:
        """Returns when all `size` members have called it."""

    def run(self, work: Callable[[], None]) -> None:
        """Calls `work`, which enqueues; it happens in order with what is sent and received."""

    def group_start(self) -> None: ...

    def send(self, address: int, num_bytes: int, peer: int) -> None: ...

    def receive(self, address: int, num_bytes: int, peer: int) -> None: ...

    def group_end(self) -> None: ...

    def record(self) -> Any:
        """An event behind all that was enqueued until now."""

    def done(self, event: Any) -> bool:
        """Whether all before the event has happened."""

    def check(self) -> None:
        """Raises TransferFailed if the communicator has met an error in the meantime."""

    def abort(self) -> None:
        """Ends everything of this communicator; without a communicator, nothing."""

    def finalize(self) -> None:
        """Gives the communicator back."""


@dataclass(frozen=True, slots=True)
class Part:
    """Bytes to or from one peer."""

    peer: int
    """Rank"""
    address: int
    num_bytes: int


def _nothing() -> None:
    pass


@dataclass(frozen=True, kw_only=True, slots=True)
class Wave:
    """What one member does in one group of calls. All members have their waves in the same order."""

    label: str
    sends: Sequence[Part] = ()
    receives: Sequence[Part] = ()
    before: Callable[[], None] = _nothing
    """Enqueues what makes the bytes ready to be sent."""
    after: Callable[[], None] = _nothing
    """Enqueues what is to be done with those that came."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Times that a member waits, in seconds."""

    init_s: float = 30.0
    """For the others to form a communicator with it."""
    connect_s: float = 10.0
    """For the first wave of a communicator, in which the library makes its connections."""
    look_s: float = 2.0
    """For an event query or the check for errors to return."""
    abort_s: float = 2.0
    """For an abort to return, then for all else to return; and for a communicator to be given back."""
    poll_s: float = 0.001
    """Between two looks at the events."""
    check_s: float = 0.1
    """Between two looks for asynchronous errors."""


@dataclass(slots=True)
class _Run:
    """A transfer that goes on."""

    epoch: int
    loop: asyncio.AbstractEventLoop
    told: asyncio.Event
    since: float
    due: float
    why: str = ""
    """Who told it to stop, and why."""
    over: bool = False
    """Nothing is enqueued any more."""
    events: list[Any] = field(default_factory=list)
    """One per wave that was enqueued."""


class Communicator:
    """See above. `transfer` and `close` are awaited by one task at a time; `tell` and `waits` come from any thread."""

    def __init__(
        self,
        name: str,
        make: Callable[[], Fabric],
        limits: Limits | None = None,
        lane: Callable[[str], Lane] = ThreadLane,
    ) -> None:
        self.name = name
        self.epoch = -1
        """Of the communicator that there is, or was last."""
        self.over = -1
        """Epochs up to this one are refused."""
        self.lost = ""
        """Why this process must end; then nothing works any more."""
        self._make = make
        self._limits = limits or Limits()
        self._lane = lane
        self._fabric: Fabric | None = None
        self._calls: Lane | None = None
        self._looks: Lane | None = None
        self._run: _Run | None = None
        self._lock = threading.Lock()
        """Of `_run` and `over`: who is admitted is told to stop, and its loop is not closed meanwhile."""
        self._rank, self._size = 0, 0
        self._connected = False
        """A wave has ended in this communicator."""
        self._step = ""
        """The call that is being made."""

    async def transfer(
        self,
        epoch: int,
        waves: Callable[[Fabric], Sequence[Wave]],
        *,
        rank: int,
        size: int,
        token: bytes,
        deadline_s: float,
        stall_s: float,
    ) -> None:
        """Takes part in the transfer of `waves`, and returns when all of this member's have been sent and received.

        `stall_s`: the time in which a wave must end; the first has Limits.connect_s, if that is more. Raises
        TransferFailed: nothing of it runs any more, and the epoch is over. Raises CommunicatorHung: this process must
        end.
        """
        loop = asyncio.get_running_loop()
        run = _Run(epoch, loop, asyncio.Event(), loop.time(), loop.time() + deadline_s)
        with self._lock:
            self._admit(epoch)
            self._run = run
        try:
            if self._fabric is None or epoch != self.epoch:
                await self._finalize()
                await self._form(run, epoch, size, token, rank)
            assert self._fabric is not None
            await self._move(run, waves(self._fabric), stall_s)
        except BaseException:
            self.over = max(self.over, epoch)
            run.over = True
            await self._abort()
            raise
        finally:
            with self._lock:
                self._run = None

    def tell(self, epoch: int, why: str) -> None:
        """Has what goes on in this epoch, or an earlier one, end soon; from now on they are refused."""
        with self._lock:
            self.over = max(self.over, epoch)
            run = self._run
            if run is not None and run.epoch <= epoch:
                run.why, run.over = why, True
                run.loop.call_soon_threadsafe(run.told.set)

    async def retire(self, epoch: int) -> None:
        """Gives back the communicator of this epoch or an earlier one, so that nothing stands between all members and
        the next init: whoever waits there for one that does not come is lost. Raises CommunicatorHung."""
        self.over = max(self.over, epoch)
        if self._run is None and self.epoch <= epoch:
            await self._finalize()

    async def close(self) -> None:
        """Gives the communicator back. Raises CommunicatorHung."""
        await self._finalize()

    def waits(self) -> list[dict[str, Any]]:
        """What it waits for, as waits.Waits.rows."""
        run = self._run
        if run is None:
            return []
        now = run.loop.time()
        return [
            {
                "owner": self.name, "target": f"rank {self._rank} of {self._size}, epoch {self.epoch}",
                "method": self._step, "why": run.why or "the other members have not done their part yet",
                "waited_s": round(now - run.since, 3), "left_s": round(run.due - now, 3),
            }
        ]  # fmt: skip

    def _admit(self, epoch: int) -> None:
        if self.lost:
            raise CommunicatorHung(self.lost)
        if self._run is not None:
            raise TransferFailed(f"{self.name} takes part in another transfer; abort it first")
        if epoch <= self.over or epoch < self.epoch:
            raise TransferFailed(f"{self.name}: epoch {epoch} is over here; repeat the transfer under a higher one")

    async def _form(self, run: _Run, epoch: int, size: int, token: bytes, rank: int) -> None:
        self.epoch, self._rank, self._size = epoch, rank, size
        self._fabric = fabric = self._make()
        self._calls, self._looks = self._lane(f"{self.name}/calls"), self._lane(f"{self.name}/looks")
        self._step, self._connected = "init", False
        forming = self._calls.start(fabric.init, size, token, rank)
        told = asyncio.ensure_future(run.told.wait())
        limit_s = min(self._limits.init_s, run.due - run.loop.time())
        try:
            await asyncio.wait({forming, told}, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
            self._heed(run)
            if not forming.done():
                raise TransferFailed(f"{self._where()}: not all members have come within {limit_s:.3g} s")
            forming.result()
        finally:
            _give_up(forming)
            told.cancel()

    async def _move(self, run: _Run, waves: Sequence[Wave], stall_s: float) -> None:
        """Enqueues all waves, and watches them end one after the other."""
        assert self._fabric is not None and self._calls is not None
        clock = run.loop.time
        enqueued = self._calls.start(self._enqueue, run, self._fabric, waves)
        finished, since, checked = 0, clock(), clock()
        try:
            while True:
                at_end = finished == len(waves) and enqueued.done()
                check = at_end or clock() - checked >= self._limits.check_s
                before, finished = finished, await self._look(run, finished, check)
                if enqueued.done():
                    enqueued.result()
                if at_end:
                    return  # With a look for errors after the last wave.
                if check:
                    checked = clock()
                if finished > before:
                    since, self._connected = clock(), True
                self._heed(run)
                self._require_progress(run, waves, finished, since, stall_s)
                await asyncio.sleep(self._limits.poll_s)
        finally:
            _give_up(enqueued)

    def _require_progress(self, run: _Run, waves: Sequence[Wave], finished: int, since: float, stall_s: float) -> None:
        """Raises TransferFailed if the next wave, or all of it, takes too long."""
        waited_for = waves[finished].label if finished < len(waves) else "what was enqueued last"
        allowed_s = stall_s if self._connected else max(stall_s, self._limits.connect_s)
        stalled, late = run.loop.time() - since > allowed_s, run.loop.time() > run.due
        if stalled or late:
            why = f"nothing moved for {allowed_s:.3g} s" if stalled else "the deadline has passed"
            raise TransferFailed(
                f"{self._where()}: {why}, waiting for {waited_for} ({finished} of {len(waves)} waves are done)"
            )

    def _enqueue(self, run: _Run, fabric: Fabric, waves: Sequence[Wave]) -> None:
        """On the lane for calls."""
        for wave in waves:
            self._note(run, "pack", wave)
            fabric.run(wave.before)
            self._note(run, "group start", wave)
            fabric.group_start()
            for part in wave.sends:
                self._note(run, "send", wave)
                fabric.send(part.address, part.num_bytes, part.peer)
            for part in wave.receives:
                self._note(run, "receive", wave)
                fabric.receive(part.address, part.num_bytes, part.peer)
            self._note(run, "group end", wave)
            fabric.group_end()
            self._note(run, "unpack", wave)
            fabric.run(wave.after)
            self._note(run, "event", wave)
            run.events.append(fabric.record())

    def _note(self, run: _Run, step: str, wave: Wave) -> None:
        if run.over:
            raise TransferFailed(f"{self.name}: {run.why or 'the transfer was given up'}")
        self._step = f"{step} of {wave.label}"

    async def _look(self, run: _Run, finished: int, check: bool) -> int:
        """How many waves have ended."""
        assert self._fabric is not None and self._looks is not None
        look = self._looks.start(_looked, self._fabric, run.events, finished, check)
        try:
            if not await ended(look, self._limits.look_s):
                raise TransferFailed(
                    f"{self._where()}: a look at its events has not returned in {self._limits.look_s:g} s"
                )
            return int(look.result())
        finally:
            _give_up(look)

    def _heed(self, run: _Run) -> None:
        if run.told.is_set():
            raise TransferFailed(f"{self._where()}: told to stop: {run.why}")

    async def _finalize(self) -> None:
        """Gives an idle communicator back; one that does not let itself be given back is aborted."""
        if self._fabric is None or self._calls is None:
            return
        self._step = "finalize"
        given_back = self._calls.start(self._fabric.finalize)
        if not await ended(given_back, self._limits.abort_s) or given_back.exception() is not None:
            _give_up(given_back)
            await self._abort()
            return
        self._close_lanes()

    async def _abort(self) -> None:
        """Ends what there is. Afterwards nothing of it runs any more, or this process is lost."""
        fabric, limits = self._fabric, self._limits
        if fabric is None or self._calls is None or self._looks is None:
            return
        lane = self._lane(f"{self.name}/abort")
        problem = await self._aborted(lane, fabric)
        if not problem and not await _idle(self._calls, self._looks, limits.abort_s):
            problem = f"{self._step} has not returned {limits.abort_s:g} s after an abort"
        # An init that ended only now has left a communicator behind.
        problem = problem or await self._aborted(lane, fabric)
        lane.close()
        self._close_lanes()
        if problem:
            self.lost = f"{self._where()}: {problem}; this process must end, for the library may still use its memory"
            raise CommunicatorHung(self.lost)

    async def _aborted(self, lane: Lane, fabric: Fabric) -> str:
        """What went wrong with it."""
        aborted = lane.start(fabric.abort)
        if not await ended(aborted, self._limits.abort_s):
            _give_up(aborted)
            return f"the abort after {self._step} has not returned in {self._limits.abort_s:g} s"
        error = aborted.exception()
        return "" if error is None else f"the abort after {self._step} failed: {error}"

    def _close_lanes(self) -> None:
        for lane in (self._calls, self._looks):
            if lane is not None:
                lane.close()
        self._fabric = self._calls = self._looks = None

    def _where(self) -> str:
        return f"{self.name}, rank {self._rank} of {self._size} in epoch {self.epoch}, at {self._step}"


def _give_up(call: asyncio.Future[Any]) -> None:
    """Nobody waits for it any more; an error that it had, or has yet, is of no interest."""
    if not call.cancel() and not call.cancelled():
        call.exception()


def _looked(fabric: Fabric, events: list[Any], finished: int, check: bool) -> int:
    """On the lane for looks."""
    if check:
        fabric.check()
    while finished < len(events) and fabric.done(events[finished]):
        finished += 1
    return finished


async def _idle(calls: Lane, looks: Lane, within_s: float) -> bool:
    """Whether both lanes become idle in time."""
    loop = asyncio.get_running_loop()
    due = loop.time() + within_s
    pause = 0.001
    while not (calls.idle and looks.idle):
        if loop.time() >= due:
            return False
        await asyncio.sleep(pause)
        pause = min(2 * pause, 0.05)
    return True
