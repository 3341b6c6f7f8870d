"""One actor at work: takes messages from its mailbox, runs their handlers, answers.

    starting --start()--> serving --close()--> stopped        orderly
                             '----exception in start, a cast or a background task----> failed

Messages that take turns and messages that may overlap have a mailbox each: a long turn holds up no overlapping one.
Knows its node only as the place where answers go. Who restarts a failed cell is the supervisor's business.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from .actor import Actor, MessageSpec
from .deadline import set_limit
from .errors import ActorDied, DeadlineExceeded, MailboxFull, RuntimeFault, UnknownMessage
from .mailbox import CreditWindow, Lane, Mailbox
from .protocol import STREAM_WINDOW, Kind, window_of

STOP_S = 5.0
"""Time that an actor's `stop` may take."""

SLICE_S = 0.001
"""Turns follow each other at once for so long; then the loop's other work has its turn."""


@dataclass(slots=True, eq=False)
class Delivery:
    """One message for one cell, already decoded."""

    kind: Kind
    id: int
    origin: str
    """Key of the sending node."""
    method: str
    lane: Lane
    deadline: float | None
    """Loop time, or None."""
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    credited: bool = False
    """It came by a credit of its sender, which gets it back when the message has left the mailbox."""
    window: CreditWindow | None = None
    """For a stream: items that may be under way to the caller."""
    withdrawn: bool = False
    """The caller has given it up."""

    @property
    def key(self) -> tuple[str, int]:
        return self.origin, self.id


class Answers(Protocol):
    """What a cell needs of its node."""

    def answer(self, delivery: Delivery, kind: Kind, value: Any) -> None:
        """Sends an answer. Raises CodecError if the value can't travel."""

    def taken(self, delivery: Delivery, actor: str) -> None:
        """A message has left the mailbox."""

    def dead_letter(self, delivery: Delivery, actor: str, error: RuntimeFault) -> None:
        """A message will not be handled to its end: keeps it on record and tells its sender."""


class _Stop(BaseException):
    """Ends the cell's task group from inside."""


