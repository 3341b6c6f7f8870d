"""A node: one process, one loop, many cells. Sends the messages of its actors and delivers those that arrive.

    ref.judge(x) -> Node.call -> [here] Cell.deliver        [elsewhere] Transport.send -> wire -> Node._receive -> Cell
                 <- Waits     <- Node._resolve <- Cell.answer <- wire <- Transport.send <- Cell.answer

Knows nothing of supervision, and starts no process: see system.py and agent.py.
"""

from __future__ import annotations

import asyncio
import threading
from collections import Counter, deque
from collections.abc import AsyncGenerator, Sequence
from functools import partial
from typing import Any

import numpy as np

from .arena import ARENA_BYTES
from .cell import Cell, Delivery
from .codec import Buffer
from .directory import Directory, Status
from .errors import ActorDied, CodecError, MailboxFull, RuntimeFault
from .events import EventLog
from .frame import Envelope
from .lending import Lending
from .mailbox import CreditWindow, Lane
from .protocol import REQUESTS, STREAM_WINDOW, Kind, pack_error
from .ref import Ref
from .transport import Transport
from .waits import Pending, Waits

MAX_DEAD_LETTERS = 1000
MAX_MALFORMED_EVENTS = 20

_KINDS = {int(kind): kind for kind in Kind}
_LANES = {int(lane): lane for lane in Lane}


