"""One rank of a worker group: an actor that knows its rank, keeps parts of batches, and gets parts from other ranks.

    group --run_method(arguments with handles)--> rank --kept_part(key)--> the ranks that keep them
                                               '--> its method --> answered, kept under a key, or dropped

What it keeps is bounded, and gone with its incarnation. Knows nothing of protocols; see dispatch.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NoReturn

from .actor import Actor, message
from .batches import count, join, nbytes
from .batches import part as cut
from .errors import BatchesFull, BatchGone
from .layout import ONE, Layout
from .mailbox import Lane
from .remote_batch import RemoteBatch, RemotePart

ANSWER, DROP = "", "-"
"""Keys of `run_method` for a result that is to be answered, and for one that nobody needs."""

ALIKE = (ValueError, ArithmeticError)
"""Errors that come of what all ranks were given: all raise them, and are left in the same state."""

LONGEST_S = 3600.0
"""A call of `run_method` comes with the deadline of the method."""


@dataclass(kw_only=True)
class Worker(Actor):
    """Base of the actors of a worker group. What its @dispatch methods compute, all ranks compute together."""

    max_kept_bytes: ClassVar[int] = 1 << 30
    """Of arrays in parts that were asked to stay here, and not released."""

    rank: int = 0
    """Its number in the group."""
    layout: Layout = ONE
    """How the ranks are arranged."""

    async def together(
        self,
        function: Callable[..., Any],
        *args: Any,
        alike: tuple[type[Exception], ...] = ALIKE,
    ) -> Any:
        """Runs on the actor's own thread what the ranks of a group compute together, and returns its result.

        Errors of the types `alike` are raised: they come of what all ranks were given, and leave all in the same state.
        Any other may be of this rank alone, while the others wait for it: it fails this rank, and so the group is
        started again. One rank alone raises everything.
        """
        try:
            return await self.in_thread(function, *args)
        except alike:
            raise
        except Exception as error:
            if self.layout.size == 1 or self._node is None:
                raise
            await self.fail(error)

    async def fail(self, error: Exception) -> NoReturn:
        """Ends this rank for `error`, and so the group is started again. Whoever waits for its answer hears that."""
        failing = _failing(error)
        try:
            self.background(failing, name="fail")
        except RuntimeError:
            failing.close()  # It is being ended already.
        await asyncio.get_running_loop().create_future()  # Until then, which is at once.
        raise error

    @message(deadline_s=LONGEST_S)
    async def run_method(self, method: str, args: list[Any], kwargs: dict[str, Any], key: str) -> Any:
        """Calls a method, with what handles among its arguments stand for. Under a `key` the result stays here, and its
        samples and bytes are returned.

        Raises BatchGone, BatchesFull, and what the method raises.
        """
        spec = self.messages[method]
        given = [await self._fetched(value) for value in args]
        named = {name: await self._fetched(value) for name, value in kwargs.items()}
        bound: Callable[..., Any] = partial(getattr(self, method), *given, **named)
        result = await (self.in_thread(bound) if spec.kind == "thread" else bound())
        if key == DROP:
            return None
        return result if key == ANSWER else self._keep(key, result)

    @message(concurrent=True)
    async def kept_part(self, key: str, start: int, stop: int) -> Any:
        """Samples of what is kept here. Raises BatchGone."""
        return cut(self._kept_under(key), start, stop)

    @message(concurrent=True, lane=Lane.CONTROL)
    async def forget_parts(self, keys: list[str]) -> None:
        """Keeps these no longer; those that are not kept are no error."""
        for key in keys:
            self._kept_batches().pop(key, None)

    @message(concurrent=True, lane=Lane.CONTROL)
    async def kept_bytes(self) -> int:
        """Of the arrays that are kept here."""
        return sum(map(nbytes, self._kept_batches().values()))

    def _keep(self, key: str, result: Any) -> list[int]:
        samples, size = count(result), nbytes(result)
        if samples is None:
            raise ValueError(f"its result can't be kept as a batch: it is {type(result).__name__} without samples")
        held = sum(map(nbytes, self._kept_batches().values()))
        if held + size > self.max_kept_bytes:
            raise BatchesFull(
                f"{self.name} keeps {held} bytes for others, {size} more would pass its bound of "
                f"{self.max_kept_bytes}; release batches that are not needed any more"
            )
        self._kept_batches()[key] = result
        return [samples, size]

    async def _fetched(self, value: Any) -> Any:
        if not isinstance(value, RemoteBatch):
            return value
        return await fetch(value, self._ask_for, self.empty)

    async def _ask_for(self, part: RemotePart) -> Any:
        if part.owner == self.name:
            return cut(self._kept_under(part.key), part.start, part.stop)
        return await self.find(part.owner).kept_part(part.key, part.start, part.stop)

    def _kept_under(self, key: str) -> Any:
        if key not in self._kept_batches():
            raise BatchGone(f"{self.name} keeps no batch {key}: it was released, or the group has been restarted since")
        return self._kept_batches()[key]

    def _kept_batches(self) -> dict[str, Any]:
        kept: dict[str, Any] = self.__dict__.setdefault("_batches", {})
        return kept


async def _failing(error: Exception) -> None:
    raise error


async def fetch(batch: RemoteBatch, ask: Callable[[RemotePart], Any], empty: Callable[..., Any]) -> Any:
    """The batch itself, all its parts asked for at once. Raises BatchGone, ActorDied."""
    asking = [asyncio.ensure_future(ask(part)) for part in batch.parts]
    try:
        return join(await asyncio.gather(*asking), empty)
    finally:
        for part in asking:
            part.cancel()
