"""Brings every version to every member, whoever dies, stops or is slow on the way.

    publish(version) -> lay_out: the publisher's manifest, the newest from here on
                              |
    member --- follows: takes the newest, then the newest after that ---> holds[name]
           '-- dead, past its deadline, failing: lost; tried again after a while, or with the next version

Each member is followed by a task of its own: one that fails costs the others nothing, what was published meanwhile is
coalesced to the newest, and who joins late is given the newest at once. Every join, leave and loss begins a new epoch,
and so does what has to be repeated; members refuse what is of an old one. Members of a collective carrier are led
together by a convoy. Lives where the run's state does; knows members and publishers by a few messages, and nothing of
what the weights are for.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from functools import partial
from typing import Any

from ..deadline import timeout
from ..errors import BadWeights, CorruptWeights, RuntimeFault, StaleIncarnation, TransferFailed
from .convoy import Convoy
from .convoy import Port as LedPort
from .header import Manifest
from .member import NOTHING, Member, Patience, Port, answer, route_to

COLLECTIVE = frozenset({"nccl"})
"""Carriers by which all members take part at once; the ports of these also are convoy.Port."""

GRACE_S = 0.5
"""A member has so much longer than its transfer, to say why that failed."""


LayOut = Callable[[int, dict[int, list[str]]], Awaitable[Manifest]]
"""Has the publisher lay out what it has as this version, and keep those that the names given still need."""

Roster = Callable[[], Awaitable[Mapping[str, tuple[Port, int]]]]
"""Who is to be a member now, by name: how it is reached, and which incarnation of it that is."""


class Exchange:
    """One per publisher. Its tasks are those of `background`, by default of the loop: close it."""

    def __init__(
        self,
        lay_out: LayOut,
        *,
        carrier: str = "auto",
        patience: Patience | None = None,
        roster: Roster | None = None,
        leads: Mapping[str, LedPort] | None = None,
        on_held: Callable[[str, int], None] = lambda name, version: None,
        on_lost: Callable[[str, str], None] = lambda name, why: None,
        background: Callable[..., asyncio.Task[None]] | None = None,
    ) -> None:
        """`leads`: the publishers, for collective carriers. `on_held`, `on_lost` are told when a member has taken a
        version, or why it has not.
        """
        self.manifest: Manifest | None = None
        """The newest."""
        self.epoch = time.time_ns() // 1_000_000
        """Of the membership. It begins above all that another exchange can have reached, and goes on above what members
    say that they have seen."""
        self._lay_out = lay_out
        self._carrier = carrier
        self._patience = patience or Patience()
        self._roster = roster
        self._leads = dict(leads or {})
        self._convoy = Convoy(self._next_epoch)
        self._leading = asyncio.Lock()
        self._on_held, self._on_lost = on_held, on_lost
        self._background = background or _task
        self._members: dict[str, Member] = {}
        self._kept: dict[str, int] = {}
        self._publishing = asyncio.Lock()
        self._changed = asyncio.Event()
        self._wanted = NOTHING

    @property
    def holds(self) -> dict[str, int]:
        """The version that each member holds; NOTHING for none."""
        return {member.name: member.holds for member in self._members.values()}

    @property
    def lost(self) -> dict[str, str]:
        """Members that did not take what they were given last, and why."""
        return {member.name: member.lost for member in self._members.values() if member.lost}

    @property
    def refused(self) -> dict[str, Exception]:
        """Members that can never take the newest version, and why."""
        return {m.name: m.refused for m in self._members.values() if m.refused is not None}

    async def join(self, name: str, port: Port, incarnation: int = 0) -> int:
        """A member comes, or comes back. Returns once it holds the newest version, that version; NOTHING if there is
        none yet.

        Raises BadWeights if its tensors are others than those that are published, ValueError if no carrier serves it:
        then it is no member. Raises TransferFailed if it does not take them now: it is tried again.
        """
        member = self.enter(name, port, incarnation)
        try:
            return await self._settled(member)
        except (BadWeights, ValueError):
            self.leave(name)
            raise

    def enter(self, name: str, port: Port, incarnation: int = 0) -> Member:
        """As `join`, and waits for nothing. An incarnation that is a member stays it, and is tried again."""
        known = self._members.get(name)
        if known is not None and known.followed and known.incarnation == incarnation and known.port is port:
            known.tried = None
            self._tell()
            return known
        self.leave(name)
        member = self._members[name] = Member(name, port, incarnation)
        self.epoch += 1
        member.task = self._background(self._follow(member), name=f"weights of {name}")
        member.task.add_done_callback(partial(self._unfollowed, member))
        return member

    def leave(self, name: str) -> None:
        """A member goes, or has gone: nothing more is brought to it, or kept for it."""
        member = self._members.pop(name, None)
        self._kept.pop(name, None)
        if member is not None:
            self.epoch += 1
            member.lost = "it left"
            if member.task is not None:
                member.task.cancel()
            self._tell()

    async def publish(self, version: int) -> Manifest:
        """Has `version` laid out, and members take it from now on; returns when it is laid out. Of publishes that come
        while one is laid out, the newest alone is done.

        First the members are compared with the roster: who is missing leaves, who is new or another joins. Raises what
        `lay_out` raises; then members stay with what was published before.
        """
        self._wanted = max(self._wanted, version)
        async with self._publishing:
            if self._wanted != NOTHING or self.manifest is None or self.manifest.version < version:
                await self._reconcile()
                wanted, self._wanted = max(self._wanted, version), NOTHING
                self.offer(await self._lay_out(wanted, self.needed()))
            assert self.manifest is not None
            return self.manifest

    def offer(self, manifest: Manifest) -> None:
        """Has members take what was laid out by somebody else; returns at once."""
        self.manifest = manifest
        self._tell()

    async def settled(self) -> dict[str, int]:
        """Waits until every member holds the newest version or is lost; `holds`."""
        for member in list(self._members.values()):
            try:
                await self._settled(member)
            except (RuntimeFault, TimeoutError, ValueError):
                continue  # It is in `lost`.
        return self.holds

    def keep(self, name: str, version: int) -> None:
        """Somebody goes on with an older version: it stays, for others that need it, until `release(name)`."""
        self._kept[name] = version

    def release(self, name: str) -> None:
        self._kept.pop(name, None)

    def waits(self) -> list[str]:
        """Who takes what, by which carrier, since when; and who is lost."""
        now = time.monotonic()
        taking = [
            f"{m.name} takes version {m.taking} by {m.carrier}, for {now - m.since:.1f} s"
            for m in self._members.values()
            if m.taking is not None
        ]
        return taking + [f"{name} is lost: {why}" for name, why in self.lost.items()]

    async def close(self) -> None:
        """Ends all transfers."""
        tasks = [member.task for member in self._members.values() if member.task is not None]
        for name in list(self._members):
            self.leave(name)
        if tasks:
            await asyncio.wait(tasks)

    async def _follow(self, member: Member) -> None:
        """Brings one member version after version."""
        while True:
            changed, manifest = self._changed, self.manifest
            if manifest is not None and member.lacks(manifest):
                await self._bring(member, manifest)
                self._tell()
                continue
            try:
                async with asyncio.timeout(member.again_s(self._patience)):
                    await changed.wait()
            except TimeoutError:
                member.tried = None

    async def _bring(self, member: Member, manifest: Manifest) -> None:
        """One transfer to one member. What went wrong is its `lost`."""
        patience = self._patience
        deadline_s = patience.base_s + manifest.nbytes / patience.least_bytes_per_s
        try:
            member.taking, member.since = manifest.version, time.monotonic()
            if member.seat is None:
                async with timeout(deadline_s + GRACE_S):
                    member.seat = await answer(member.port.seat())
                self.epoch = max(self.epoch, member.seat.epoch + 1)
            member.admit(manifest, self._carrier)
            theirs = manifest.by(member.carrier)
            if member.carrier in COLLECTIVE:
                await self._lead(member, manifest, theirs)
            route = route_to(member, self._members.values(), theirs, self.epoch, deadline_s, patience.stall_s)
            async with timeout(deadline_s + member.seat.load_s + GRACE_S):
                version = await answer(member.port.load(theirs, route))
            if version != manifest.version:
                raise TransferFailed(f"it says that it has version {version}, and was given {manifest.version}")
            member.took(version)
        except (StaleIncarnation, CorruptWeights) as error:
            await self._again(member, manifest, error)
        except Exception as error:  # noqa: BLE001 (the edge of a member: what it raises costs nobody else anything)
            self._lose(member, manifest, error)
        else:
            self._on_held(member.name, member.holds)
        finally:
            member.taking = None

    async def _lead(self, member: Member, manifest: Manifest, theirs: Manifest) -> None:
        """Has a convoy bring it, as the carrier has it, to the member, and to all others that lack it and use the same
        carrier. Raises TransferFailed if it could not."""
        async with self._leading:
            if member.carried is manifest:
                return
            fellows = [m for m in self._members.values() if m.carrier == member.carrier and m.carried is not manifest]
            ports = {m.name: m.port for m in fellows if isinstance(m.port, LedPort)}
            lost = await self._convoy.publish(theirs, self._leads, ports)
            if lost:
                self._next_epoch()  # That of the convoy is over at all members.
            for fellow in fellows:
                if fellow.name not in lost:
                    fellow.carried = manifest
        if member.name in lost:
            raise TransferFailed(lost[member.name])

    def _next_epoch(self) -> int:
        self.epoch += 1
        return self.epoch

    async def _again(self, member: Member, manifest: Manifest, error: RuntimeFault) -> None:
        """What was laid out is not there any more, or damaged: it is laid out anew, unless that has happened."""
        if manifest is not self.manifest:
            return
        repeated = member.tried is not None and member.tried.version == manifest.version
        self._lose(member, manifest, error)
        if not repeated:
            try:
                await self.publish(manifest.version)
            except Exception as fault:  # noqa: BLE001 (of the publisher: the member goes on with what it has)
                member.lost += f"; and it can't be published again: {fault}"

    def _lose(self, member: Member, manifest: Manifest, error: Exception) -> None:
        why = member.lose(manifest, error)
        self.epoch += 1
        self._on_lost(member.name, why)

    async def _settled(self, member: Member) -> int:
        """Waits until it holds the newest; raises TransferFailed once it is lost."""
        while self.manifest is not None and member.holds != self.manifest.version:
            gone = not member.followed or self._members.get(member.name) is not member
            if member.lost and (gone or not member.lacks(self.manifest)):
                if member.refused is not None:
                    raise member.refused
                raise TransferFailed(f"{member.name} has not taken version {self.manifest.version}: {member.lost}")
            await self._changed.wait()
        return member.holds

    def _unfollowed(self, member: Member, task: asyncio.Task[None]) -> None:
        """Nobody brings it anything any more: it has left, or the task failed, which is its owner's affair, too."""
        error = None if task.cancelled() else task.exception()
        member.lost = member.lost or f"its task has ended: {error if error is None else repr(error)}"
        self._tell()

    def _tell(self) -> None:
        """Whoever waits for a change looks again."""
        self._changed.set()
        self._changed = asyncio.Event()

    def needed(self) -> dict[int, list[str]]:
        """Versions that must stay, and who needs each."""
        needed: dict[int, list[str]] = {}
        for name, version in [*self._kept.items(), *((m.name, m.taking) for m in self._members.values())]:
            if version is not None:
                needed.setdefault(version, []).append(name)
        return needed

    async def _reconcile(self) -> None:
        """Makes the members those of the roster."""
        if self._roster is None:
            return
        wanted = await self._roster()
        for name in [name for name in self._members if name not in wanted]:
            self.leave(name)
        for name, (port, incarnation) in wanted.items():
            member = self._members.get(name)
            if member is None or not member.followed or member.incarnation != incarnation:
                self.enter(name, port, incarnation)


def _task(work: Coroutine[Any, Any, None], *, name: str) -> asyncio.Task[None]:
    return asyncio.get_running_loop().create_task(work, name=name)
