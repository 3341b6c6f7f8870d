"""Where requests come in: a door per kind of message and sending node, opened once and then used for every message.

    (sender, head of the request) -> Door(handler, mailbox, credits) -> Delivery in the mailbox of a cell

A door leads to one incarnation of an actor, and is forgotten with it. Knows nothing of envelopes but their heads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from .errors import ActorDied, ActorRestarted, MailboxFull, RuntimeFault, UnknownMessage
from .mailbox import CreditDebt, CreditWindow, Lane, Mailbox
from .protocol import KIND_NAMES, Kind, unpack_head

if TYPE_CHECKING:
    from .cell import Cell

_LANES = tuple(Lane)


class Door:
    """Where the messages of one kind from one node come in. Open as long as the cell behind it is there."""

    cell: Cell | None = None
    mailbox: Mailbox[Delivery]
    handler: Callable[..., Any]
    kind: str
    at_once = False
    """Its handler may be begun where its message arrives; see Cell.at_once."""
    debt: CreditDebt | None = None
    """Its messages come by credits of their sender, which gets them back when they have left the mailbox."""

    def __init__(self, origin: str, actor: str, method: str, lane: Lane, incarnation: int) -> None:
        """`origin`: key of the sending node."""
        self.origin = origin
        self.actor = actor
        self.method = method
        self.lane = lane
        self.incarnation = incarnation
        self.counted = lane is not Lane.SYSTEM

    def deliver(self, delivery: Delivery) -> None:
        """Queues a message. Raises UnknownMessage, MailboxFull."""
        if (self.kind == "stream") != (delivery.kind == Kind.STREAM):
            remedy = "it answers many times: ask it with .stream(...)" if self.kind == "stream" else "call it instead"
            raise UnknownMessage(f"{self.actor}.{self.method} is no {KIND_NAMES[delivery.kind]}; {remedy}")
        try:
            self.mailbox.put(delivery, self.lane, delivery.size, credited=self.debt is not None)
        except MailboxFull as error:
            raise MailboxFull(f"{self.actor}: {error}; slow down, or call, which waits for room") from None


class Delivery:
    """One message for one cell, already decoded. While it is handled it is the scope (deadline.py) of its handler."""

    chosen = False
    window: CreditWindow | None = None
    """For a stream: items that may be under way to the caller."""
    items = 0
    """For a stream: items that have been sent."""
    withdrawn = False
    """The caller has given it up."""

    def __init__(
        self, kind: int, id: int, door: Door, since: float, limit: float, args: list[Any] | tuple[Any, ...],
        kwargs: dict[str, Any], size: int,
    ) -> None:  # fmt: skip
        """`since`, `limit`: loop time when it came, and by when it must be done. `size`: in bytes."""
        self.kind = kind
        self.id = id
        self.door = door
        self.since = since
        self.limit = limit
        self.args = args
        self.kwargs = kwargs
        self.size = size

    @property
    def key(self) -> tuple[str, int]:
        return self.door.origin, self.id

    @property
    def owner(self) -> str:
        return f"{self.door.actor}.{self.door.method}"


class Doors:
    """All doors of the node whose key is `here`."""

    def __init__(self, here: str, cells: Mapping[str, Cell]) -> None:
        self._here = here
        self._cells = cells
        self._table: dict[tuple[str, bytes], Door] = {}

    def find(self, sender: str, head: bytes) -> Door:
        """The door for requests with that head; it leads nowhere if the actor is not here. Raises CodecError."""
        door = self._table.get((sender, head))
        if door is None:
            actor, method, lane, incarnation = unpack_head(head)
            door = Door(sender, actor, method, _LANES[lane], incarnation)
            cell = self._cells.get(actor)
            here = cell is not None and cell.incarnation == incarnation and not cell.ended
            if cell is not None and here and method in cell.actor.messages:
                cell.open(door, credited=sender != self._here and door.counted)
                self._table[sender, head] = door
        return door

    def close(self, *, cell: Cell | None = None, sender: str | None = None) -> None:
        """Forgets the doors to a cell that has ended, or those of a node that is gone."""
        for slot in [slot for slot, door in self._table.items() if door.cell is cell or slot[0] == sender]:
            del self._table[slot]

    def nobody(self, door: Door) -> RuntimeFault:
        """Why a door leads nowhere."""
        cell = self._cells.get(door.actor)
        what = f"{door.actor}.{door.method} did not run: it was sent to incarnation {door.incarnation}"
        if cell is None or cell.ended:
            return ActorDied(f"{what}, it is not here now; ask again")
        if cell.incarnation != door.incarnation:
            return ActorRestarted(f"{what}, that is number {cell.incarnation} now; ask again")
        return UnknownMessage(f"{cell.name} ({type(cell.actor).__name__}) has no @message {door.method!r}")
