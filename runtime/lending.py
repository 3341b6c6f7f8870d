"""What a node lends to others on its host and borrows from them: large arrays go by shared memory.

    encode(fields, lend) -> cargo.send --small copies were made at once-------------------------> transport
                                       '--large ones by the arena's thread, the loop goes on --> transport
    decode(envelope, buffers, borrow) -> views

A copy of 64 MiB takes 10 ms, in which a loop that made it would answer nobody. So a message that waits for its copies
may be overtaken by others of its sender, as any large message may; what must stay behind it, its cancellation, says so.

Every path on which a message is not delivered gives its leases back: not sent, not readable, withdrawn; a value that
was decoded gives them back as it is thrown away. Knows nothing of actors, nor of what is in an envelope.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from .arena import Arena, Loan
from .arena_file import HANDLE_BYTES
from .borrow import Borrowing
from .codec import LEND_BYTES, Buffer
from .errors import ActorDied, CodecError, RuntimeFault
from .frame import Envelope, size_of
from .transport import MAX_MESSAGE_BYTES, Transport

INLINE_BYTES = 1 << 20
"""Of one message are copied by the loop itself, in some 0.2 ms; what goes beyond is copied by a thread."""

CLOSE_S = 2.0
"""Time that copies under way may take when the node closes."""

OnUnsent = Callable[[str, Envelope, int, RuntimeFault], None]
"""Peer, envelope, its size, and why what was taken could not be sent after all."""


class Lending:
    """The arena of one node, and what it borrows from others."""

    def __init__(self, key: str, limit_bytes: int, transport: Transport, on_unsent: OnUnsent) -> None:
        self.arena = Arena(key, limit_bytes)
        self.cargo: Cargo | None = None
        """What `lend` has lent to the message that is being encoded: that is sent by it, or undone."""
        self.transport = transport
        self.on_unsent = on_unsent
        self._borrowing = Borrowing()
        self._copies: dict[str, asyncio.Future[None]] = {}
        """The last one under way to each peer; they are made in order."""

    def empty(self, shape: int | Sequence[int], dtype: Any) -> np.ndarray:
        """See Actor.empty."""
        dims = (shape,) if isinstance(shape, int) else tuple(shape)
        kind = np.dtype(dtype)
        if not kind.hasobject and min(dims, default=0) > 0 and kind.itemsize * math.prod(dims) >= LEND_BYTES:
            born = self.arena.empty(dims, kind)
            if born is not None:
                return born
        return np.empty(shape, dtype)

    async def shared(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The same arrays where they, and any parts of them, can be sent to many nodes without another copy: large ones
        are copied into the arena, all together by its thread. What finds no room stays where it is."""
        found, copies = list(arrays), []
        for index, array in enumerate(arrays):
            if array.nbytes >= LEND_BYTES and not self.arena.holds(array):
                born = self.empty(array.shape, array.dtype)
                if self.arena.holds(born):
                    found[index] = born
                    copies.append((born, array))
        if copies:
            await asyncio.get_running_loop().run_in_executor(self.arena.porter, _copy_all, copies)
        return found

    def lend(self, view: memoryview) -> bytes | None:
        """The codec's `lend`, for a message to a node of this host."""
        if self.cargo is None:
            self.cargo = Cargo(self)
        return self.cargo.add(view)

    def take(self) -> Cargo | None:
        """What the message has lent that was just encoded, and will not be sent at once."""
        cargo, self.cargo = self.cargo, None
        return cargo

    def undo(self) -> None:
        """The message that was being encoded is not sent."""
        cargo = self.take()
        if cargo is not None:
            cargo.undo()

    def borrow(self, sender: str, handle: Buffer) -> memoryview:
        """The codec's `borrow`. Raises LenderDied, CodecError."""
        return self._borrowing.borrow(sender, handle)

    def refuse(self, sender: str, buffers: Sequence[Buffer]) -> None:
        """Gives back what a message lends that can't be read."""
        for buffer in buffers:
            if len(buffer) == HANDLE_BYTES:
                try:
                    self._borrowing.borrow(sender, buffer)
                except CodecError:
                    continue  # Given back already, or never valid.

    def behind(self, peer: str, act: Callable[[], None]) -> None:
        """Does something once all messages to a peer are sent that wait for their copies."""
        last = self._copies.get(peer)
        if last is None:
            act()
        else:
            last.add_done_callback(lambda _: act())

    def peer_down(self, key: str) -> None:
        """A node is dead: what it had borrowed is free; what it lent stays as long as it is in use here."""
        self.arena.reclaim(key)
        self._borrowing.forget(key)

    async def drain(self) -> None:
        """Sends what still waits for its copies."""
        if self._copies:
            await asyncio.wait(self._copies.values(), timeout=CLOSE_S)

    def close(self) -> None:
        """Lends and borrows no more. Who holds something keeps it; what nobody has mapped yet is gone."""
        self.arena.close()
        self._borrowing.close()

    def send_later(self, cargo: Cargo, send: Callable[[asyncio.Future[None]], None]) -> None:
        """Has the copies of a cargo made, and then sends it."""
        peer = cargo.peer
        copied = self._copies[peer] = asyncio.get_running_loop().run_in_executor(self.arena.porter, cargo.copy)
        copied.add_done_callback(send)
        copied.add_done_callback(partial(self._forget, peer))

    def _forget(self, peer: str, copied: asyncio.Future[None]) -> None:
        if self._copies.get(peer) is copied:
            del self._copies[peer]


