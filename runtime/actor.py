"""The actor contract: what a class must be to live in a node.

    class you write                     what the node does with it
    ---------------------------------   ---------------------------------------------------------
    fields                              configuration; sent to the node, never changed afterwards
    async start()                       once per incarnation, before the first message; opens state
    @message methods                    one at a time, in the order of lanes and arrival
    async stop(reason)                  once, after the last message; closes what start opened
    snapshot(), restore(state)          if it has them: what an incarnation leaves to the next

An instance is plain Python: after `await actor.start()` its methods can be tested with no runtime at all. Only
`@message` methods can be reached from outside. This module knows nothing of processes, sockets or supervision.

Where an exception goes: from a call or a stream, to the caller, and the actor lives on. From `start`, a cast or a
background task there is no caller, so the actor fails and its supervisor decides.

What is sent is given away: neither side changes it afterwards, be it an argument, an answer or an item of a stream.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar, overload

import numpy as np

from .deadline import unlimited
from .mailbox import MAILBOX_BYTES, Lane
from .thread import WorkThread

if TYPE_CHECKING:
    from .copies import Copies
    from .directory import Status
    from .memory import Memory
    from .node import Node
    from .ref import Ref
    from .worker import Worker
    from .worker_group import WorkerGroup

F = TypeVar("F", bound=Callable[..., Any])

DEFAULT_DEADLINE_S = 60.0
"""A call with no deadline of its own is given up after this long; for a stream it bounds the wait for each item."""


@dataclass(frozen=True, slots=True)
class MessageSpec:
    """How a node handles one kind of message."""

    name: str
    kind: Literal["async", "stream", "thread"]
    concurrent: bool
    lane: Lane
    deadline_s: float


@overload
def message(method: F, /) -> F: ...
@overload
def message(
    *, concurrent: bool = ..., thread: bool = ..., lane: Lane = ..., deadline_s: float = ...
) -> Callable[[F], F]: ...
def message(
    method: Callable[..., Any] | None = None,
    /,
    *,
    concurrent: bool = False,
    thread: bool = False,
    lane: Lane = Lane.NORMAL,
    deadline_s: float = DEFAULT_DEADLINE_S,
) -> Any:
    """Makes a method reachable by refs.

    `async def` runs on the node's loop; an async generator answers a stream; `thread=True` takes a plain `def` and runs
    it on the actor's own thread, so that the loop keeps answering while it computes. `concurrent=True` lets it overlap
    with other messages: it waits for no turn. `deadline_s` applies where the caller sets none. Raises TypeError if the
    method is not of that kind.
    """

    def mark(method: Callable[..., Any]) -> Callable[..., Any]:
        if inspect.isasyncgenfunction(method):
            kind = "stream"
        elif inspect.iscoroutinefunction(method):
            kind = "async"
        else:
            kind = "thread"
        if (kind == "thread") != thread:
            wrong = "must be `def` with thread=True" if thread else "must be `async def`, or declare thread=True"
            raise TypeError(f"@message {method.__qualname__}: {wrong}")
        if method.__name__.startswith("_"):
            raise TypeError(f"@message {method.__qualname__}: a message has a public name")
        if not deadline_s > 0:
            raise ValueError(f"@message {method.__qualname__}: deadline_s must be > 0, got {deadline_s}")
        spec = MessageSpec(method.__name__, kind, concurrent, lane, deadline_s)  # type: ignore[arg-type]
        method.__message__ = spec  # type: ignore[attr-defined]
        return method

    return mark(method) if method is not None else mark


class Actor:
    """Base of all actors; subclasses are keyword-only dataclasses. See the module docstring for the contract."""

    messages: ClassVar[dict[str, MessageSpec]] = {}
    """The @message methods of the class, inherited ones included."""

    mailbox_capacity: ClassVar[int] = 2048
    """Messages of each lane that may wait; see mailbox.py for what happens beyond."""

    snapshot_every_s: ClassVar[float | None] = None
    """How often `snapshot` is taken; None: only when the actor calls `save`."""

    mailbox_bytes: ClassVar[int] = MAILBOX_BYTES
    """Bytes of each lane that may wait; a single larger message is taken when none waits."""

    live: ClassVar[tuple[str, ...]] = ()
    """Fields that may be changed while it runs, by `settings(...)` at the prompt of `bin/attach`: "rl.alpha" is `alpha`
    of the dataclass in the field `rl`. Actors that name the same share it."""

    _node: Node | None = None
    _name: str = ""
    _epoch: int = 1
    _memory: Memory | None = None
    _tasks: asyncio.TaskGroup | None = None
    _thread: WorkThread | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        own = {n: m.__message__ for n, m in vars(cls).items() if hasattr(m, "__message__")}
        for name in (cls.messages.keys() & vars(cls).keys()) - own.keys():
            raise TypeError(f"{cls.__name__}.{name} overrides a @message: it must be marked @message too")
        cls.messages = {**cls.messages, **own}

    async def start(self) -> None:
        """Opens state. Raising here fails the incarnation."""

    async def stop(self, reason: BaseException | None) -> None:
        """Closes what `start` opened; `reason` is None for an orderly stop."""

    def snapshot(self) -> Any:
        """The state that the next incarnation gets: any value that can travel in a message; None for none.

        Taken between two messages that take turns, every `snapshot_every_s` if something was handled since, and when
        the actor is stopped in good order; not when it has failed. The root keeps the last one in memory. So a restart
        loses what was handled after the last snapshot or `save`: at most `snapshot_every_s` and the time it travels.
        """
        return None

    def restore(self, state: Any) -> None:
        """Takes up the state of an earlier incarnation, after `start` and before the first message. Arrays in it are
        read-only. Raising here fails the incarnation, as in `start`."""

    def fits(self) -> None:
        """Called on a copy before live fields are changed. Raises ValueError if their values do not fit the others."""

    async def changed(self) -> None:
        """Live fields have new values; called between two messages. What `start` made of the old ones is made anew."""

    async def save(self) -> None:
        """Returns when the root keeps what `snapshot` gives now. Does nothing outside a system.

        Raises SnapshotRefused if it is too large, CodecError if it can't travel.
        """
        if self._memory is not None:
            await self._memory.save()

    @property
    def epoch(self) -> int:
        """How often the actor's group was started as a whole: the same for all members that work together."""
        return self._epoch

    @property
    def name(self) -> str:
        """The name in the system, or "" outside one."""
        return self._name

    def find(self, name: str) -> Ref:
        """The ref to another actor of this system, whether it is up yet or not."""
        if self._node is None:
            raise RuntimeError(f"{type(self).__name__}.find({name!r}): this actor is not in a running system")
        return self._node.ref(name)

    def worker_group(self, name: str, kind: type[Worker]) -> WorkerGroup:
        """The worker group `name` of this system, of ranks of class `kind`: one, or as many as were declared."""
        from .worker_group import WorkerGroup

        return WorkerGroup.find(self, name, kind)

    def copies(self, of: str) -> Copies:
        """The actors of this system that are configured as `of` is, whose number may change: see copies.py."""
        from .copies import Copies

        return Copies(self, of)

    def watch(self, name: str) -> AsyncIterator[Status]:
        """Yields the present status of an actor and then each change: up (a new incarnation), down, stopped."""
        if self._node is None:
            raise RuntimeError(f"{type(self).__name__}.watch({name!r}): this actor is not in a running system")
        return self._node.directory.watch(name)

    def log(self, event: str, **fields: Any) -> None:
        """Writes a line to the run's events.jsonl; does nothing outside a system."""
        if self._node is not None:
            self._node.emit(event, actor=self._name, **fields)

    def expose(self, name: str, value: Any) -> None:
        """Makes an object of this actor reachable by name at the prompt of `bin/attach`: `await name.method(...)`. Does
        nothing outside a system."""
        if self._node is not None:
            self._node.exposed[name] = self, value

    def background(self, work: Coroutine[Any, Any, None], *, name: str) -> asyncio.Task[None]:
        """Starts a task that the actor owns: cancelled at stop, and its failure is the actor's failure.

        It outlives the message that started it, so it has none of its deadline.
        """
        owner = self._tasks or asyncio.get_running_loop()
        return owner.create_task(work, name=f"{self._name}:{name}", context=unlimited())

    def empty(self, shape: int | Sequence[int], dtype: Any = np.float32) -> np.ndarray:
        """Like `numpy.empty`, in memory that other nodes of this host can map: sent whole, or a contiguous part of at
        least 128 KiB, not a byte is copied, to however many nodes.

        After sending, do not write: the receivers would see it. The memory is used again when this array is gone and
        every receiver's is too. What is small, or finds no room in the arena (`System(arena_bytes=...)`), is ordinary
        memory and is sent as any other array. From any thread.
        """
        return np.empty(shape, dtype) if self._node is None else self._node.empty(shape, dtype)

    async def in_thread(self, function: Callable[..., Any], *args: Any) -> Any:
        """Runs `function` on the actor's own thread (always the same one) and waits for its result.

        A thread can't be interrupted: cancelled meanwhile, this still waits until the function returns.
        """
        if self._thread is None:
            self._thread = WorkThread(self._name or type(self).__name__)
        return await self._thread.run(function, *args)
