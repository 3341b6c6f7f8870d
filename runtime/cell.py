"""One actor at work: takes messages from its mailbox, runs their handlers, answers.

    starting --start()--> serving --close()--> stopped        orderly
                             '----exception in start, a cast or a background task----> failed

Messages that take turns and messages that may overlap have a mailbox each: a long turn holds up no overlapping one.
Knows its node only as the place where answers go. Who restarts a failed cell is the supervisor's business.
"""

from __future__ import annotations

import asyncio
import contextvars
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from math import inf
from typing import Any, Protocol

from .actor import Actor
from .deadline import enter
from .doors import Delivery, Door
from .errors import ActorDied, DeadlineExceeded, RuntimeFault
from .mailbox import CreditDebt, CreditWindow, Lane, Mailbox
from .protocol import STREAM_WINDOW, STREAM_WINDOW_BYTES, Kind, window_of
from .turns import Begun, enter_task, leave_task

STOP_S = 5.0
"""Time that an actor's `stop` may take."""

SLICE_S = 0.001
"""Turns follow each other at once for so long; then the loop's other work has its turn."""


class Answers(Protocol):
    """What a cell needs of its node."""

    counters: Counter[str]

    def answer(self, delivery: Delivery, kind: int, value: Any) -> int:
        """Sends an answer; returns its size in bytes. Raises CodecError if the value can't travel."""

    def acknowledge(self, delivery: Delivery, what: str) -> None:
        """Tells the caller what became of a message that it has withdrawn, and that it does not run."""

    def shut(self, cell: Cell) -> None:
        """Forgets the doors that lead to a cell."""

    def pay(self, sender: str, actor: str, lane: Lane, messages: int, size: int) -> None:
        """Returns credits to a node."""

    def dead_letter(self, delivery: Delivery, error: RuntimeFault, *, begun: bool = False) -> None:
        """A message will not be handled to its end: keeps it on record and tells its sender."""


class Memory(Protocol):
    """What a cell tells of its life to that which keeps the actor's state."""

    def started(self) -> None:
        """`start` has returned; no message was handled yet."""

    def turn_ended(self) -> None:
        """A message that takes turns was handled, and the next was not begun."""

    async def close(self, *, orderly: bool) -> None:
        """The last message was handled; `orderly`: the actor has not failed."""


class _Stop(BaseException):
    """Ends the cell's task group from inside."""