def _copy_all(copies: list[tuple[np.ndarray, np.ndarray]]) -> None:
    for target, source in copies:
        np.copyto(target, source)


class Cargo:
    """What one message takes from the arena."""

    __slots__ = ("_arena", "_copies", "_inline_bytes", "_lending", "_loans", "peer")

    def __init__(self, lending: Lending) -> None:
        self._arena = lending.arena
        self._copies: list[tuple[int, np.ndarray, np.ndarray]] = []
        """(block, target, source) that are still to be made; each holds its block."""
        self._inline_bytes = 0
        self._lending = lending
        self._loans: list[Loan] = []
        self.peer = ""

    def add(self, view: memoryview) -> bytes | None:
        """The handle of some bytes; None if they can't be lent."""
        source = np.frombuffer(view, np.uint8)
        loan = self._arena.lend(source)
        if loan is None:
            return None
        self._loans.append(loan)
        if loan.target is not None:
            if self._inline_bytes + source.nbytes <= INLINE_BYTES:
                self._inline_bytes += source.nbytes
                np.copyto(loan.target, source)
            else:
                self._arena.hold(loan.start)
                self._copies.append((loan.start, loan.target, source))
        return loan.handle

    def send(self, peer: str, envelope: Envelope, buffers: list[Buffer], bulk: bool = False) -> bool:
        """As a transport does, now or when the copies are made. What is not sent is undone."""
        if self._lending.cargo is self:
            self._lending.cargo = None
        self.peer = peer
        self._arena.assign(self._loans, peer)
        sent = False
        try:
            # A message that the transport finds too large is not put off: its sender must be told.
            if self._copies and size_of(envelope, buffers) <= MAX_MESSAGE_BYTES:
                self._lending.send_later(self, partial(self._copied, envelope, buffers, bulk))
                sent = True
            else:
                self.copy()
                sent = self._lending.transport.send(peer, envelope, buffers, bulk=bulk)
        finally:
            if not sent:
                self.undo()
        return sent

    def copy(self) -> None:
        """Makes the copies. From any thread."""
        while self._copies:
            start, target, source = self._copies[-1]
            np.copyto(target, source)
            self._copies.pop()
            self._arena.release(start)

    def undo(self) -> None:
        """The message is not sent: all is free again."""
        for start, _, _ in self._copies:
            self._arena.release(start)
        self._copies.clear()
        self._arena.cancel(self._loans)
        self._loans.clear()

    def _copied(self, envelope: Envelope, buffers: list[Buffer], bulk: bool, copied: asyncio.Future[None]) -> None:
        why: RuntimeFault = ActorDied(f"its node {self.peer} is not connected; ask again")
        try:
            copied.result()
            if self._lending.transport.send(self.peer, envelope, buffers, bulk=bulk):
                return
        except asyncio.CancelledError:
            why = ActorDied("this node is closing")
        except RuntimeFault as refused:
            why = refused
        self.undo()
        self._lending.on_unsent(self.peer, envelope, size_of(envelope, buffers), why)
