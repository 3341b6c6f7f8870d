"""The rollout workers of a run: who holds which weights, and who writes which group.

    finish(group) --> the worker with the least to do, of those with weights --died, leaves--> another one goes on
    publish(manifest) --> every worker, and each that comes          resize(n) --> more of them, or fewer

Its owner is the controller; nothing here outlives it. Knows nothing of batches, staleness or rewards.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

from ...runtime import Actor, Ref, timeout
from ...runtime.errors import ActorDied, UnknownMessage
from ...runtime.exchange import Exchange, Manifest, Patience
from ..types import Group
from .answers import write_on

NOTHING = -1
"""Version of a worker that holds no weights."""

STATS_S = 2.0
"""Longest wait for numbers that are only shown."""

TOTALS = ("live", "waiting", "steps", "tokens", "prefilled_tokens", "busy_s")
"""What the numbers of several workers add up to; of others the largest counts."""

PATIENCE = Patience(base_s=60.0)
"""With the transfer of weights: a worker that starts may share its cores with all the others that do."""

ARM_S = 600.0
"""Longest wait for the first worker to take the newest weights, its restart included."""

NEWS_S = 1.0
"""How long the news that a worker is down may come after the end of its stream."""


class Owner(Protocol):
    """Who is told what happens to the groups."""

    def halted(self, group: Group) -> None:
        """Nobody writes the group now."""

    def continued(self, group: Group) -> None:
        """A worker writes the group, or goes on with it."""

    def armed(self, publish_s: float) -> None:
        """A worker holds the newest version, so many seconds after it was there."""

    async def lay_out(self, version: int, keep: dict[int, list[str]]) -> Manifest:
        """Has the newest weights laid out, as this version or a newer one; versions in `keep`, and the workers that
        need each, stay."""


@dataclass(eq=False)
class Writer:
    """One rollout worker, as the pool sees it."""

    name: str
    ref: Ref
    incarnation: int = 0
    holds: int = NOTHING
    """The policy version that it has taken."""
    stopped: str = ""
    """Why it has stopped for good."""
    leaving: bool = False
    groups: dict[int, tuple[Group, asyncio.Future[None]]] = field(default_factory=dict)
    """What it writes, by ordinal."""

    @property
    def num_unfinished(self) -> int:
        """Responses that it still has to write."""
        return sum(not t.finish for group, _ in self.groups.values() for t in group.trajectories)


class RolloutPool:
    """See the module. `actor` is the one that owns the tasks: the controller."""

    def __init__(self, actor: Actor, owner: Owner, name: str = "rollout", carrier: str = "auto") -> None:
        self._actor = actor
        self._owner = owner
        self._copies = actor.copies(name)
        self._writers: dict[str, Writer] = {}
        self._watching: dict[str, asyncio.Task[None]] = {}
        self._exchange = Exchange(
            self._lay_out, roster=self._present, carrier=carrier, patience=PATIENCE, on_held=self._held,
            on_lost=self._not_taken, background=actor.background,
        )  # fmt: skip
        self._arming = False
        self._published = 0.0
        self._news = asyncio.Event()
        self._waiting: Counter[int] = Counter()
        self._went_on: list[int] = []

    async def open(self) -> None:
        """Finds the workers there are."""
        for name in await self._copies.names():
            self._add(name)

    def __repr__(self) -> str:
        rows = self.status()
        workers = (f"{row['name']} {row['state']}, version {row['version']}, {row['groups']} groups" for row in rows)
        return f"RolloutPool({'; '.join(workers)})"

    @property
    def newest(self) -> int:
        """The newest version that a worker holds, NOTHING if none holds any."""
        return max((w.holds for w in self._writers.values() if not w.leaving), default=NOTHING)

    @property
    def names(self) -> list[str]:
        return list(self._writers)

    def status(self) -> list[dict[str, Any]]:
        """One row per worker: name, incarnation, version, groups, responses it still has to write."""
        return [
            {
                "name": w.name, "incarnation": w.incarnation, "version": w.holds, "groups": len(w.groups),
                "unfinished": w.num_unfinished, "state": w.stopped or ("leaving" if w.leaving else "up"),
            }
            for w in self._writers.values()
        ]  # fmt: skip

    def waits(self) -> list[str]:
        """Who waits for a worker, or takes weights, in words."""
        waiting = {version: count for version, count in self._waiting.items() if count}
        groups = [f"{n} groups wait for a rollout worker that holds version {v} or newer" for v, n in waiting.items()]
        if self._arming:
            groups.append("an evaluation waits until the first rollout worker holds the newest version")
        return groups + self._exchange.waits()

    async def resize(self, count: int) -> list[str]:
        """Has `count` workers, and returns their names. New ones hold weights before their first token; what those that
        leave were writing goes on elsewhere.

        Raises ValueError for less than one, and what the `start` of a new one raised: then the others stay.
        """
        if count < 1:
            raise ValueError(f"there must be at least one rollout worker, got {count}; to have none, stop the run")
        numbered = await self._copies.names()
        for name in numbered[count:]:
            writer = self._writers[name]
            writer.leaving = True
            for _, writing in writer.groups.values():
                writing.cancel()
        try:
            names = await self._copies.resize(count)
        finally:
            left = await self._copies.names()
            for name in self._writers.keys() - set(left):
                self._watching.pop(name).cancel()
                self._exchange.leave(name)
                del self._writers[name]
            for name in left:
                self._add(name).leaving = False
        self._actor.log("rollout_resized", workers=len(names))
        self._tell()
        return names

    # Weights ------------------------------------------------------------------------------------------------

    async def publish(self, version: int) -> None:
        """Has the newest version laid out, and returns; every worker that there is takes it while it goes on.

        Raises what `lay_out` raised: then workers keep what they have.
        """
        await self._exchange.publish(version)

    async def _lay_out(self, version: int, keep: dict[int, list[str]]) -> Manifest:
        manifest = await self._owner.lay_out(version, keep)
        self._published = time.monotonic()
        return manifest

    async def _present(self) -> dict[str, tuple[Ref, int]]:
        """The workers that are up, and their incarnations: whatever was heard of them."""
        present: dict[str, tuple[Ref, int]] = {}
        for name in await self._copies.names():
            writer = self._add(name)
            try:
                async with asyncio.timeout(STATS_S):
                    status = await anext(self._actor.watch(name))
            except TimeoutError:
                continue  # It has not been heard of: it is not up yet.
            if status.state == "up" and not writer.leaving:
                if status.incarnation != writer.incarnation:
                    writer.incarnation, writer.holds = status.incarnation, NOTHING
                present[name] = writer.ref, status.incarnation
        return present

    async def arm_first(self) -> None:
        """Returns when the first worker holds the newest version.

        Raises ActorDied if it has stopped for good, TimeoutError if it takes nothing within ARM_S.
        """
        first = next(iter(self._writers.values()))
        self._arming = True
        try:
            async with asyncio.timeout(ARM_S):
                while (manifest := self._exchange.manifest) is not None and first.holds != manifest.version:
                    if first.stopped:
                        raise ActorDied(f"{first.name} has stopped for good: {first.stopped}")
                    await self._news.wait()
        except TimeoutError:
            why = "; ".join(self._exchange.waits()) or "nobody says why"
            raise TimeoutError(f"{first.name} has not taken the newest weights within {ARM_S:g} s: {why}") from None
        finally:
            self._arming = False

    def _held(self, name: str, version: int) -> None:
        self._writers[name].holds = version
        self._owner.armed(time.monotonic() - self._published)
        self._tell()

    def _not_taken(self, name: str, why: str) -> None:
        manifest = self._exchange.manifest
        self._actor.log("weights_not_taken", worker=name, version=manifest and manifest.version, reason=why)
        refused = self._exchange.refused
        if name in refused and all(writer.stopped or writer.name in refused for writer in self._writers.values()):
            raise refused[name]  # In a task of the owner, which so fails, and says why.

    # Writing ------------------------------------------------------------------------------------------------

    async def finish(self, group: Group, least: int = 0, **asked: Any) -> None:
        """Returns when all responses of the group have ended, whoever writes them. What was written stays.

        Only workers that hold version `least` or a newer one write it. `asked`: see finish_answers. Raises RemoteError
        if it can't be generated, and ActorDied if all workers have stopped for good.
        """
        ordinal, lost = group.prompt.ordinal, None
        while not group.finished:
            writer = await self._pick(least, lost)
            self._owner.continued(group)
            if lost is not None:
                self._count_continued(group)
            incarnation = writer.incarnation
            writing = asyncio.ensure_future(write_on(writer.ref, [group], **asked))
            writer.groups[ordinal] = group, writing
            try:
                await writing
            except (ActorDied, asyncio.CancelledError) as error:
                task = asyncio.current_task()
                if isinstance(error, asyncio.CancelledError) and (not writer.leaving or (task and task.cancelling())):
                    raise
                lost = writer, incarnation
                if not group.finished:
                    self._owner.halted(group)
            finally:
                writing.cancel()
                writer.groups.pop(ordinal, None)

    async def _pick(self, least: int, lost: tuple[Writer, int] | None) -> Writer:
        """The worker with the least to do; not the incarnation that was lost, unless it turns out to live."""
        patience = time.monotonic() + NEWS_S
        while True:
            can = [w for w in self._writers.values() if w.holds >= least and not w.leaving and not w.stopped]
            news = self._news
            if lost is not None and (late := patience - time.monotonic()) > 0:
                can = [w for w in can if (w, w.incarnation) != lost]
            else:
                late = None
            if can:
                return min(can, key=lambda w: w.num_unfinished)
            self._require_any()
            self._waiting[least] += 1
            with suppress(TimeoutError):
                try:
                    async with asyncio.timeout(late):
                        await news.wait()
                finally:
                    self._waiting[least] -= 1

    def _require_any(self) -> None:
        """Raises ActorDied if no worker will ever write again."""
        if all(writer.stopped for writer in self._writers.values()):
            ends = (f"{writer.name} has stopped for good: {writer.stopped}" for writer in self._writers.values())
            raise ActorDied("; ".join(ends))

    def _count_continued(self, group: Group) -> None:
        """Groups that go on at the same moment are one event."""
        if not self._went_on:
            asyncio.get_running_loop().call_soon(self._log_continued)
        self._went_on.append(group.num_tokens)

    def _log_continued(self) -> None:
        kept, self._went_on = self._went_on, []
        self._actor.log("answers_continued", groups=len(kept), tokens_kept=sum(kept))

    # Watching -----------------------------------------------------------------------------------------------

    def _add(self, name: str) -> Writer:
        if name not in self._writers:
            writer = self._writers[name] = Writer(name, self._actor.find(name))
            self._watching[name] = self._actor.background(self._watch(writer), name=f"watch {name}")
        return self._writers[name]

    async def _watch(self, writer: Writer) -> None:
        """Follows the incarnations of a worker, and arms each. Raises ActorDied when no worker is left."""
        async for status in self._actor.watch(writer.name):
            if status.state != "up" or status.incarnation != writer.incarnation:
                writer.holds = NOTHING
                self._exchange.leave(writer.name)
            if status.state == "up":
                writer.incarnation = status.incarnation
                self._exchange.enter(writer.name, writer.ref, status.incarnation)
            elif status.state == "stopped" and not writer.leaving:
                writer.stopped = status.reason or "orderly stop"
                self._require_any()
            self._tell()

    def _tell(self) -> None:
        self._news.set()
        self._news = asyncio.Event()

    # Measuring ----------------------------------------------------------------------------------------------

    async def stats(self) -> dict[str, Any]:
        """What Rollout.stats says of all workers together; of those that can't say now, nothing."""
        asked = [self._ask(w) for w in self._writers.values() if w.holds != NOTHING]
        total: dict[str, Any] = {}
        for stats in await asyncio.gather(*asked):
            for name, value in stats.items():
                total[name] = value if name not in total else _together(name, total[name], value)
        return total

    async def _ask(self, writer: Writer) -> dict[str, Any]:
        with suppress(ActorDied, TimeoutError, UnknownMessage):
            async with timeout(STATS_S):
                return dict(await writer.ref.stats())
        return {}


def _together(name: str, one: Any, other: Any) -> Any:
    if isinstance(one, dict):
        return {key: one.get(key, 0) + other.get(key, 0) for key in {**one, **other}}
    return one + other if name in TOTALS else max(one, other)
