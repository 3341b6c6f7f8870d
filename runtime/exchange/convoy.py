"""Leads a collective transfer: all members at once, again without those that are lost, until every other one has it.

    members changed: retire the old epoch (whoever does not answer is lost) -> open: a token -> transfer, all at once
         ^                                                                                        |
         '--- next epoch, without the lost and those that have it <-- one failed: retire all -----'
                                                                      nobody failed: done, the communicator is kept

A member is lost when it is dead, does not answer, or reports CommunicatorHung. One that only fails is tried again, with
the others and at last alone, so that a sick member costs nobody but itself. Every question has a deadline. Nothing is
swapped here: a member whose transfer succeeded has the version whole, one whose transfer failed keeps what it had.
Knows nothing of NCCL, processes or weights.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from ..errors import CommunicatorHung, CorruptWeights, TransferFailed
from .header import Manifest, Route
from .member import ended

TOGETHER = 2
"""Attempts with all that are left; after them, each is tried alone."""


@runtime_checkable
class Port(Protocol):
    """A publisher or a member, as it is reached by messages. Raises RuntimeFault."""

    async def retire(self, epoch: int) -> None:
        """Returns when it is alive, and nothing of this epoch or an earlier one is left there."""

    async def open(self, epoch: int) -> bytes:
        """Of the first publisher: what the others need to find it."""

    async def transfer(self, manifest: Manifest, route: Route) -> None:
        """Takes part; a member has the version, whole, when it returns."""


@dataclass(frozen=True, kw_only=True)
class Patience:
    """Times in seconds."""

    retire_s: float = 10.0
    """For a member to give up what it does: more than its own Limits allow it."""
    transfer_s: float = 60.0
    """For a whole transfer."""
    stall_s: float = 2.0
    """Without a wave that ended."""


class Convoy:
    """One per publisher; one `publish` at a time."""

    def __init__(
        self,
        next_epoch: Callable[[], int],
        *,
        carrier: str = "nccl",
        patience: Patience | None = None,
        on_lost: Callable[[str, str], None] = lambda name, why: None,
    ) -> None:
        self._next_epoch = next_epoch
        self._carrier = carrier
        self._patience = patience or Patience()
        self._on_lost = on_lost
        self._epoch = -1
        self._token = b""
        self._formed: dict[str, Port] = {}
        """Who has a communicator of this epoch, publishers first."""

    async def publish(
        self, manifest: Manifest, publishers: Mapping[str, Port], members: Mapping[str, Port]
    ) -> dict[str, str]:
        """Who is lost, and why; every other member has the version.

        Raises TransferFailed if a publisher is lost, or if those that are alive fail even alone with it: then the fault
        is not theirs, and they keep what they have.
        """
        left, lost = dict(members), dict[str, str]()
        for _ in range(TOGETHER):
            if left:
                await self._attempt(manifest, publishers, left, lost)
        sick: dict[str, str] = {}
        for name, port in left.items():
            alone = {name: port}
            errors = await self._attempt(manifest, publishers, alone, lost)
            if alone:
                sick[name] = _said(errors, name)
        if sick and len(sick) + len(lost) == len(members):
            raise TransferFailed(f"version {manifest.version} reached nobody: {'; '.join(sick.values())}")
        for name, why in sick.items():
            self._on_lost(name, why)
        return lost | sick

    async def _attempt(
        self, manifest: Manifest, publishers: Mapping[str, Port], left: dict[str, Port], lost: dict[str, str]
    ) -> dict[str, Exception]:
        """Takes those out of `left` who have the version, or are lost. Returns the errors of those who failed."""
        ports = {**publishers, **left}
        errors = await self._ready(publishers, ports)
        if not errors:
            errors = await self._transfer(manifest, ports)
            for name in [name for name in left if name not in errors]:
                del left[name]
        if errors:
            self._formed = {}
        dead = [name for name, error in errors.items() if not _may_try_again(error)]
        for name in dead:
            if left.pop(name, None) is not None:
                lost[name] = _said(errors, name)
                self._on_lost(name, lost[name])
        if gone := [_said(errors, name) for name in dead if name in publishers]:
            raise TransferFailed(f"version {manifest.version} can't be published: {'; '.join(gone)}")
        return errors

    async def _ready(self, publishers: Mapping[str, Port], ports: dict[str, Port]) -> dict[str, Exception]:
        """All are alive, and can form the communicator that they have not; else who can't."""
        same = list(self._formed.items()) == list(ports.items())
        errors = await self._retire(ports, -1 if same else self._epoch)
        if errors or same:
            return errors
        self._epoch = self._next_epoch()
        first, port = next(iter(publishers.items()))
        outcome = await self._asked({first: port.open(self._epoch)}, self._patience.retire_s)
        self._token = outcome[first] if isinstance(outcome[first], bytes) else b""
        self._formed = dict(ports)
        return _errors(outcome)

    async def _transfer(self, manifest: Manifest, ports: dict[str, Port]) -> dict[str, Exception]:
        """Who failed; on the first failure, all are told to stop."""
        patience, names = self._patience, tuple(ports)
        tasks = {
            name: asyncio.ensure_future(port.transfer(manifest, self._route(names, rank)))
            for rank, (name, port) in enumerate(ports.items())
        }
        try:
            await asyncio.wait(
                tasks.values(), timeout=patience.transfer_s + patience.retire_s, return_when=asyncio.FIRST_EXCEPTION
            )
            if any(_error(task) for task in tasks.values()):
                mute = await self._retire(ports, self._epoch)
                # Whoever is retired has answered, or is about to.
                await asyncio.wait(tasks.values(), timeout=0.5)
                return mute | {name: error for name, task in tasks.items() if (error := _error(task))}
            return {}
        finally:
            await ended(tasks.values())

    def _route(self, names: tuple[str, ...], rank: int) -> Route:
        return Route(
            carrier=self._carrier, epoch=self._epoch, members=names, rank=rank, token=self._token,
            deadline_s=self._patience.transfer_s, stall_s=self._patience.stall_s,
        )  # fmt: skip

    async def _retire(self, ports: Mapping[str, Port], epoch: int) -> dict[str, Exception]:
        """Who could not."""
        asked = {name: port.retire(epoch) for name, port in ports.items()}
        return _errors(await self._asked(asked, self._patience.retire_s))

    async def _asked(self, questions: Mapping[str, Coroutine[Any, Any, Any]], within_s: float) -> dict[str, Any]:
        """The answers, or errors, of all at once."""
        tasks = {name: asyncio.ensure_future(question) for name, question in questions.items()}
        try:
            await asyncio.wait(tasks.values(), timeout=within_s)
            return {name: _error(task) or task.result() for name, task in tasks.items()}
        finally:
            await ended(tasks.values())


def _error(task: asyncio.Future[Any]) -> Exception | None:
    if not task.done():
        return TimeoutError("it does not answer")
    if task.cancelled():
        return TimeoutError("it was cancelled where it ran")
    error = task.exception()
    if error is not None and not isinstance(error, Exception):
        raise error
    return error


def _errors(outcome: Mapping[str, Any]) -> dict[str, Exception]:
    return {name: answer for name, answer in outcome.items() if isinstance(answer, Exception)}


def _said(errors: Mapping[str, Exception], name: str) -> str:
    """What a member reported; what others did, if it did not."""
    return f"{name}: {errors[name]}" if name in errors else "; ".join(str(error) for error in errors.values())


def _may_try_again(error: Exception) -> bool:
    """It is alive, and rid of what failed."""
    return isinstance(error, (TransferFailed, CorruptWeights)) and not isinstance(error, CommunicatorHung)