class Node:
    """The messages of one process. `key` is `name#incarnation`, never used again after its death."""

    def __init__(
        self, key: str, address: str, events: EventLog | None = None, *, arena_bytes: int = ARENA_BYTES
    ) -> None:
        """`arena_bytes`: limit of the memory that this node lends to others on its host; 0: it lends none."""
        self.key = key
        self.directory = Directory()
        self.cells: dict[str, Cell] = {}
        self.dead_letters: deque[dict[str, Any]] = deque(maxlen=MAX_DEAD_LETTERS)
        self.counters: Counter[str] = Counter()
        """dead_letters, malformed, fenced, stale_answers, late_answers, undeliverable_answers, lost (casts that
        could not be sent in the end), lost_events."""
        self.waits = Waits(lambda name: self.directory.get(name).state)
        self._events = events
        self._credits: dict[tuple[str, str], CreditWindow] = {}
        self._taken: Counter[tuple[str, str]] = Counter()
        self._fenced: set[str] = set()
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self.transport = Transport(key, address, self._receive, self._malformed)
        self.lending = Lending(key, arena_bytes, self.transport, self._unsent)

    # Sending ------------------------------------------------------------------------------------------------

    def ref(self, name: str) -> Ref:
        return Ref(self, name)

    async def call(self, name: str, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """See Ref. Waits for a restarting actor to come back, for room, and for the answer, all within one deadline."""
        pending = self.waits.begin_call(name, method, self._default_s(name, method))
        assert pending.future is not None
        limit = asyncio.timeout_at(pending.deadline)
        try:
            async with limit:
                await self._request(Kind.CALL, pending, args, kwargs)
                return await pending.future
        except TimeoutError:
            if not limit.expired():
                raise  # It is what the callee raised.
            self._withdraw(pending)
            raise self.waits.too_late(pending, "no answer") from None
        except asyncio.CancelledError:
            self._withdraw(pending)
            raise
        finally:
            self.waits.end(pending)

    def cast(self, name: str, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """See Ref. What can't be handed over at once raises; what dies on the way becomes a dead letter there."""
        if threading.get_ident() != self._thread:
            raise RuntimeError(f"{name}.{method} was cast from a thread; let the thread return, and cast then")
        status = self.directory.ready(name)
        if status is None:
            raise ActorDied(f"{name} is not up ({self.directory.get(name).reason or 'starting'}); a call would wait")
        lane, _ = status.message(method)
        window = self._window(status, lane)
        if window is not None and not window.take_nowait():
            raise MailboxFull(f"{name}: {window.size} messages from here wait there; slow down, or call, which waits")
        self._dispatch(status, window, Kind.CAST, self.waits.next_id(), method, lane, None, args, kwargs)

    async def stream(
        self, name: str, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> AsyncGenerator[Any, None]:
        """See Ref. The deadline bounds the wait for each item, not the whole."""
        pending = self.waits.begin_stream(name, method, self._default_s(name, method))
        assert pending.arrived is not None
        patience = pending.deadline - pending.since
        limit = asyncio.timeout(patience)
        consumed = 0
        try:
            async with limit:
                await self._request(Kind.STREAM, pending, args, kwargs)
            while True:
                if pending.items:
                    yield pending.items.popleft()
                    consumed += 1
                    if consumed >= STREAM_WINDOW // 2:
                        self._post(pending.node, Kind.MORE, pending.id, name, consumed)
                        consumed = 0
                elif pending.end is not None:
                    break
                else:
                    pending.arrived.clear()
                    pending.since, pending.deadline = self._loop.time(), self._loop.time() + patience
                    limit = asyncio.timeout(patience)
                    async with limit:
                        await pending.arrived.wait()
            if isinstance(pending.end, RuntimeFault):
                raise pending.end
        except TimeoutError:
            if not limit.expired():
                raise  # It is what the callee raised.
            raise self.waits.too_late(pending, "no item") from None
        finally:
            if pending.end is None:
                self._withdraw(pending)
            self.waits.end(pending)

    # Peers --------------------------------------------------------------------------------------------------

    def peer_down(self, key: str, reason: str) -> None:
        """Fences a dead node: its messages are refused from now on, and everybody who waits for it is told."""
        self._fenced.add(key)
        self.transport.disconnect(key)
        self.lending.peer_down(key)
        self.waits.fail(f"its node {key} died: {reason}; it may have run, so ask again only if that is safe", node=key)
        for slot in [slot for slot in self._credits if slot[0] == key]:
            self._credits.pop(slot).close()
        for slot in [slot for slot in self._taken if slot[0] == key]:
            del self._taken[slot]
        for cell in self.cells.values():
            cell.cancel_origin(key)

    def emit(self, event: str, **fields: Any) -> None:
        """Writes to events.jsonl: here if this is the root, else by a cast to it. From any thread."""
        if threading.get_ident() != self._thread:
            self._loop.call_soon_threadsafe(partial(self.emit, event, **fields))
        elif self._events is not None:
            self._events.write(event, **fields)
        else:
            self.cast("$root", "emit", (event, fields), {})

    def empty(self, shape: int | Sequence[int], dtype: Any) -> np.ndarray:
        """See Actor.empty."""
        return self.lending.empty(shape, dtype)

    async def close(self) -> None:
        await self.lending.drain()
        await self.transport.close()
        self.lending.close()
        self.waits.fail("this node is closing")

    # What cells need (cell.Answers) -------------------------------------------------------------------------

    def answer(self, delivery: Delivery, kind: Kind, value: Any) -> None:
        if delivery.kind is Kind.CAST:
            return
        if kind is Kind.ERROR:
            value = pack_error(value)
        if delivery.origin == self.key:
            self._resolve(self.key, kind, delivery.id, value)
        else:
            self._post(delivery.origin, kind, delivery.id, delivery.method, value)

    def taken(self, delivery: Delivery, actor: str) -> None:
        if delivery.credited:
            self._return_credit(delivery.origin, actor)

    def dead_letter(self, delivery: Delivery, actor: str, error: RuntimeFault) -> None:
        self.counters["dead_letters"] += 1
        self.dead_letters.append(
            {"actor": actor, "method": delivery.method, "from": delivery.origin, "reason": str(error)}
        )
        self.answer(delivery, Kind.ERROR, error)

    # Inside: sending ----------------------------------------------------------------------------------------

    def _default_s(self, name: str, method: str) -> float:
        return self.directory.get(name).message(method)[1]

    async def _request(self, kind: Kind, pending: Pending, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Sends as soon as the actor is up and has room."""
        name = pending.target
        while True:
            status = await self.directory.when_up(name)
            lane, _ = status.message(pending.method)
            window = self._window(status, lane)
            if window is not None:
                if not window.take_nowait() and not await window.take():
                    continue
            elif status.node == self.key and name in self.cells:
                await self.cells[name].room(pending.method, lane)
            if self.directory.get(name) is status:
                break
            if window is not None:
                window.give(1)
        pending.node = status.node
        self._dispatch(status, window, kind, pending.id, pending.method, lane, pending.deadline, args, kwargs)

    def _dispatch(
        self, status: Status, window: CreditWindow | None, kind: Kind, id: int, method: str, lane: Lane,
        deadline: float | None, args: tuple[Any, ...], kwargs: dict[str, Any],
    ) -> None:  # fmt: skip
        if status.node == self.key:
            delivery = Delivery(kind, id, self.key, method, lane, deadline, args, kwargs)
            self._deliver(status.name, status.incarnation, delivery)
            return
        left = None if deadline is None else max(0, round((deadline - self._loop.time()) * 1000))
        try:
            head = [kind, id, status.name, method, lane, status.incarnation, left]
            if not self.lending.send(status.node, head, [list(args), kwargs]):
                raise ActorDied(f"{status.name}: its node {status.node} is not connected; ask again")
        except RuntimeFault:
            if window is not None:
                window.give(1)
            raise

    def _post(self, node: str, kind: Kind, id: int, target: str, value: Any) -> None:
        if node == self.key:
            self._control(kind, self.key, id, target, value)
            return
        if not self.lending.send(node, [kind, id, target, "", Lane.SYSTEM, 0, None], value):
            self.counters["undeliverable_answers"] += 1

    def _unsent(self, peer: str, envelope: Envelope, error: RuntimeFault) -> None:
        """What was taken could not be sent in the end."""
        kind, id, target, _, lane, *_ = envelope
        if kind not in REQUESTS:
            self.counters["undeliverable_answers"] += 1
            return
        window = self._credits.get((peer, target))
        if window is not None and lane >= Lane.NORMAL:
            window.give(1)
        if kind is Kind.CAST:
            self.counters["lost"] += 1
        else:
            self._resolve(peer, Kind.ERROR, id, pack_error(error))

    def _withdraw(self, pending: Pending) -> None:
        if pending.node:
            self._post(pending.node, Kind.CANCEL, pending.id, pending.target, None)

    def _window(self, status: Status, lane: Lane) -> CreditWindow | None:
        """The credits for an actor elsewhere; None where none are needed."""
        if status.node == self.key or lane < Lane.NORMAL:
            return None
        slot = status.node, status.name
        window = self._credits.get(slot)
        if window is None:
            window = self._credits[slot] = CreditWindow(status.window)
        return window

    # Inside: receiving --------------------------------------------------------------------------------------

    def _deliver(self, name: str, incarnation: int, delivery: Delivery) -> None:
        cell = self.cells.get(name)
        try:
            if cell is None or cell.incarnation != incarnation:
                now = "it is not here now" if cell is None else f"that is number {cell.incarnation} now"
                raise ActorDied(
                    f"{name}.{delivery.method} did not run: it was sent to incarnation {incarnation}, {now}; ask again"
                )
            cell.deliver(delivery)
        except RuntimeFault as error:
            self.taken(delivery, name)
            if delivery.kind is Kind.CAST and delivery.origin == self.key:
                raise
            self.dead_letter(delivery, name, error)

    def _receive(self, sender: str, envelope: Envelope, buffers: list[Buffer]) -> None:
        if sender in self._fenced:
            self.counters["fenced"] += 1
            return
        code, id, target, method, lane_code, incarnation, left, pack = envelope
        kind, lane = _KINDS.get(code), _LANES.get(lane_code)
        if kind is None or lane is None:
            self._malformed(sender, f"no kind {code} or no lane {lane_code}")
            self.lending.refuse(sender, pack)
            return
        try:
            value = self.lending.read(sender, pack, buffers)
            _check(kind, value)
        except CodecError as error:
            self._refuse(sender, kind, id, target, lane, error)
            return
        if kind in REQUESTS:
            deadline = None if left is None else self._loop.time() + left / 1000
            credited = lane >= Lane.NORMAL
            delivery = Delivery(kind, id, sender, method, lane, deadline, tuple(value[0]), value[1], credited)
            self._deliver(target, incarnation, delivery)
        else:
            self._control(kind, sender, id, target, value)

    def _refuse(self, sender: str, kind: Kind, id: int, target: str, lane: Lane, error: CodecError) -> None:
        """What can't be read fails the one who waits for it, there or here."""
        self._malformed(sender, str(error))
        if kind in REQUESTS:
            if lane >= Lane.NORMAL:
                self._return_credit(sender, target)
            if kind is not Kind.CAST:
                self._post(sender, Kind.ERROR, id, target, pack_error(error))
        elif kind in (Kind.REPLY, Kind.ERROR, Kind.ITEM, Kind.END):
            self._control(Kind.ERROR, sender, id, target, pack_error(error))

    def _control(self, kind: Kind, sender: str, id: int, target: str, value: Any) -> None:
        match kind:
            case Kind.CREDIT:
                self._give(self._credits.get((sender, target)), sender, target, value)
            case Kind.MORE | Kind.CANCEL:
                cell = self.cells.get(target)
                if cell is not None and kind is Kind.CANCEL:
                    cell.cancel((sender, id))
                elif cell is not None:
                    self._give(cell.stream((sender, id)), sender, target, value)
            case _:
                self._resolve(sender, kind, id, value)

    def _give(self, window: CreditWindow | None, sender: str, target: str, count: int) -> None:
        if window is not None and not window.give(count):
            self._malformed(sender, f"{count} credits for {target}, more than were taken")

    def _resolve(self, sender: str, kind: Kind, id: int, value: Any) -> None:
        pending = self.waits.get(id)
        if pending is None:
            self.counters["late_answers"] += 1
        elif pending.node != sender:
            self.counters["stale_answers"] += 1
        else:
            self.waits.resolve(pending, kind, value)

    def _return_credit(self, sender: str, actor: str) -> None:
        slot = sender, actor
        self._taken[slot] += 1
        cell = self.cells.get(actor)
        if cell is None or self._taken[slot] >= max(1, cell.window // 4):
            self._post(sender, Kind.CREDIT, 0, actor, self._taken.pop(slot))

    def _malformed(self, sender: str, reason: str) -> None:
        self.counters["malformed"] += 1
        if self.counters["malformed"] <= MAX_MALFORMED_EVENTS:
            try:
                self.emit("malformed_message", sender=sender, reason=reason)
            except RuntimeFault:
                self.counters["lost_events"] += 1


def _check(kind: Kind, value: Any) -> None:
    """Raises CodecError unless `value` is what messages of that kind hold."""
    if kind in REQUESTS:
        good = type(value) is list and len(value) == 2 and type(value[0]) is list and type(value[1]) is dict
    elif kind is Kind.ERROR:
        good = type(value) is list and len(value) == 4 and all(type(text) is str for text in value)
    elif kind is Kind.CREDIT or kind is Kind.MORE:
        good = type(value) is int and value > 0
    else:
        good = True
    if not good:
        raise CodecError(f"a {kind.name.lower()} can't hold a {type(value).__name__} like this")
