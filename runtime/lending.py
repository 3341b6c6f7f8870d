"""Messages to and from nodes of this host, whose large arrays go by shared memory.

    send: encode, large arrays -> handles  --small copies are made at once-------------------------> transport
                                           '--large ones by the arena's thread, the loop goes on --> transport
    read: decode, handles -> views

A copy of 64 MiB takes 10 ms, in which a loop that made it would answer nobody. So a message that waits for its copies
may be overtaken by others of its sender, as any large message may; what belongs to the same exchange (its
cancellation, items of a stream, their end) stays behind it.

Every path on which a message is not delivered gives its leases back: not sent, not readable, withdrawn; a value that
was decoded gives them back as it is thrown away. Knows nothing of actors.
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np

from .arena import Arena, Loan
from .borrow import Borrowing
from .codec import LEND_BYTES, Buffer, decode, encode, handles
from .errors import ActorDied, CodecError, RuntimeFault
from .frame import Envelope
from .protocol import Kind

INLINE_BYTES = 1 << 20
"""Of one message are copied by the loop itself, in some 0.2 ms; what goes beyond is copied by a thread."""

_PIECE_BYTES = 1 << 30
"""No transport refuses a smaller buffer. A message with a larger one is sent at once: its sender must be told."""

CLOSE_S = 2.0
"""Time that copies under way may take when the node closes."""

_FOLLOWERS = frozenset({Kind.CANCEL, Kind.ITEM, Kind.END, Kind.ERROR})


class Carrier(Protocol):
    """What is needed of a transport."""

    local: set[str]
    """Keys of the peers that are processes of this host."""

    def send(self, peer: str, envelope: Envelope, buffers: list[Buffer]) -> bool: ...


class Lending:
    """The arena of one node, and what it borrows from others."""

    def __init__(
        self, key: str, limit_bytes: int, carrier: Carrier, on_unsent: Callable[[str, Envelope, RuntimeFault], None]
    ) -> None:
        """`on_unsent` gets the peer and the envelope of what `send` took and could not send after all, and why."""
        self.arena = Arena(key, limit_bytes)
        self._borrowing = Borrowing()
        self._carrier = carrier
        self._on_unsent = on_unsent
        self._cargo = _Cargo(self.arena)
        self._copying: Counter[str] = Counter()
        """Messages to a peer that wait for copies, and what stays behind them."""
        self._under_way: set[asyncio.Future[None]] = set()

    def empty(self, shape: int | Sequence[int], dtype: Any) -> np.ndarray:
        """See Actor.empty."""
        dims = (shape,) if isinstance(shape, int) else tuple(shape)
        kind = np.dtype(dtype)
        if not kind.hasobject and min(dims, default=0) > 0 and kind.itemsize * math.prod(dims) >= LEND_BYTES:
            born = self.arena.empty(dims, kind)
            if born is not None:
                return born
        return np.empty(shape, dtype)

    def send(self, peer: str, head: Envelope, value: Any) -> bool:
        """Encodes `value` behind the other fields of an envelope and sends it. False: the peer is not connected.

        Raises CodecError.
        """
        if peer not in self._carrier.local:
            pack, buffers = encode(value)
            return self._carrier.send(peer, [*head, pack], buffers)
        cargo = self._cargo
        cargo.peer = peer
        try:
            pack, buffers = encode(value, cargo)
            envelope = [*head, pack]
            behind = peer in self._copying and head[0] in _FOLLOWERS
            if not cargo.loans and not behind:
                return self._carrier.send(peer, envelope, buffers)
            self._cargo = _Cargo(self.arena)
            if behind or (cargo.copies and all(len(buffer) <= _PIECE_BYTES for buffer in buffers)):
                self._send_later(cargo, envelope, buffers)
                return True
            cargo.copy()
            if self._carrier.send(peer, envelope, buffers):
                return True
        except BaseException:
            cargo.undo()
            raise
        cargo.undo()
        return False

    def read(self, sender: str, pack: bytes, buffers: Sequence[Buffer]) -> Any:
        """The value of a message. Raises CodecError; then what it lends is given back."""
        borrow = partial(self._borrowing.borrow, sender)
        try:
            return decode(pack, buffers, borrow)
        except CodecError:
            self.refuse(sender, pack)
            raise

    def refuse(self, sender: str, pack: bytes) -> None:
        """Gives back what a message lends that nobody will read."""
        for handle in handles(pack):
            try:
                self._borrowing.borrow(sender, handle)
            except CodecError:
                continue  # Given back already, or never valid.

    def peer_down(self, key: str) -> None:
        """A node is dead: what it had borrowed is free; what it lent stays as long as it is in use here."""
        self.arena.reclaim(key)
        self._borrowing.forget(key)

    async def drain(self) -> None:
        """Sends what still waits for its copies."""
        if self._under_way:
            await asyncio.wait(self._under_way, timeout=CLOSE_S)
            await asyncio.sleep(0)  # Their callbacks send.

    def close(self) -> None:
        """Lends and borrows no more. Who holds something keeps it; what nobody has mapped yet is gone."""
        self.arena.close()
        self._borrowing.close()

    def _send_later(self, cargo: _Cargo, envelope: Envelope, buffers: list[Buffer]) -> None:
        self._copying[cargo.peer] += 1
        copied = asyncio.get_running_loop().run_in_executor(self.arena.porter, cargo.copy)
        self._under_way.add(copied)
        copied.add_done_callback(partial(self._copied, cargo, envelope, buffers))

    def _copied(self, cargo: _Cargo, envelope: Envelope, buffers: list[Buffer], copied: asyncio.Future[None]) -> None:
        self._under_way.discard(copied)
        self._copying[cargo.peer] -= 1
        if not self._copying[cargo.peer]:
            del self._copying[cargo.peer]
        why: RuntimeFault = ActorDied(f"its node {cargo.peer} is not connected; ask again")
        try:
            copied.result()
            if self._carrier.send(cargo.peer, envelope, buffers):
                return
        except asyncio.CancelledError:
            why = ActorDied("this node is closing")
        except RuntimeFault as refused:
            why = refused
        cargo.undo()
        self._on_unsent(cargo.peer, envelope, why)


class _Cargo:
    """What one message takes from the arena; the codec's `lend`."""

    __slots__ = ("_arena", "_inline_bytes", "copies", "loans", "peer")

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self._inline_bytes = 0
        self.peer = ""
        self.loans: list[Loan] = []
        self.copies: list[tuple[int, np.ndarray, np.ndarray]] = []
        """(block, target, source) that are still to be made; each holds its block."""

    def __call__(self, view: memoryview) -> bytes | None:
        source = np.frombuffer(view, np.uint8)
        loan = self._arena.lend(self.peer, source)
        if loan is None:
            return None
        self.loans.append(loan)
        if loan.target is not None:
            if self._inline_bytes + source.nbytes <= INLINE_BYTES:
                self._inline_bytes += source.nbytes
                np.copyto(loan.target, source)
            else:
                self._arena.hold(loan.start)
                self.copies.append((loan.start, loan.target, source))
        return loan.handle

    def copy(self) -> None:
        """Makes the copies. From any thread."""
        while self.copies:
            start, target, source = self.copies[-1]
            np.copyto(target, source)
            self.copies.pop()
            self._arena.release(start)

    def undo(self) -> None:
        """The message was not sent."""
        for start, _, _ in self.copies:
            self._arena.release(start)
        self.copies.clear()
        self._arena.cancel(self.loans)
        self.loans.clear()
        self._inline_bytes = 0
