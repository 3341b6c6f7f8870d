"""A node: one process, one loop, many cells. Sends the messages of its actors and delivers those that arrive.

    ref.judge(x) -> Node.call -> [here] Cell.deliver            [elsewhere] Transport.send -> wire -> Node._receive -> Cell
                 <- future    <- Node._resolve <- Cell.answer   <- wire <- Transport.send <- Cell.answer

Every wait for another actor is an entry of `pending` with its owner, target, start and deadline: `waits()` lists them.
Knows nothing of supervision, and starts no process: see system.py and agent.py.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter, deque
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

from .cell import Cell, Delivery
from .codec import Buffer, decode, encode
from .deadline import current_deadline
from .directory import Directory, Status
from .errors import ActorDied, CodecError, DeadlineExceeded, MailboxFull, RuntimeFault
from .events import EventLog
from .mailbox import CreditWindow, Lane
from .protocol import CALL_WINDOW, REQUESTS, STREAM_WINDOW, Kind, pack_error, unpack_error
from .ref import Ref
from .transport import Envelope, Transport

MAX_DEAD_LETTERS = 1000


@dataclass(slots=True, eq=False)
class _Pending:
    """Somebody here waits for an answer."""

    id: int
    target: str
    method: str
    node: str
    since: float
    deadline: float
    owner: str
    future: asyncio.Future[Any] | None = None
    items: deque[Any] = field(default_factory=deque)
    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    end: RuntimeFault | bool | None = None
    """For a stream: True when it ended well, its error if not."""

    def __str__(self) -> str:
        return f"{self.owner or 'this program'} waits for {self.target}.{self.method}"


class Node:
    """The messages of one process. `key` is `name#incarnation`, never used again after its death."""

    def __init__(self, key: str, address: str, events: EventLog | None = None) -> None:
        self.key = key
        self.directory = Directory()
        self.cells: dict[str, Cell] = {}
        self.dead_letters: deque[dict[str, Any]] = deque(maxlen=MAX_DEAD_LETTERS)
        self.counters: Counter[str] = Counter()
        self._events = events
        self._ids = itertools.count(1)
        self._pending: dict[int, _Pending] = {}
        self._credits: dict[tuple[str, str], CreditWindow] = {}
        self._taken: Counter[tuple[str, str]] = Counter()
        self._fenced: set[str] = set()
        self._loop = asyncio.get_running_loop()
        self.transport = Transport(key, address, self._receive, self._malformed)

    # Sending ------------------------------------------------------------------------------------------------

    def ref(self, name: str) -> Ref:
        return Ref(self, name)

    async def call(self, name: str, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """See Ref. Waits for a restarting actor to come back, for credit, and for the answer, all within one deadline."""
        pending = self._begin(name, method)
        pending.future = self._loop.create_future()
        try:
            async with asyncio.timeout_at(pending.deadline):
                await self._request(Kind.CALL, pending, args, kwargs)
                return await pending.future
        except TimeoutError:
            self._withdraw(pending)
            waited = self._loop.time() - pending.since
            raise DeadlineExceeded(f"{pending}: no answer within {waited:.3g} s") from None
        except asyncio.CancelledError:
            self._withdraw(pending)
            raise
        finally:
            self._pending.pop(pending.id, None)

    def cast(self, name: str, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """See Ref. What can't be handed over at once raises; what dies on the way becomes a dead letter there."""
        status = self.directory.ready(name)
        if status is None:
            raise ActorDied(f"{name} is not up: {self.directory.get(name).reason or 'starting'}; a call would wait")
        lane, _ = status.message(method)
        if status.node != self.key and lane >= Lane.NORMAL and not self._window(status.node, name).take_nowait():
            raise MailboxFull(f"{name}: {CALL_WINDOW} messages from here are under way; use a call, which waits")
        self._dispatch(status, Kind.CAST, next(self._ids), method, lane, None, args, kwargs)

    async def stream(
        self, name: str, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> AsyncGenerator[Any, None]:
        """See Ref. The deadline bounds the wait for each item, not the whole."""
        pending = self._begin(name, method)
        patience = pending.deadline - pending.since
        consumed = 0
        try:
            async with asyncio.timeout(patience):
                await self._request(Kind.STREAM, pending, args, kwargs)
            while True:
                if not pending.items and pending.end is None:
                    pending.arrived.clear()
                    pending.since, pending.deadline = self._loop.time(), self._loop.time() + patience
                    async with asyncio.timeout(patience):
                        await pending.arrived.wait()
                    continue
                if not pending.items:
                    break
                yield pending.items.popleft()
                consumed += 1
                if consumed >= STREAM_WINDOW // 2:
                    self._post(pending.node, Kind.MORE, pending.id, name, [consumed])
                    consumed = 0
            if isinstance(pending.end, RuntimeFault):
                raise pending.end
        except TimeoutError:
            raise DeadlineExceeded(f"{pending}: no item within {patience:.3g} s") from None
        finally:
            if pending.end is None:
                self._withdraw(pending)
            self._pending.pop(pending.id, None)

    def waits(self) -> list[dict[str, Any]]:
        """Who here waits for whom, for which message, since and until when (seconds from now)."""
        now = self._loop.time()
        return [
            {
                "owner": p.owner,
                "target": p.target,
                "method": p.method,
                "waited_s": round(now - p.since, 3),
                "left_s": round(p.deadline - now, 3),
            }
            for p in self._pending.values()
        ]

    # Peers --------------------------------------------------------------------------------------------------

    def peer_down(self, key: str, reason: str) -> None:
        """Fences a dead node: its messages are refused from now on, and everybody who waits for it is told."""
        self._fenced.add(key)
        self.transport.disconnect(key)
        for pending in list(self._pending.values()):
            if pending.node == key:
                self._settle(pending, ActorDied(f"{pending}, but node {key} died: {reason}"))
        for (node, actor), window in list(self._credits.items()):
            if node == key:
                window.fail(ActorDied(f"{actor}: node {key} died: {reason}"))
                del self._credits[node, actor]
        for taken in [t for t in self._taken if t[0] == key]:
            del self._taken[taken]
        for cell in self.cells.values():
            cell.cancel_origin(key)

    def emit(self, event: str, **fields: Any) -> None:
        """Writes to events.jsonl: here if this is the root, else by a cast to it."""
        if self._events is not None:
            self._events.write(event, **fields)
        else:
            self.cast("$root", "emit", (event, fields), {})

    async def close(self) -> None:
        await self.transport.close()
        for pending in list(self._pending.values()):
            self._settle(pending, ActorDied(f"{pending}, but this node is closing"))

    # What cells need (cell.Answers) -------------------------------------------------------------------------

    def answer(self, delivery: Delivery, kind: Kind, value: Any) -> None:
        if delivery.kind is Kind.CAST:
            return
        if kind is Kind.ERROR:
            value = pack_error(value)
        if delivery.origin == self.key:
            self._resolve(kind, delivery.id, value)
            return
        try:
            self._post(delivery.origin, kind, delivery.id, delivery.method, value)
        except CodecError as error:
            self._post(delivery.origin, Kind.ERROR, delivery.id, delivery.method, pack_error(error))

    def taken(self, delivery: Delivery, actor: str) -> None:
        if delivery.origin == self.key or delivery.lane < Lane.NORMAL:
            return
        slot = delivery.origin, actor
        self._taken[slot] += 1
        if self._taken[slot] >= CALL_WINDOW // 4:
            self._post(delivery.origin, Kind.CREDIT, 0, actor, [self._taken.pop(slot)])

    def dead_letter(self, delivery: Delivery, actor: str, reason: str) -> None:
        self.counters["dead_letters"] += 1
        self.dead_letters.append(
            {"actor": actor, "method": delivery.method, "from": delivery.origin, "reason": reason}
        )
        self.answer(delivery, Kind.ERROR, ActorDied(f"{actor}.{delivery.method} was not delivered: {reason}"))

    # Inside -------------------------------------------------------------------------------------------------

    def _begin(self, name: str, method: str) -> _Pending:
        now = self._loop.time()
        own = now + self.directory.get(name).message(method)[1]
        inherited = current_deadline.get()
        task = asyncio.current_task()
        owner = task.get_name() if task is not None else ""
        deadline = own if inherited is None else min(own, inherited)
        pending = _Pending(next(self._ids), name, method, "", now, deadline, owner)
        self._pending[pending.id] = pending
        return pending

    async def _request(self, kind: Kind, pending: _Pending, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        name = pending.target
        while True:
            status = await self.directory.when_up(name)
            lane, _ = status.message(pending.method)
            if status.node != self.key and lane >= Lane.NORMAL:
                await self._window(status.node, name).take()
            elif status.node == self.key and name in self.cells:
                await self.cells[name].mailbox.room(lane)
            if self.directory.ready(name) == status:
                break
        pending.node = status.node
        self._dispatch(status, kind, pending.id, pending.method, lane, pending.deadline, args, kwargs)

    def _dispatch(
        self, status: Status, kind: Kind, id: int, method: str, lane: Lane, deadline: float | None,
        args: tuple[Any, ...], kwargs: dict[str, Any],
    ) -> None:  # fmt: skip
        if status.node == self.key:
            self._deliver(status.name, Delivery(kind, id, self.key, method, lane, deadline, args, kwargs))
            return
        pack, buffers = encode((list(args), kwargs))
        left = None if deadline is None else max(0, round((deadline - self._loop.time()) * 1000))
        if not self.transport.send(status.node, [kind, id, status.name, method, lane, left, pack], buffers):
            raise ActorDied(f"{status.name}: node {status.node} is not connected")

    def _post(self, node: str, kind: Kind, id: int, method: str, value: Any) -> None:
        if node == self.key:
            self._control(kind, self.key, id, method, value)
            return
        pack, buffers = encode(value)
        if not self.transport.send(node, [kind, id, method, "", Lane.SYSTEM, None, pack], buffers):
            self.counters["undeliverable_answers"] += 1

    def _deliver(self, name: str, delivery: Delivery) -> None:
        cell = self.cells.get(name)
        if cell is None:
            self.dead_letter(delivery, name, "no such actor here")
            return
        try:
            cell.deliver(delivery)
        except RuntimeFault as error:
            self.taken(delivery, name)
            if delivery.kind is Kind.CAST and delivery.origin == self.key:
                raise
            self.dead_letters.append(
                {"actor": name, "method": delivery.method, "from": delivery.origin, "reason": str(error)}
            )
            self.counters["dead_letters"] += 1
            self.answer(delivery, Kind.ERROR, error)

    def _receive(self, sender: str, envelope: Envelope, buffers: list[Buffer]) -> None:
        if sender in self._fenced:
            self.counters["fenced"] += 1
            return
        try:
            code, id, target, method, lane, left, pack = envelope
            kind = Kind(code)
            value = decode(pack, buffers)
            if kind in REQUESTS:
                args, kwargs = value
                deadline = None if left is None else self._loop.time() + left / 1000
                delivery = Delivery(kind, id, sender, method, Lane(lane), deadline, tuple(args), kwargs)
        except (CodecError, ValueError, TypeError) as error:
            self._malformed(sender, str(error))
            if isinstance(envelope[1], int) and envelope[0] in (Kind.CALL, Kind.STREAM):
                self._post(sender, Kind.ERROR, envelope[1], "", pack_error(CodecError(str(error))))
            elif isinstance(envelope[1], int) and envelope[0] in (Kind.REPLY, Kind.ITEM):
                self._resolve(Kind.ERROR, envelope[1], pack_error(CodecError(str(error))))
            return
        if kind in REQUESTS:
            self._deliver(target, delivery)
        else:
            self._control(kind, sender, id, target, value)

    def _control(self, kind: Kind, sender: str, id: int, target: str, value: Any) -> None:
        match kind:
            case Kind.CREDIT:
                self._window(sender, target).give(value[0])
            case Kind.CANCEL | Kind.MORE:
                cell = self.cells.get(target)
                if cell is not None and kind is Kind.CANCEL:
                    cell.cancel((sender, id))
                elif cell is not None:
                    cell.stream_credit((sender, id), value[0])
            case _:
                pending = self._pending.get(id)
                if pending is not None and pending.node != sender:
                    self.counters["stale_answers"] += 1
                    return
                self._resolve(kind, id, value)

    def _resolve(self, kind: Kind, id: int, value: Any) -> None:
        pending = self._pending.get(id)
        if pending is None:
            self.counters["late_answers"] += 1
        elif kind is Kind.ITEM:
            pending.items.append(value)
            pending.arrived.set()
        elif kind is Kind.ERROR:
            self._settle(pending, unpack_error(f"{pending.target}.{pending.method}", value))
        elif pending.future is None:
            pending.end = True
            pending.arrived.set()
        elif not pending.future.done():
            pending.future.set_result(value)

    def _settle(self, pending: _Pending, error: RuntimeFault) -> None:
        if pending.future is None:
            pending.end = pending.end or error
            pending.arrived.set()
        elif not pending.future.done():
            pending.future.set_exception(error)

    def _withdraw(self, pending: _Pending) -> None:
        if pending.node:
            self._post(pending.node, Kind.CANCEL, pending.id, pending.target, None)

    def _window(self, node: str, actor: str) -> CreditWindow:
        return self._credits.setdefault((node, actor), CreditWindow(CALL_WINDOW))

    def _malformed(self, sender: str, reason: str) -> None:
        self.counters["malformed"] += 1
        if self.counters["malformed"] <= 20:
            self.emit("malformed_message", sender=sender, reason=reason)

