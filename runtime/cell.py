"""One actor at work: takes messages from its mailbox, runs their handlers, answers.

    starting --start()--> serving --close()--> stopped        orderly
                             '----exception in start, a cast or a background task----> failed

Knows its node only as the place where answers go. Who restarts a failed cell is the supervisor's business.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from .actor import Actor, MessageSpec
from .deadline import current_deadline
from .errors import ActorDied, MailboxFull, UnknownMessage
from .mailbox import CreditWindow, Lane, Mailbox
from .protocol import STREAM_WINDOW, Kind


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
    window: CreditWindow | None = field(default=None)
    """For a stream: items that may be under way to the caller."""

    @property
    def key(self) -> tuple[str, int]:
        return self.origin, self.id


class Answers(Protocol):
    """What a cell needs of its node."""

    def answer(self, delivery: Delivery, kind: Kind, value: Any) -> None: ...
    def taken(self, delivery: Delivery, actor: str) -> None: ...
    def dead_letter(self, delivery: Delivery, actor: str, reason: str) -> None: ...


class _Stop(BaseException):
    """Ends the cell's task group from inside."""


class Cell:
    """Hosts one incarnation of one actor. `await run()` returns at an orderly stop and raises what made it fail."""

    def __init__(self, actor: Actor, name: str, incarnation: int, node: Answers) -> None:
        self.actor = actor
        self.name = name
        self.incarnation = incarnation
        self.mailbox: Mailbox[Delivery] = Mailbox(actor.mailbox_capacity)
        self.up: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done when `start` has returned; carries its exception if it raised."""
        self._node = node
        self._running: dict[tuple[str, int], tuple[asyncio.Task[None], Delivery]] = {}
        self._withdrawn: set[tuple[str, int]] = set()
        self._closing = asyncio.Event()

    def deliver(self, delivery: Delivery) -> None:
        """Queues a message. Raises UnknownMessage, MailboxFull."""
        if delivery.method not in self.actor.messages:
            raise UnknownMessage(f"{self.name} ({type(self.actor).__name__}) has no @message {delivery.method!r}")
        try:
            self.mailbox.put(delivery, delivery.lane)
        except MailboxFull as error:
            raise MailboxFull(f"{self.name}: {error}") from None

    def cancel(self, key: tuple[str, int]) -> None:
        """Stops the handler of one message, running or not yet begun."""
        if key in self._running:
            self._withdrawn.add(key)
            self._running[key][0].cancel()
            return
        for delivery in self.mailbox.remove(lambda waiting: waiting.key == key):
            self._node.taken(delivery, self.name)

    def cancel_origin(self, origin: str) -> None:
        """Stops what a node that is gone had asked for."""
        for key in [key for key in self._running if key[0] == origin]:
            self.cancel(key)
        self.mailbox.remove(lambda waiting: waiting.origin == origin)

    def stream_credit(self, key: tuple[str, int], count: int) -> None:
        """The caller has consumed `count` items of a stream."""
        running = self._running.get(key)
        if running is not None and running[1].window is not None:
            running[1].window.give(count)

    def close(self) -> None:
        """Asks the cell to stop after the message it is at."""
        self._closing.set()

    async def run(self) -> None:
        reason: BaseException | None = None
        try:
            async with asyncio.TaskGroup() as tasks:
                self.actor._tasks = tasks
                await self.actor.start()
                self.up.set_result(None)
                serving = tasks.create_task(self._serve(tasks), name=f"{self.name}:serve")
                await self._closing.wait()
                serving.cancel()
                raise _Stop
        except* _Stop:
            pass
        except* BaseException as group:
            reason = _first(group)
        self.actor._tasks = None
        try:
            await self.actor.stop(reason)
        except Exception as error:
            reason = reason or error
        finally:
            if self.actor._thread is not None:
                self.actor._thread.shutdown(wait=False, cancel_futures=True)
        for delivery in self.mailbox.remove(lambda _: True):
            self._node.dead_letter(delivery, self.name, f"actor stopped: {reason or 'orderly stop'}")
        if not self.up.done():
            self.up.set_exception(reason or asyncio.CancelledError())
            self.up.exception()
        if reason is not None:
            raise reason

    async def _serve(self, tasks: asyncio.TaskGroup) -> None:
        while True:
            delivery = await self.mailbox.get()
            self._node.taken(delivery, self.name)
            now = asyncio.get_running_loop().time()
            if delivery.deadline is not None and delivery.deadline < now:
                self._node.dead_letter(delivery, self.name, "deadline passed before its turn")
                continue
            spec = self.actor.messages[delivery.method]
            task = tasks.create_task(self._handle(delivery, spec), name=f"{self.name}.{delivery.method}")
            self._running[delivery.key] = task, delivery
            task.add_done_callback(lambda _, key=delivery.key: self._forget(key))
            if not spec.concurrent:
                await asyncio.wait([task])

    async def _handle(self, delivery: Delivery, spec: MessageSpec) -> None:
        current_deadline.set(delivery.deadline if spec.kind != "stream" else None)
        handler: Callable[..., Any] = getattr(self.actor, delivery.method)
        if (spec.kind == "stream") != (delivery.kind is Kind.STREAM):
            verb = "ask it with .stream(...)" if spec.kind == "stream" else "it answers once: call it"
            self._fail(delivery, UnknownMessage(f"{self.name}.{delivery.method}: {verb}"))
            return
        try:
            if spec.kind == "stream":
                await self._stream(delivery, handler)
                return
            if spec.kind == "thread":
                value = await self.actor.in_thread(lambda: handler(*delivery.args, **delivery.kwargs))
            else:
                value = await handler(*delivery.args, **delivery.kwargs)
        except Exception as error:
            self._fail(delivery, error)
        except asyncio.CancelledError:
            if delivery.key not in self._withdrawn:
                self._node.answer(delivery, Kind.ERROR, ActorDied(f"{self.name} stopped while it worked on {spec.name}"))
            raise
        else:
            if delivery.kind is Kind.CALL:
                self._node.answer(delivery, Kind.REPLY, value)

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

    def _forget(self, key: tuple[str, int]) -> None:
        self._running.pop(key, None)
        self._withdrawn.discard(key)

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


