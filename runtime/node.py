"""A node: one process, one loop, many cells. Sends the messages of its actors and delivers those that arrive.

    ref.judge(x) -> Node.call -> [here] Cell.deliver        [elsewhere] Transport.send -> wire -> Node._receive -> Cell
                 <- Waits     <- Node._resolve <- Cell.answer <- wire <- Transport.send <- Cell.answer

`counters` accounts for every request but those of the system lane. Once nothing is under way, over all nodes that live,

    sent = handled + dead_letters + withdrawn + gone + lost

    sender    sent          handed to an actor here, or to the transport
              gone          reported as taken from its mailbox by a node that has died since
              lost          under way to a node that died: nobody knows; or its arrays were being copied, and then it
                           could not be sent
    receiver  handled       its handler began (interrupted: and its actor stopped before it ended)
              dead_letters  refused, or its actor stopped before its turn (expired: or its deadline passed)
              withdrawn     its caller cancelled it before its turn

Others count what is no request: fenced (from a node that is dead), malformed, late_answers, stale_answers (not from the
node that was asked), undeliverable_answers, unacknowledged_cancels, lost_events.

Knows nothing of supervision, and starts no process: see system.py and agent.py.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter, deque
from collections.abc import AsyncGenerator, Callable, Sequence
from functools import partial
from math import inf
from typing import TYPE_CHECKING, Any

import numpy as np

from .arena import ARENA_BYTES
from .cell import Cell
from .codec import Buffer, decode, encode, skim, weigh
from .directory import Directory
from .doors import Delivery, Door, Doors
from .errors import ActorDied, CodecError, LenderDied, MailboxFull, RuntimeFault
from .events import EventLog
from .frame import Envelope, size_of
from .lending import Lending
from .mailbox import CreditWindow, Lane
from .protocol import BULK_BYTES, STREAM_WINDOW, STREAM_WINDOW_BYTES, Kind, check, pack_error, restamp, unpack_head
from .ref import Ref
from .routes import Route, Routes, blame, not_connected
from .transport import TransportFactory
from .waits import Pending, PendingStream, Waits
from .zmq_transport import ZmqTransport

if TYPE_CHECKING:
    from .actor import Actor
    from .repl.interrupt import Region

AT_ONCE_S = 0.002
"""For so long the messages that came together are handled as they are read; the rest of them waits for its turn."""

MAX_DEAD_LETTERS = 1000
MAX_MALFORMED_EVENTS = 20


class Node:
    """The messages of one process. `key` is `name#incarnation`, never used again after its death."""

    def __init__(
        self,
        key: str,
        address: str,
        events: EventLog | None = None,
        transport: TransportFactory = ZmqTransport,
        *,
        arena_bytes: int = ARENA_BYTES,
    ) -> None:
        """`arena_bytes`: limit of the memory that this node lends to others on its host; 0: it lends none."""
        self.key = key
        self.directory = Directory()
        self.cells: dict[str, Cell] = {}
        self.dead_letters: deque[dict[str, Any]] = deque(maxlen=MAX_DEAD_LETTERS)
        self.counters: Counter[str] = Counter()
        """See the module's docstring."""
        self.routes = Routes(key, self.directory)
        self.waits = Waits(lambda name: self.directory.get(name).state, self._overdue)
        self.exposed: dict[str, tuple[Actor, Any]] = {}
        """What actors here show to REPLs by name; see Actor.expose."""
        self.regions: dict[str, Region] = {}
        """Code of REPLs that may be interrupted, by session."""
        self._events = events
        self._fenced: set[str] = set()
        self._doors = Doors(key, self.cells)
        self._slice_ends = 0.0
        """Until then handlers may be begun where their messages arrive."""
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self.transport = transport(key, address, self._receive, self._malformed)
        self.transport.take_plain(self._receive_plain)
        self.lending = Lending(key, arena_bytes, self.transport, self._unsent)
        self._lend = self.lending.lend
        self._local = self.transport.local

    # Sending ------------------------------------------------------------------------------------------------

    def ref(self, name: str) -> Ref:
        return Ref(self, name)

    async def call(self, name: str, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """See Ref. Waits for a restarting actor to come back, for room, and for the answer, all within one deadline."""
        route = self.routes.find(name, method)
        pending = self.waits.begin(Pending, name, method, route.own_s)
        try:
            if not self._ask(Kind.CALL, pending, route, args, kwargs):
                await self._ask_later(Kind.CALL, pending, args, kwargs)
            return await pending.future
        except asyncio.CancelledError:
            self._withdraw(pending)
            raise

    def cast(self, name: str, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """See Ref. What can't be handed over at once raises; what dies on the way becomes a dead letter there."""
        if threading.get_ident() != self._thread:
            raise RuntimeError(f"{name}.{method} was cast from a thread; let the thread return, and cast then")
        route = self.routes.find(name, method)
        if not route.up and self.directory.ready(name) is None:
            raise ActorDied(f"{name} is not up ({route.status.reason or 'starting'}); a call would wait")
        id = self.waits.next_id()
        if route.here:
            door = self._doors.find(self.key, route.head)
            self._deliver(Delivery(Kind.CAST, id, door, self._loop.time(), inf, args, kwargs, weigh(args, kwargs)))
            self.counters["sent"] += door.counted
            return
        window = route.window
        if window is not None and not window.take_nowait():
            raise MailboxFull(
                f"{name}: {window.under_way} messages from here wait there; slow down, or call, which waits"
            )
        self._transmit(Kind.CAST, id, route, inf, args, kwargs)

    async def visit(self, cell: Cell, work: Callable[[], Any], what: str, own_s: float) -> Any:
        """Has `work` done as a message of an actor here that takes its turn, in the system lane: after the message at
        work, before all that wait. Returns or raises what it does; given up after `own_s`."""
        door = Door(self.key, cell.name, what, Lane.SYSTEM, cell.incarnation)
        cell.admit(door, work)
        pending = self.waits.begin(Pending, cell.name, what, own_s)
        try:
            self._hand_over(Kind.CALL, pending, door, (), {}, 0)
            return await pending.future
        except asyncio.CancelledError:
            self._withdraw(pending)
            raise

    async def stream(
        self, name: str, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> AsyncGenerator[Any, None]:
        """See Ref. The deadline bounds the wait for each item, not the whole."""
        route = self.routes.find(name, method)
        pending = self.waits.begin(PendingStream, name, method, route.own_s)
        patience = pending.deadline - pending.since
        consumed = consumed_bytes = 0
        try:
            if not self._ask(Kind.STREAM, pending, route, args, kwargs):
                await self._ask_later(Kind.STREAM, pending, args, kwargs)
            while True:
                if pending.items:
                    item, size = pending.items.popleft()
                    consumed, consumed_bytes = consumed + 1, consumed_bytes + size
                    if consumed >= STREAM_WINDOW // 2 or consumed_bytes >= STREAM_WINDOW_BYTES // 2:
                        self._post(pending.node, [Kind.MORE, name, pending.id, consumed, consumed_bytes])
                        consumed = consumed_bytes = 0
                    yield item
                    del item
                elif pending.end is None:
                    await self.waits.more(pending, patience)
                elif isinstance(pending.end, RuntimeFault):
                    raise pending.end
                else:
                    break
        finally:
            if pending.end is None:
                self._withdraw(pending)

    # Peers --------------------------------------------------------------------------------------------------

    def peer_down(self, key: str, reason: str) -> None:
        """Fences a dead node: its messages are refused from now on, and everybody who waits for it is told."""
        self._fenced.add(key)
        self.transport.disconnect(key)
        self.lending.peer_down(key)
        self.waits.fail(f"its node {key} died: {reason}; it may have run, so ask again only if that is safe", node=key)
        gone, lost = self.routes.close(key)
        self.counters["gone"] += gone
        self.counters["lost"] += lost
        for cell in self.cells.values():
            cell.cancel_origin(key)
        self._doors.close(sender=key)

    def emit(self, event: str, **fields: Any) -> None:
        """Writes to events.jsonl: here if this is the root, else by a cast to it. From any thread."""
        if threading.get_ident() != self._thread:
            self._loop.call_soon_threadsafe(partial(self.emit, event, **fields))
        elif self._events is not None:
            self._events.write(event, **fields)
        else:
            self.cast("$root", "emit", (event, fields), {})

    def wait_rows(self) -> list[dict[str, Any]]:
        """Who waits here for whom: for answers, for room, and for the consumers of streams."""
        held = [
            {
                "owner": delivery.owner, "target": delivery.door.origin, "method": delivery.door.method,
                "why": "the consumer of its stream has enough to do",
                "waited_s": round(self._loop.time() - delivery.since, 3), "left_s": None,
            }
            for cell in self.cells.values() for delivery in cell.at_work()
            if delivery.window is not None and delivery.window.waited_for
        ]  # fmt: skip
        return self.waits.rows() + held

    def empty(self, shape: int | Sequence[int], dtype: Any) -> np.ndarray:
        """See Actor.empty."""
        return self.lending.empty(shape, dtype)

    async def close(self) -> None:
        await self.lending.drain()
        await self.transport.close()
        self.lending.close()
        self.waits.close()

    # What cells need (cell.Answers) -------------------------------------------------------------------------

    def answer(self, delivery: Delivery, kind: int, value: Any) -> int:
        if delivery.kind == Kind.CAST:
            return 0
        if kind == Kind.ERROR:
            value = pack_error(value)
        origin = delivery.door.origin
        if origin == self.key:
            size = weigh(value) if kind == Kind.ITEM else 0
            self._resolve(origin, kind, delivery.id, delivery.items, value, size)
            return size
        try:
            fields = [kind, delivery.id, delivery.items, value]
            envelope, buffers = encode(fields, self._lend if origin in self._local else None)
        except BaseException:
            self.lending.undo()
            raise
        size = len(envelope) if not buffers else size_of(envelope, buffers)
        bulk = size > BULK_BYTES
        if kind == Kind.REPLY or kind == Kind.ITEM:
            # If there is no room, the cell answers with that error instead, which is small.
            if not (self.lending.cargo or self.transport).send(origin, envelope, buffers, bulk=bulk):
                self.counters["undeliverable_answers"] += 1
        else:
            self._reply(origin, envelope, buffers, bulk=bulk)
        return size

    def acknowledge(self, delivery: Delivery, what: str) -> None:
        self._post(delivery.door.origin, [Kind.CANCELLED, delivery.id, what])

    def shut(self, cell: Cell) -> None:
        self._doors.close(cell=cell)

    def pay(self, sender: str, actor: str, lane: Lane, messages: int, size: int) -> None:
        self._post(sender, [Kind.CREDIT, actor, lane.value, messages, size])

    def dead_letter(self, delivery: Delivery, error: RuntimeFault, *, begun: bool = False) -> None:
        door = delivery.door
        if door.counted:
            self.counters["interrupted" if begun else "dead_letters"] += 1
        self.dead_letters.append(
            {
                "actor": door.actor, "method": door.method, "from": door.origin, "reason": str(error),
                "time": round(time.time(), 3), "waited_s": round(self._loop.time() - delivery.since, 3),
                "bytes": delivery.size,
            }
        )  # fmt: skip
        if door.origin not in self._fenced:
            self.answer(delivery, Kind.ERROR, error)

    # Inside: sending ----------------------------------------------------------------------------------------

    def _ask(self, kind: int, pending: Pending, route: Route, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Sends a call or a stream, if the actor is up and has room."""
        if not route.up:
            return False
        if route.here:
            door = self._doors.find(self.key, route.head)
            size = weigh(args, kwargs)
            if door.cell is not None and not door.mailbox.has_room(door.lane, size):
                return False
            self._hand_over(kind, pending, door, args, kwargs, size)
            return True
        if route.window is not None and not route.window.take_nowait():
            return False
        try:
            bulk = self._transmit(kind, pending.id, route, pending.deadline, args, kwargs)
        except RuntimeFault:
            self.waits.table.pop(pending.id, None)
            raise
        self.waits.asked(pending, route.node, bulk)
        return True

    async def _ask_later(self, kind: int, pending: Pending, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Sends it as soon as the actor is up and has room."""
        name, method = pending.target, pending.method
        limit = asyncio.timeout_at(pending.deadline)
        try:
            async with limit:
                while True:
                    await self.directory.when_up(name)
                    route = self.routes.find(name, method)
                    if route.window is not None:
                        sent = await self._ask_with_credit(kind, pending, route, args, kwargs)
                    elif route.here:
                        sent = await self._ask_with_room(kind, pending, route, args, kwargs)
                    else:
                        sent = self._ask(kind, pending, route, args, kwargs)
                    if sent:
                        return
        except BaseException as error:
            self.waits.table.pop(pending.id, None)
            if isinstance(error, TimeoutError) and limit.expired():
                raise self.waits.too_late(pending) from None
            raise

    async def _ask_with_room(
        self, kind: int, pending: Pending, route: Route, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> bool:
        """Waits for room in an actor of this node. False if another incarnation has taken its place."""
        door = self._doors.find(self.key, route.head)
        size = weigh(args, kwargs)
        if door.cell is None:
            self._hand_over(kind, pending, door, args, kwargs, size)
            return True
        async with door.mailbox.room(door.lane, size):
            if self.routes.find(pending.target, pending.method) is not route:
                return False
            self._hand_over(kind, pending, door, args, kwargs, size)
        return True

    async def _ask_with_credit(
        self, kind: int, pending: Pending, route: Route, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> bool:
        """Waits for room there and sends. False if the actor is not there any more."""
        window = route.window
        assert window is not None
        head = [kind, route.lane, 0.0, pending.id, route.head]
        try:
            envelope, buffers = encode([*head, [*args], kwargs], self._lend if route.node in self._local else None)
        except BaseException as error:  # noqa: BLE001 (it is raised again)
            self.lending.undo()
            raise blame(error, route, args, kwargs) from None
        size = size_of(envelope, buffers)
        bulk = size > BULK_BYTES
        cargo = self.lending.take()
        taken = sent = False
        try:
            taken = await window.take(size)
            if not taken or self.routes.find(pending.target, pending.method) is not route:
                return False
            envelope = restamp(envelope, pending.deadline - self._loop.time())
            sent = (cargo or self.transport).send(route.node, envelope, buffers, bulk=bulk)
            if not sent:
                raise not_connected(route)
        finally:
            if taken and not sent:
                window.give_back(size)
            if cargo is not None and not sent:
                cargo.undo()
        window.charge()
        self.counters["sent"] += 1
        self.waits.asked(pending, route.node, bulk)
        return True

    def _hand_over(
        self, kind: int, pending: Pending, door: Door, args: tuple[Any, ...], kwargs: dict[str, Any], size: int
    ) -> None:
        """Gives a call or a stream to an actor of this node."""
        self.waits.asked(pending, self.key)
        self._deliver(Delivery(kind, pending.id, door, pending.since, pending.deadline, args, kwargs, size))
        self.counters["sent"] += door.counted

    def _transmit(
        self, kind: int, id: int, route: Route, limit: float, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> bool:
        """Sends a request for which the credit of one message was taken. True if it goes the way of large ones."""
        window = route.window
        try:
            left = limit - self._loop.time()
            lend = self._lend if route.node in self._local else None
            envelope, buffers = encode([kind, route.lane, left, id, route.head, [*args], kwargs], lend)
            size = len(envelope) if not buffers else size_of(envelope, buffers)
            bulk = size > BULK_BYTES
            if not (self.lending.cargo or self.transport).send(route.node, envelope, buffers, bulk=bulk):
                raise not_connected(route)
        except BaseException as error:  # noqa: BLE001 (it is raised again)
            self.lending.undo()
            if window is not None:
                window.give_back()
            raise blame(error, route, args, kwargs) from None
        if window is not None:
            window.charge(size)
            self.counters["sent"] += 1
        return bulk

    def _post(self, node: str, fields: list[Any], *, bulk: bool = False) -> None:
        if node == self.key:
            self._control(node, fields)
        elif node not in self._fenced:
            self._reply(node, *encode(fields), bulk)

    def _reply(self, node: str, envelope: Envelope, buffers: list[Buffer], bulk: bool) -> None:
        """Sends what nobody could be told of if it failed; whoever waits for it has a deadline."""
        try:
            if not self.transport.send(node, envelope, buffers, bulk=bulk):
                self.counters["undeliverable_answers"] += 1
        except MailboxFull:
            self.counters["undeliverable_answers"] += 1

    def _unsent(self, peer: str, envelope: Envelope, size: int, error: RuntimeFault) -> None:
        """A message that was taken can't be sent after all, now that its arrays are copied."""
        fields = skim(envelope)
        if fields[0] > Kind.STREAM:
            kind, id, number, _ = fields
            self.counters["undeliverable_answers"] += 1
            self._post(peer, [Kind.ERROR, id, number, pack_error(error)])
            if kind == Kind.ITEM:
                any(cell.cancel((peer, id)) for cell in self.cells.values())
            return
        _, lane, _, id, head, *_ = fields
        window = self.routes.window(peer, unpack_head(head)[0], lane)
        if window is not None:  # Else it was counted as the node died.
            window.take_back(size)
            self.counters["lost"] += 1
        if id in self.waits.table:
            self._resolve(peer, Kind.ERROR, id, 0, pack_error(error), 0)

    def _withdraw(self, pending: Pending) -> None:
        """Its caller gives up: the callee is told, unless there is none, or its answer came in this very turn."""
        if pending.id in self.waits.table and pending.node:
            self.waits.withdraw(pending)
            fields = [Kind.CANCEL, pending.target, pending.id]
            self.lending.behind(pending.node, partial(self._post, pending.node, fields, bulk=pending.bulk))
            return
        self.waits.table.pop(pending.id, None)
        if pending.future.done() and not pending.future.cancelled():
            pending.future.exception()  # Nobody's any more.

    def _overdue(self, pending: Pending) -> None:
        if not pending.withdrawn:
            error = self.waits.too_late(pending)
            self._withdraw(pending)
            pending.settle(error)
            return
        del self.waits.table[pending.id]
        self.counters["unacknowledged_cancels"] += 1
        self._report("cancel_unacknowledged", target=pending.target, method=pending.method, node=pending.node)

    # Inside: receiving --------------------------------------------------------------------------------------

    def _receive(self, sender: str, envelope: Envelope, buffers: list[Buffer]) -> None:
        if sender in self._fenced:
            self._turn_away(sender, 1)
            return
        try:
            fields = decode(envelope, buffers, partial(self.lending.borrow, sender)) if buffers else decode(envelope)
        except CodecError as error:
            self._refuse(sender, envelope, buffers, error)
            return
        self._take(sender, fields, size_of(envelope, buffers))

    def _receive_plain(self, sender: str, envelopes: list[Any], sizes: list[int]) -> None:
        """The same for what has come together and was unpacked at once."""
        if sender in self._fenced:
            self._turn_away(sender, len(envelopes))
            return
        self._slice_ends = time.perf_counter() + AT_ONCE_S
        table = self.waits.table
        for fields, size in zip(envelopes, sizes, strict=True):
            # Most are answers to calls, and nothing is wrong with them.
            if type(fields) is list and len(fields) == 4 and fields[0] == Kind.REPLY and type(fields[1]) is int:
                pending = table.get(fields[1])
                if type(pending) is Pending and pending.node == sender and not pending.withdrawn:
                    del table[pending.id]
                    if not pending.future.done():
                        pending.future.set_result(fields[3])
                    continue
            self._take(sender, fields, size)
        self._slice_ends = 0.0

    def _take(self, sender: str, fields: Any, size: int) -> None:
        try:
            kind = check(fields)
            if kind <= Kind.STREAM:
                delivery = self._accept(sender, fields, size)
                door = delivery.door
                if door.at_once and kind != Kind.STREAM and time.perf_counter() < self._slice_ends:
                    assert door.cell is not None
                    if door.cell.at_once(delivery):
                        return
                self._deliver(delivery)
            elif kind <= Kind.END:
                _, id, number, value = fields
                self._resolve(sender, kind, id, number, value, size)
            else:
                self._control(sender, fields)
        except CodecError as error:
            self._malformed(sender, str(error))

    def _turn_away(self, sender: str, messages: int) -> None:
        self.counters["fenced"] += messages
        self.transport.tell_fenced(sender)

    def _accept(self, sender: str, fields: list[Any], size: int) -> Delivery:
        """Raises CodecError."""
        kind, _, left, id, head, args, kwargs = fields
        now = self._loop.time()
        return Delivery(kind, id, self._doors.find(sender, head), now, now + left, args, kwargs, size)

    def _deliver(self, delivery: Delivery) -> None:
        door = delivery.door
        try:
            if door.cell is None:
                raise self._doors.nobody(door)
            door.deliver(delivery)
        except RuntimeFault as error:
            if door.origin == self.key:
                if delivery.kind == Kind.CAST:
                    raise
            elif door.counted:
                self.pay(door.origin, door.actor, door.lane, 1, delivery.size)
            self.dead_letter(delivery, error)

    def _refuse(self, sender: str, envelope: Envelope, buffers: list[Buffer], error: CodecError) -> None:
        """What can't be read fails the one who waits for it, there or here, if it can be told who that is."""
        if not isinstance(error, LenderDied):
            self._malformed(sender, str(error))
        self.lending.refuse(sender, buffers)
        try:
            fields = skim(envelope)
            kind = check(fields)
            delivery = self._accept(sender, fields, size_of(envelope, buffers)) if kind <= Kind.STREAM else None
        except CodecError:
            return
        if delivery is not None:
            if delivery.door.counted:
                self.pay(sender, delivery.door.actor, delivery.door.lane, 1, delivery.size)
            self.dead_letter(delivery, error)
        elif kind <= Kind.END:
            pending = self.waits.table.get(fields[1])
            self._resolve(sender, Kind.ERROR, fields[1], fields[2], pack_error(error), 0)
            if kind == Kind.ITEM and pending is not None and pending.node == sender:
                self._post(sender, [Kind.CANCEL, pending.target, pending.id])

    def _resolve(self, sender: str, kind: int, id: int, number: int, value: Any, size: int) -> None:
        pending = self.waits.table.get(id)
        if pending is None:
            self.counters["late_answers"] += 1
        elif pending.node != sender:
            self.counters["stale_answers"] += 1
        elif pending.withdrawn:
            if kind != Kind.ITEM:  # It has ended, which is all that an acknowledgement says.
                del self.waits.table[id]
        elif pending.resolve(kind, number, value, size):
            del self.waits.table[id]

    def _control(self, sender: str, fields: list[Any]) -> None:
        match fields:
            case [Kind.CREDIT, target, lane, messages, size]:
                self._give(self.routes.window(sender, target, lane), sender, target, messages, size)
            case [Kind.MORE, target, id, items, size]:
                cell = self.cells.get(target)
                self._give(None if cell is None else cell.stream((sender, id)), sender, target, items, size)
            case [Kind.CANCEL, target, id]:
                cell = self.cells.get(target)
                if cell is None or not cell.cancel((sender, id)):
                    self._post(sender, [Kind.CANCELLED, id, "not here"])
            case [Kind.CANCELLED, id, _]:
                pending = self.waits.table.get(id)
                if pending is not None and pending.node == sender and pending.withdrawn:
                    del self.waits.table[id]

    def _give(self, window: CreditWindow | None, sender: str, target: str, messages: int, size: int) -> None:
        if window is not None and not window.give(messages, size):
            self._malformed(sender, f"{messages} credits and {size} bytes for {target}, more than were taken")

    def _malformed(self, sender: str, reason: str) -> None:
        self.counters["malformed"] += 1
        if self.counters["malformed"] <= MAX_MALFORMED_EVENTS:
            self._report("malformed_message", sender=sender, reason=reason)

    def _report(self, event: str, **fields: Any) -> None:
        """An event that must not fail what it tells of."""
        try:
            self.emit(event, **fields)
        except RuntimeFault:
            self.counters["lost_events"] += 1
