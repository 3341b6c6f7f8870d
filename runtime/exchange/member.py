"""A member of an exchange as its coordinator sees it: what it holds, what it is taking, why it is lost.

Knows nothing of who else there is, but for the sake of a route.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from ..errors import BadWeights, TransferFailed
from .carrier import choose
from .header import Manifest, Route, Seat
from .tree import sources_of

T = TypeVar("T")

NOTHING = -1
"""Version of a member that holds no weights."""

ENDING_S = 5.0
"""For what was cancelled to end."""


class Port(Protocol):
    """A member, as it is reached by messages: a ref to an actor that has them will do."""

    async def seat(self) -> Seat:
        """Where it is, and what it wants."""

    async def load(self, manifest: Manifest, route: Route) -> int:
        """Takes a version and returns its number. Raises RuntimeFault and keeps what it has."""


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long a transfer may take."""

    base_s: float = 5.0
    least_bytes_per_s: float = 50e6
    """Slower than that, and it is given up."""
    stall_s: float = 0.25
    """See Route."""
    again_s: tuple[float, float] = (1.0, 30.0)
    """Until one that is lost is tried again, first and at most; it doubles from time to time."""


@dataclass(slots=True)
class Member:
    """A member, and how it stands with it."""

    name: str
    port: Port
    incarnation: int
    seat: Seat | None = None
    holds: int = NOTHING
    taking: int | None = None
    since: float = 0.0
    carrier: str = ""
    lost: str = ""
    """Why; empty while it takes what it is given."""
    refused: Exception | None = None
    """Why what was tried can never be taken there."""
    tried: Manifest | None = None
    """What failed there."""
    failures: int = 0
    """Since it took something."""
    carried: Manifest | None = None
    """What a convoy has brought it last."""
    task: asyncio.Task[None] | None = None

    @property
    def followed(self) -> bool:
        """Whether there is somebody who brings it something."""
        return self.task is None or not self.task.done()

    def lacks(self, manifest: Manifest | None) -> bool:
        """Whether it is to be given that, now."""
        return manifest is not None and manifest is not self.tried and manifest.version != self.holds

    def admit(self, manifest: Manifest, wanted: str) -> None:
        """Chooses its carrier. Raises BadWeights, ValueError if it can't take what is published."""
        assert self.seat is not None
        self.carrier = choose(manifest.offer(), self.seat, wanted)
        if found := self.seat.mismatch(manifest.by(self.carrier).tensors):
            raise BadWeights(f"{self.name} can't take version {manifest.version} of {manifest.name}: {found}")

    def took(self, version: int) -> None:
        self.holds, self.lost, self.tried, self.refused, self.failures = version, "", None, None, 0

    def lose(self, manifest: Manifest, error: Exception) -> str:
        """It has not taken that; why, in words."""
        self.tried, self.lost = manifest, f"{type(error).__name__}: {error}"
        self.refused = error if isinstance(error, BadWeights | ValueError) else None
        self.failures += 1
        return self.lost

    def again_s(self, patience: Patience) -> float | None:
        """Until it is to be tried again; None if it is not."""
        if not self.lost or self.refused is not None:
            return None
        first, most = patience.again_s
        return min(first * 2.0 ** (self.failures - 1), most)


async def answer(question: Awaitable[T]) -> T:
    """What a port answers, whatever it does when it is cancelled. Raises what it raises; TransferFailed if it was
    cancelled there and not here."""
    task = asyncio.ensure_future(question)
    try:
        await asyncio.wait([task])
        if task.cancelled():
            raise TransferFailed("it was cancelled where it ran")
        return task.result()
    finally:
        await ended([task])


async def ended(tasks: Iterable[asyncio.Future[Any]]) -> None:
    """Cancels what is still asked, and waits for its end, but not for ever."""
    tasks = list(tasks)
    unfinished = [task for task in tasks if not task.done()]
    for task in unfinished:
        task.cancel()
    if unfinished:
        await asyncio.wait(unfinished, timeout=ENDING_S)
    for task in tasks:
        task.add_done_callback(lambda task: task.cancelled() or task.exception())


def route_to(
    member: Member, members: Iterable[Member], manifest: Manifest, epoch: int, deadline_s: float, stall_s: float
) -> Route:
    """How a version, as its carrier has it, comes to one of `members`. Those that are lost hand nothing on."""
    live = [other for other in members if not other.lost or other is member]
    sources: tuple[str, ...] = ()
    if member.carrier == "tree":
        tree = [other for other in live if other.carrier == "tree"]
        addresses = [manifest.seat.address, *(other.seat.address if other.seat else "" for other in tree)]
        sources = sources_of(tree.index(member) + 1, addresses)
    return Route(
        carrier=member.carrier, epoch=epoch, members=(manifest.name, *(other.name for other in live)),
        rank=live.index(member) + 1, sources=sources, token=manifest.token, deadline_s=deadline_s, stall_s=stall_s,
    )  # fmt: skip