class Cell:
    """Hosts one incarnation of one actor. `await run()` returns at an orderly stop and raises what made it fail."""

    def __init__(self, actor: Actor, name: str, incarnation: int, node: Answers) -> None:
        self.actor = actor
        self.name = name
        self.incarnation = incarnation
        self.turns: Mailbox[Delivery] = Mailbox(actor.mailbox_capacity)
        self.overlapping: Mailbox[Delivery] = Mailbox(actor.mailbox_capacity)
        self.window = window_of(actor.mailbox_capacity)
        self.up: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done when `start` has returned; carries its exception if it raised."""
        self._node = node
        self._running: dict[tuple[str, int], tuple[asyncio.Task[None], Delivery]] = {}
        self._closing = asyncio.Event()
        self._starting: asyncio.Task[None] | None = None

    def deliver(self, delivery: Delivery) -> None:
        """Queues a message. Raises UnknownMessage, MailboxFull."""
        spec = self.actor.messages.get(delivery.method)
        if spec is None:
            raise UnknownMessage(f"{self.name} ({type(self.actor).__name__}) has no @message {delivery.method!r}")
        if (spec.kind == "stream") != (delivery.kind is Kind.STREAM):
            remedy = "it answers many times: ask it with .stream(...)" if spec.kind == "stream" else "call it instead"
            raise UnknownMessage(f"{self.name}.{delivery.method} is no {delivery.kind.name.lower()}; {remedy}")
        try:
            self._mailbox(spec).put(delivery, delivery.lane, credited=delivery.credited)
        except MailboxFull as error:
            raise MailboxFull(f"{self.name}: {error}; slow down, or call, which waits for room") from None

    async def room(self, method: str, lane: Lane) -> None:
        """Waits until `deliver` would not raise MailboxFull."""
        spec = self.actor.messages.get(method)
        if spec is not None:
            await self._mailbox(spec).room(lane)

    def cancel(self, key: tuple[str, int]) -> None:
        """Stops the handler of one message, running or not yet begun."""
        if key in self._running:
            task, delivery = self._running[key]
            delivery.withdrawn = True
            task.cancel()
            return
        for delivery in self._remove(lambda waiting: waiting.key == key):
            self._node.taken(delivery, self.name)

    def cancel_origin(self, origin: str) -> None:
        """Stops what a node that is gone waited for. Its casts are handled: nobody waits for them anyway."""
        for key, (_, delivery) in list(self._running.items()):
            if key[0] == origin and delivery.kind is not Kind.CAST:
                self.cancel(key)
        self._remove(lambda waiting: waiting.origin == origin and waiting.kind is not Kind.CAST)

    def stream(self, key: tuple[str, int]) -> CreditWindow | None:
        """The credits of a stream that is being answered, or None."""
        running = self._running.get(key)
        return None if running is None else running[1].window

    def close(self) -> None:
        """Asks the cell to stop. `start` and handlers at work are cancelled; what runs on a thread is waited for."""
        self._closing.set()
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
                self.up.set_result(None)
                tasks.create_task(self._take_turns())
                tasks.create_task(self._overlap(tasks), name=f"{self.name}:overlapping")
                await self._closing.wait()
                raise _Stop
        except* _Stop:
            pass
        except* BaseException as group:  # noqa: BLE001 (the edge of an actor: its supervisor gets it)
            reason = _first(group)
        self.actor._tasks = self._starting = None
        try:
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
        if self.actor._thread is not None:
            self.actor._thread.close()
        why = f"the actor stopped ({reason or 'in good order'}) before its turn"
        for delivery in self._remove(lambda _: True):
            self._node.taken(delivery, self.name)
            self._node.dead_letter(
                delivery, self.name, ActorDied(f"{self.name}.{delivery.method} did not run: {why}; ask again")
            )
        if not self.up.done():
            if reason is None or isinstance(reason, asyncio.CancelledError):
                reason = ActorDied(f"{self.name} was stopped before it was up")
            self.up.set_exception(reason)
            self.up.exception()

    async def _take_turns(self) -> None:
        """Handles messages one after the other, in this task: a task for each would cost more than most turns."""
        task = asyncio.current_task()
        assert task is not None
        began = time.perf_counter()
        while True:
            delivery = await self._next(self.turns)
            task.set_name(f"{self.name}.{delivery.method}")
            self._running[delivery.key] = task, delivery
            try:
                await self._handle(delivery)
            except asyncio.CancelledError:
                if not delivery.withdrawn:
                    self._abandon(delivery)
                    raise
            finally:
                del self._running[delivery.key]
            if delivery.withdrawn and task.uncancel():
                raise asyncio.CancelledError  # The cell was stopped in the same turn of the loop.
            del delivery  # Its arrays are held no longer than its turn.
            if time.perf_counter() - began > SLICE_S:
                await asyncio.sleep(0)
                began = time.perf_counter()

    async def _overlap(self, tasks: asyncio.TaskGroup) -> None:
        """Handles messages as they come, each in a task of its own."""
        while True:
            delivery = await self._next(self.overlapping)
            task = tasks.create_task(self._handle(delivery), name=f"{self.name}.{delivery.method}")
            self._running[delivery.key] = task, delivery
            task.add_done_callback(partial(self._ended, delivery))

    async def _next(self, mailbox: Mailbox[Delivery]) -> Delivery:
        while True:
            delivery = await mailbox.get()
            self._node.taken(delivery, self.name)
            if delivery.deadline is None or delivery.deadline >= asyncio.get_running_loop().time():
                return delivery
            late = f"{self.name}.{delivery.method} did not run: its deadline passed before its turn"
            self._node.dead_letter(delivery, self.name, DeadlineExceeded(late))

    async def _handle(self, delivery: Delivery) -> None:
        spec = self.actor.messages[delivery.method]
        set_limit(delivery.deadline if spec.kind != "stream" else None)
        handler: Callable[..., Any] = getattr(self.actor, delivery.method)
        try:
            if spec.kind == "stream":
                await self._stream(delivery, handler)
                return
            if spec.kind == "thread":
                value = await self.actor.in_thread(partial(handler, *delivery.args, **delivery.kwargs))
            else:
                value = await handler(*delivery.args, **delivery.kwargs)
            if delivery.kind is Kind.CALL:
                self._node.answer(delivery, Kind.REPLY, value)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            self._fail(delivery, RuntimeError(f"{delivery.method} awaited something that was cancelled"))
        except Exception as error:  # noqa: BLE001 (the edge of an actor: the caller gets it)
            self._fail(delivery, error)

    async def _stream(self, delivery: Delivery, handler: Callable[..., Any]) -> None:
        delivery.window = CreditWindow(STREAM_WINDOW)
        items = handler(*delivery.args, **delivery.kwargs)
        try:
            async for item in items:
                await delivery.window.take()
                self._node.answer(delivery, Kind.ITEM, item)
        finally:
            await items.aclose()
        self._node.answer(delivery, Kind.END, None)

    def _mailbox(self, spec: MessageSpec) -> Mailbox[Delivery]:
        return self.overlapping if spec.concurrent else self.turns

    def _remove(self, matches: Callable[[Delivery], bool]) -> list[Delivery]:
        return self.turns.remove(matches) + self.overlapping.remove(matches)

    def _ended(self, delivery: Delivery, task: asyncio.Task[None]) -> None:
        # Here and not in the handler: a task that is cancelled before its first step runs none of its code.
        del self._running[delivery.key]
        if task.cancelled() and not delivery.withdrawn:
            self._abandon(delivery)

    def _abandon(self, delivery: Delivery) -> None:
        stopped = ActorDied(f"{self.name} stopped while it worked on {delivery.method}; it may have run")
        self._node.dead_letter(delivery, self.name, stopped)

    def _fail(self, delivery: Delivery, error: Exception) -> None:
        """To the caller, or if there is none to the supervisor."""
        if delivery.kind is Kind.CAST:
            raise error
        self._node.answer(delivery, Kind.ERROR, error)


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
