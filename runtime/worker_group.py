"""Ranks addressed as one: a call is cut and sent to all of them at once, their answers are joined in order.

    workers = await WorkerGroup.spawn(system, Scorer(), name="scorer", layout=Layout(dp=4))
    scores = await workers.score(batch)        4 ranks, a quarter of the batch each
    a, b = policy.update(x), critic.update(y)  begun at once; await a, b when they are needed
    kept = await workers.embed.keep(batch)     the result stays with the ranks (remote_batch.py)

How each method is cut and joined is said beside it (dispatch.py). The group is a gang: one rank fails, all are started
again. Deadlines and cancellation travel to all ranks; the first failure ends the others, and its error names the rank
and, if the rank has said so by BadSample, the sample as the caller counts.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Collection, Coroutine, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from .actor import Actor, MessageSpec
from .batches import Empty, arrays, nbytes, with_arrays
from .codec import LEND_BYTES
from .deadline import current_scope, deadline_of_call, timeout
from .dispatch import Arguments, Collect, Protocol
from .errors import ActorDied, BadSample, RankError, RemoteError, RuntimeFault
from .layout import Layout
from .lending import INLINE_BYTES
from .remote_batch import RemoteBatch, RemotePart
from .supervisor import RestartPolicy
from .worker import ANSWER, DROP, Worker, fetch

if TYPE_CHECKING:
    from .node import Node
    from .system import System

_serials = itertools.count(1)


class WorkerGroup:
    """The ranks of one group, by the @dispatch methods of their class."""

    def __init__(self, node: Node, kind: type[Worker], names: Sequence[str], layout: Layout | None = None) -> None:
        """`names` are those of the ranks' actors, by rank; without a `layout` all are replicas of each other."""
        self.layout = layout or Layout(dp=len(names))
        if self.layout.size != len(names):
            raise ValueError(f"{self.layout} has {self.layout.size} ranks, got {len(names)} actors")
        self.names = list(names)
        self._node = node
        self._kind = kind
        self._refs = [node.ref(name) for name in names]

    @classmethod
    async def spawn(
        cls,
        system: System,
        worker: Worker,
        *,
        name: str,
        layout: Layout,
        nodes: Sequence[str] | None = None,
        policy: RestartPolicy | None = None,
    ) -> WorkerGroup:
        """Starts a gang of ranks like `worker`, `name` and `name`/1 and so on, in nodes of these names or as many new
        ones; returns when all are up."""
        names = rank_names(name, layout.size)
        homes = [f"{name}-{rank}" for rank in range(layout.size)] if nodes is None else nodes
        gang = system.group(name, strategy="one_for_all", policy=policy)
        ranks = [replace(worker, rank=rank, layout=layout) for rank in range(layout.size)]
        spawning = [gang.spawn(rank, name=own, node=home) for rank, own, home in zip(ranks, names, homes, strict=True)]
        await asyncio.gather(*spawning)
        return cls(system.node, type(worker), names, layout)

    @classmethod
    def find(cls, actor: Actor, name: str, kind: type[Worker]) -> WorkerGroup:
        """The group that this system has under `name`, as seen by one of its actors: every rank that was declared."""
        node = actor._node
        if node is None:
            raise RuntimeError(f"{type(actor).__name__}: there is no group {name!r} outside a running system")
        known = itertools.takewhile(node.directory.look, (f"{name}/{rank}" for rank in itertools.count(1)))
        return cls(node, kind, [name, *known])

    def __getattr__(self, method: str) -> GroupMessage:
        if method.startswith("_"):
            raise AttributeError(method)
        spec = self._kind.messages.get(method)
        protocol = getattr(getattr(self._kind, method, None), "__dispatch__", None)
        if spec is None or protocol is None:
            known = sorted(name for name in self._kind.messages if hasattr(getattr(self._kind, name), "__dispatch__"))
            raise AttributeError(
                f"{self._kind.__name__} has no @dispatch method {method!r}; it has: {', '.join(known) or 'none'}"
            )
        bound = self.__dict__[method] = GroupMessage(self, spec, protocol)
        return bound

    async def fetch(self, batch: RemoteBatch) -> Any:
        """Brings a batch here that ranks keep, of this group or another. Raises BatchGone, ActorDied."""
        return await fetch(batch, self._ask_for, self._node.empty)

    async def release(self, batch: RemoteBatch) -> None:
        """The ranks that keep it may forget it. Raises ActorDied if one is down; then it has forgotten it anyway."""
        keys: dict[str, list[str]] = {}
        for part in batch.parts:
            keys.setdefault(part.owner, []).append(part.key)
        await asyncio.gather(*(self._node.ref(owner).forget_parts(owned) for owner, owned in keys.items()))

    def __len__(self) -> int:
        return len(self.names)

    def __repr__(self) -> str:
        return f"WorkerGroup({self.names[0]!r}, {self.layout})"

    def _beside(self) -> bool:
        """Whether a rank is in another process of this host."""
        local = self._node.transport.local
        return any(status is not None and status.node in local for status in map(self._node.directory.look, self.names))

    def _forget(self, key: str) -> None:
        """Ranks that keep their part of a call that has failed need not."""
        for name in self.names:
            with suppress(RuntimeFault):
                self._node.cast(name, "forget_parts", ([key],), {})

    def _ask_for(self, part: RemotePart) -> Coroutine[Any, Any, Any]:
        return self._node.ref(part.owner).kept_part(part.key, part.start, part.stop)