class Cell:
    """Hosts one incarnation of one actor. `await run()` returns at an orderly stop and raises what made it fail."""

    def __init__(self, actor: Actor, name: str, incarnation: int, node: Answers) -> None:
        self.actor = actor
        self.name = name
        self.incarnation = incarnation
        self.turns: Mailbox[Delivery] = Mailbox(actor.mailbox_capacity, actor.mailbox_bytes)
        self.overlapping: Mailbox[Delivery] = Mailbox(actor.mailbox_capacity, actor.mailbox_bytes)
        self._loop = asyncio.get_running_loop()
        self.up: asyncio.Future[None] = self._loop.create_future()
        """Done when `start` has returned; carries its exception if it raised."""
        self.memory: Memory | None = None
        self.handled = 0
        """Messages whose handler was begun."""
        self.ended = False
        self._node = node
        self._clock = self._loop.time
        self._debts: dict[tuple[str, Lane], CreditDebt] = {}
        self._turn: tuple[asyncio.Task[None], Delivery] | None = None
        self._running: dict[tuple[str, int], tuple[asyncio.Task[None], Delivery]] = {}
        """Messages that overlap."""
        self._turns: asyncio.Task[None] | None = None
        self._context = contextvars.copy_context()
        """Of the task of the turns, and so of their first steps."""
        self.tracers: tuple[Callable[[Door, Callable[..., Any]], Callable[..., Any]], ...] = ()
        """Wrap the handlers of doors that are opened; see repl/tracing.py."""
        self._begun: Begun | None = None
        """The rest of a turn whose first step was made at once."""
        self._closing: asyncio.Future[None] = self._loop.create_future()
        self._starting: asyncio.Task[None] | None = None

    def open(self, door: Door, *, credited: bool) -> None:
        """Makes a door lead here, to a message that the actor has."""
        spec = self.actor.messages[door.method]
        door.mailbox = self.overlapping if spec.concurrent else self.turns
        door.handler = getattr(self.actor, door.method)
        door.kind = spec.kind
        for tracer in self.tracers:
            door.handler = tracer(door, door.handler)
        door.at_once = spec.kind == "async" and not spec.concurrent and self.memory is None
        if credited:
            window = window_of(self.actor.mailbox_capacity, self.actor.mailbox_bytes)
            door.debt = self._debts.setdefault((door.origin, door.lane), CreditDebt(*window))
        door.cell = self

    def admit(self, door: Door, work: Callable[[], Any]) -> None:
        """Makes a door lead here, to work that is no message of the actor's class but takes its turn as one."""
        door.mailbox, door.handler, door.kind, door.cell = self.turns, work, "async", self

    def pause(self, paused: bool) -> None:
        """Paused, messages below the control lane wait; those at work go on."""
        last = Lane.CONTROL if paused else Lane.BULK
        for mailbox in (self.turns, self.overlapping):
            mailbox.open_until(last)

    def at_once(self, delivery: Delivery) -> bool:
        """Handles a message here and now, up to where it waits for something, if the actor is idle: most have ended by
        then, and cost no task switch. The task of the turns goes on with the others. False if it must queue."""
        task = self._turns
        if task is None or not self.turns.awaited or delivery.door.lane > self.turns.last:
            return False
        try:
            enter_task(self._loop, task)
        except RuntimeError:
            return False  # This is called by a task, into which no other can be put.
        try:
            if self._begin(delivery):
                self._turn = task, delivery
                self._context.run(self._first_step, delivery)
        finally:
            leave_task(self._loop, task)
        return True

    def cancel(self, key: tuple[str, int]) -> bool:
        """Stops the handler of one message, running or not yet begun, which is acknowledged as soon as it does not run.
        False if there is none."""
        working = self._running.get(key) or self._turn
        if working is not None and working[1].key == key:
            task, delivery = working
            if not delivery.withdrawn:  # A second time would cancel whatever the task does next.
                delivery.withdrawn = True
                task.cancel()
            return True
        removed = self._remove(lambda waiting: waiting.id == key[1] and waiting.key == key)
        for delivery in removed:
            self._node.counters["withdrawn"] += delivery.door.counted
            self._node.acknowledge(delivery, "never begun")
        return bool(removed)

    def cancel_origin(self, origin: str) -> None:
        """Stops what a node that is gone waited for. Its casts are handled: nobody waits for them anyway."""
        for key, (_, delivery) in [*self._running.items(), *([(self._turn[1].key, self._turn)] if self._turn else [])]:
            if key[0] == origin and delivery.kind != Kind.CAST:
                self.cancel(key)
        removed = self._remove(lambda waiting: waiting.door.origin == origin and waiting.kind != Kind.CAST)
        self._node.counters["withdrawn"] += sum(delivery.door.counted for delivery in removed)
        self._debts = {slot: debt for slot, debt in self._debts.items() if slot[0] != origin}

    @property
    def idle(self) -> bool:
        """Nothing is handled, and nothing waits."""
        return not (self._running or self._turn or len(self.turns) or len(self.overlapping))

    @property
    def between_turns(self) -> bool:
        """No message that takes turns is being handled."""
        return self._turn is None

    def stream(self, key: tuple[str, int]) -> CreditWindow | None:
        """The credits of a stream that is being answered, or None."""
        working = self._running.get(key) or self._turn
        return working[1].window if working is not None and working[1].key == key else None

    def at_work(self) -> list[Delivery]:
        """The messages that are being handled."""
        turn = [] if self._turn is None else [self._turn[1]]
        return [*turn, *(delivery for _, delivery in self._running.values())]

    def close(self) -> None:
        """Asks the cell to stop. `start` and handlers at work are cancelled; what runs on a thread is waited for."""
        if not self._closing.done():
            self._closing.set_result(None)
        if self._starting is not None:
            self._starting.cancel()

    async def run(self) -> None:
        reason: BaseException | None = None
        try:
            async with asyncio.TaskGroup() as tasks:
                self.actor._tasks = tasks
                self._starting = asyncio.current_task()
                await self.actor.start()
                self._starting = None
                if self.memory is not None:
                    self.memory.started()
                self.up.set_result(None)
                self._turns = tasks.create_task(self._take_turns(), context=self._context)
                if any(spec.concurrent for spec in self.actor.messages.values()):
                    tasks.create_task(self._overlap(tasks), name=f"{self.name}:overlapping")
                await self._closing
                raise _Stop
        except* _Stop:
            pass
        except* BaseException as group:  # noqa: BLE001 (the edge of an actor: its supervisor gets it)
            reason = _first(group)
        self.actor._tasks = self._starting = None
        try:
            if self.memory is not None:
                await self.memory.close(orderly=reason is None)
            reason = await self._stop(reason)
        finally:
            self._bury(reason)
        if reason is not None:
            raise reason

    async def _stop(self, reason: BaseException | None) -> BaseException | None:
        """Gives the actor a bounded time to close; returns why it ended."""
        stopping = asyncio.create_task(self.actor.stop(reason), name=f"{self.name}:stop")
        try:
            _, late = await asyncio.wait([stopping], timeout=STOP_S)
        finally:
            stopping.cancel()
            stopping.add_done_callback(lambda task: task.cancelled() or task.exception())
        if late:
            return reason or DeadlineExceeded(f"{self.name}: stop() took longer than {STOP_S:g} s")
        return reason or (None if stopping.cancelled() else stopping.exception())

    def _bury(self, reason: BaseException | None) -> None:
        self.ended = True
        if self.actor._thread is not None:
            self.actor._thread.close()
        why = f"the actor stopped ({reason or 'in good order'}) before its turn"
        for delivery in self._remove(lambda _: True):
            died = ActorDied(f"{delivery.owner} did not run: {why}; ask again")
            self._node.dead_letter(delivery, died)
        self._node.shut(self)
        for (sender, lane), debt in self._debts.items():
            if debt.messages:
                self._node.pay(sender, self.name, lane, *debt.pay())
        if not self.up.done():
            if reason is None or isinstance(reason, asyncio.CancelledError):
                reason = ActorDied(f"{self.name} was stopped before it was up")
            self.up.set_exception(reason)
            self.up.exception()

    async def _take_turns(self) -> None:
        """Handles messages one after the other, in this task: a task for each would cost more than most turns."""
        task = asyncio.current_task()
        assert task is not None
        mailbox, now = self.turns, time.perf_counter
        began = now()
        while True:
            begun, self._begun = self._begun, None
            if begun is not None:
                assert self._turn is not None
                delivery = self._turn[1]
            else:
                waiting = mailbox.take()
                if waiting is None:
                    enter(None)  # An idle actor keeps no arrays alive.
                    await self._wait()
                    continue
                delivery = waiting
                if not self._begin(delivery):
                    continue
                self._turn = task, delivery
            try:
                await self._handle(delivery, begun)
            except asyncio.CancelledError:
                if not delivery.withdrawn:
                    self._abandon(delivery)
                    raise
                self._node.acknowledge(delivery, "stopped")
            finally:
                self._turn = None
            if self.memory is not None:
                self.memory.turn_ended()
            if delivery.withdrawn:
                task.uncancel()
            if task.cancelling():
                raise asyncio.CancelledError  # The cell was stopped in the same turn of the loop.
            if now() - began > SLICE_S:
                await asyncio.sleep(0)
                began = now()

    async def _wait(self) -> None:
        """Waits for something to do."""
        try:
            await self.turns.wait()
        except asyncio.CancelledError as error:
            if self._begun is None:
                raise
            self._begun.cancel(error)

    def _first_step(self, delivery: Delivery) -> None:
        """Begins a message, in the context of the task of the turns, which takes over unless it has ended well."""
        enter(delivery)
        try:
            work = delivery.door.handler(*delivery.args, **delivery.kwargs)
            try:
                waits_for = work.send(None)
            except StopIteration as end:
                value = end.value
            else:
                self._begun = Begun(work, waits_for)
                self.turns.wake()
                return
            if delivery.kind == Kind.CALL:
                self._node.answer(delivery, Kind.REPLY, value)
        except BaseException as error:  # noqa: BLE001 (the task tells the caller)
            self._begun = Begun(None, None, error)
            self.turns.wake()
        else:
            self._turn = None
            delivery.args, delivery.kwargs = (), {}
            enter(None)

    async def _overlap(self, tasks: asyncio.TaskGroup) -> None:
        """Handles messages as they come, each in a task of its own."""
        while True:
            delivery = await self.overlapping.get()
            if self._begin(delivery):
                task = tasks.create_task(self._handle(delivery), name=delivery.owner)
                self._running[delivery.key] = task, delivery
                task.add_done_callback(partial(self._ended, delivery))
                del task
            del delivery

    def _begin(self, delivery: Delivery) -> bool:
        """A message has left its mailbox. False if it is too late for it."""
        self._taken(delivery)
        if delivery.limit >= self._clock():
            self.handled += 1
            self._node.counters["handled"] += delivery.door.counted
            return True
        self._node.counters["expired"] += 1
        late = f"{delivery.owner} did not run: its deadline passed before its turn"
        self._node.dead_letter(delivery, DeadlineExceeded(late))
        return False

    async def _handle(self, delivery: Delivery, begun: Begun | None = None) -> None:
        door = delivery.door
        if begun is None:
            enter(delivery)
        try:
            if begun is not None:
                value = await begun
            elif door.kind == "async":
                value = await door.handler(*delivery.args, **delivery.kwargs)
            elif door.kind == "thread":
                value = await self.actor.in_thread(partial(door.handler, *delivery.args, **delivery.kwargs))
            else:
                delivery.limit = inf  # It bounds the wait for each item: what is called for them has its own.
                await self._stream(delivery, door.handler)
                return
            if delivery.kind == Kind.CALL:
                self._node.answer(delivery, Kind.REPLY, value)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            self._fail(delivery, RuntimeError(f"{door.method} awaited something that was cancelled"))
        except Exception as error:  # noqa: BLE001 (the edge of an actor: the caller gets it)
            self._fail(delivery, error)
        finally:
            delivery.args, delivery.kwargs = (), {}  # What was begun meanwhile has it in its context, for long.

    async def _stream(self, delivery: Delivery, handler: Callable[..., Any]) -> None:
        delivery.window = CreditWindow(STREAM_WINDOW, STREAM_WINDOW_BYTES)
        items = handler(*delivery.args, **delivery.kwargs)
        try:
            async for item in items:
                await delivery.window.take()
                delivery.window.charge(self._node.answer(delivery, Kind.ITEM, item))
                delivery.items += 1
        finally:
            await items.aclose()
        self._node.answer(delivery, Kind.END, None)

    def _remove(self, matches: Callable[[Delivery], bool]) -> list[Delivery]:
        removed = self.turns.remove(matches) + self.overlapping.remove(matches)
        for delivery in removed:
            self._taken(delivery)
        return removed

    def _taken(self, delivery: Delivery) -> None:
        door = delivery.door
        if door.debt is not None and door.debt.add(delivery.size):
            self._node.pay(door.origin, self.name, door.lane, *door.debt.pay())

    def _ended(self, delivery: Delivery, task: asyncio.Task[None]) -> None:
        # Here and not in the handler: a task that is cancelled before its first step runs none of its code.
        self._running.pop(delivery.key, None)  # A hostile peer may use a number twice.
        if task.cancelled() and delivery.withdrawn:
            self._node.acknowledge(delivery, "stopped")
        elif task.cancelled():
            self._abandon(delivery)

    def _abandon(self, delivery: Delivery) -> None:
        stopped = ActorDied(f"{self.name} stopped while it worked on {delivery.door.method}; it may have run")
        self._node.dead_letter(delivery, stopped, begun=True)

    def _fail(self, delivery: Delivery, error: Exception) -> None:
        """To the caller, or if there is none to the supervisor."""
        if delivery.kind == Kind.CAST:
            raise error
        self._node.answer(delivery, Kind.ERROR, error)


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