class GroupMessage:
    """One method of all ranks."""

    def __init__(self, group: WorkerGroup, spec: MessageSpec, protocol: Protocol) -> None:
        self._group = group
        self._spec = spec
        self._protocol = protocol

    def __call__(self, *args: Any, **kwargs: Any) -> asyncio.Task[Any]:
        """Begins the call, and returns its task: to await, to cancel, or both later.

        Raises ValueError at once if a batch can't be cut; the task raises what a rank raised: RankError, BadSample,
        ActorDied, DeadlineExceeded, ...
        """
        asked = Arguments(args, kwargs)
        return self._begin(asked, self._distributed(asked), self._protocol.collect)

    def keep(self, *args: Any, **kwargs: Any) -> asyncio.Task[RemoteBatch]:
        """The same, but the result stays with the ranks; the task's result is its handle."""
        if not self._protocol.cuts:
            raise TypeError(f"{self}: {self._protocol.name} collects no batch of parts, so there is none to keep")
        asked = Arguments(args, kwargs)
        key = f"{self._group._node.key}:{next(_serials)}"
        return self._begin(asked, self._distributed(asked), self._handle(key), key)

    def __repr__(self) -> str:
        return f"{self._group.names[0]}.{self._spec.name}"

    def _distributed(self, asked: Arguments) -> list[Arguments | None]:
        try:
            return self._protocol.distribute(self._group.layout, asked)
        except ValueError as error:
            raise ValueError(f"{self} ({self._protocol.name}): {error}") from None

    def _begin(
        self, asked: Arguments, calls: list[Arguments | None], collect: Collect, key: str = ANSWER
    ) -> asyncio.Task[Any]:
        return asyncio.create_task(self._ask_all(asked, calls, collect, key), name=repr(self))

    async def _ask_all(self, asked: Arguments, calls: list[Arguments | None], collect: Collect, key: str) -> Any:
        calls = await self._shared(asked) or calls
        sources = self._protocol.sources(self._group.layout)
        spared = DROP if self._protocol.cuts else ANSWER  # Copies of large answers are not even sent.
        ranks = {
            rank: asyncio.ensure_future(self._ask(rank, call, key if rank in sources else spared))
            for rank, call in enumerate(calls)
            if call is not None
        }
        try:
            await asyncio.wait(ranks.values(), return_when=asyncio.FIRST_EXCEPTION)
            failed = {r: error for r, answer in ranks.items() if answer.done() and (error := answer.exception())}
            if failed:
                # A death explains what it made the others raise.
                rank = min(failed, key=lambda r: (not isinstance(failed[r], ActorDied), r))
                raise self._blame(rank, calls[rank], failed[rank]) from failed[rank]
        except BaseException:
            await _ended(ranks.values())
            if key != ANSWER:
                self._group._forget(key)
            raise
        return await self._collected(collect, [ranks[rank].result() for rank in sources if rank in ranks], asked)

    async def _ask(self, rank: int, call: Arguments, key: str) -> Any:
        ref = self._group._refs[rank]
        far = any(isinstance(value, RemoteBatch) for value in (*call.args, *call.kwargs.values()))
        if key == ANSWER and not far:
            return await getattr(ref, self._spec.name)(*call.args, **call.kwargs)
        now = asyncio.get_running_loop().time()
        async with timeout(deadline_of_call(current_scope(), now, self._spec.deadline_s) - now):
            return await ref.run_method(self._spec.name, list(call.args), call.kwargs, key)

    async def _shared(self, asked: Arguments) -> list[Arguments | None] | None:
        """What each rank is asked, if large arrays were put where all ranks can read them: once, whoever gets them."""
        node = self._group._node
        large = [a for value in (*asked.args, *asked.kwargs.values()) for a in arrays(value) if a.nbytes >= LEND_BYTES]
        if sum(a.nbytes for a in large) <= INLINE_BYTES or not self._group._beside():
            return None
        found = await node.lending.shared(large)
        others = {id(old): new for old, new in zip(large, found, strict=True) if old is not new}
        return self._distributed(asked.map(lambda value: with_arrays(value, others))) if others else None

    async def _collected(self, collect: Collect, answers: list[Any], asked: Arguments) -> Any:
        """Large parts are joined by the thread that copies arrays, while the loop goes on."""
        node = self._group._node
        work = partial(collect, answers, asked, node.empty)
        if not self._protocol.cuts or nbytes(answers) <= INLINE_BYTES:
            return work()
        return await asyncio.get_running_loop().run_in_executor(node.lending.arena.porter, work)

    def _handle(self, key: str) -> Collect:
        def collect(answers: list[Any], asked: Arguments, empty: Empty) -> RemoteBatch:
            names = [self._group.names[rank] for rank in self._protocol.sources(self._group.layout)]
            parts = [RemotePart(own, key, 0, samples) for own, (samples, _) in zip(names, answers, strict=True)]
            whole = RemoteBatch(parts, sum(size for _, size in answers))
            return whole if len(whole) == asked.num_samples else whole.part(0, asked.num_samples)

        return collect

    def _blame(self, rank: int, call: Arguments | None, error: BaseException) -> BaseException:
        """The same error with the rank in its text, and the sample as the caller counts."""
        if len(self._group) == 1 or not isinstance(error, RuntimeFault):
            return error
        where = f"rank {rank} of {self._group.names[0]} ({self._group.names[rank]}), {self._spec.name}"
        if isinstance(error, BadSample):
            samples = call.samples if call is not None else None
            index = error.index if samples is None or error.index >= len(samples) else samples[error.index]
            return BadSample.at(index, f"{error.why} (found by {where})")
        if isinstance(error, RemoteError):
            return RankError(f"{where}: {error.args[0]}", error.remote_type, error.remote_traceback, rank)
        return type(error)(f"{where}: {error}")


async def _ended(tasks: Collection[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def rank_names(name: str, size: int) -> list[str]:
    """How the actors of a group are called."""
    return [name, *(f"{name}/{rank}" for rank in range(1, size))]
