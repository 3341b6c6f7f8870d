"""Generates responses with the newest weights it has been given. Knows nothing of rewards, batches or training.

    generate.stream(requests) --> [Chunk, ...] as tokens come      load(manifest) --> weights swapped between two steps

The engine and torch live on the actor's own thread; the loop only hands requests in and chunks out. Leaving a stream
cancels its requests. A worker that was killed has lost nothing but the tokens since its last chunks: ask another one to
go on from them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge

from ...runtime import Actor, Lane, message
from ...runtime.exchange import Manifest, Receiver
from ...runtime.rundir import RunSpec
from ..data.task import Task
from ..model.config import ModelConfig
from ..trainer.settings import RlSettings
from .requests import Chunk, Request

if TYPE_CHECKING:
    from .engine import Engine

STEPS_PER_TURN = 16
"""Decode steps between two looks at what was asked for: each look costs the loop, which shares the core."""

TURNS_AHEAD = 2
"""Turns that the thread has been given: while the chunks of one are handed out, the next is computed. A weight swap
waits for them, some tens of milliseconds."""

WEIGHTS_S = 240.0
"""How long a request waits for the first weights: the trainer may have to repeat its last steps before it has any."""

PATIENCE_S = 300.0
"""How long a caller waits for the next chunk, or for weights to be taken."""


@dataclass(kw_only=True)
class Rollout(Actor):
    """One rollout worker: an engine with its KV cache. `start` imports torch, which takes seconds."""

    run: RunSpec
    model: ModelConfig
    task: Task
    rl: RlSettings
    num_slots: Annotated[int, Ge(1)] = 128
    """Responses that are generated at once."""
    chunk_tokens: Annotated[int, Ge(1)] = 32
    """Tokens of a response between two chunks: what a kill costs at most."""

    async def start(self) -> None:
        # A stream's queue is bounded by the tokens that its requests may ask for.
        self._streams: dict[int, asyncio.Queue[list[Chunk]]] = {}
        self._engine: Engine | None = None
        self._receiver = Receiver()
        self._submitted: list[Request] = []
        self._cancelled: list[int] = []
        self._keys = 0
        self._busy_s = 0.0
        self._busy_since = 0.0
        names = ("live", "waiting", "steps", "tokens", "prefilled_tokens", "busy_s")
        self._stats: dict[str, Any] = {"version": -1, **dict.fromkeys(names, 0)}
        self._work = asyncio.Event()
        self._armed = asyncio.Event()
        await self.in_thread(_import_torch)
        for number in range(TURNS_AHEAD):
            self.background(self._generate(), name=f"generate/{number}")

    async def stop(self, reason: BaseException | None) -> None:
        self._receiver.close()

    @message(concurrent=True, lane=Lane.CONTROL, deadline_s=PATIENCE_S)
    async def load(self, manifest: Manifest) -> int:
        """Takes the weights of a policy version; tokens requested from now on carry it. Returns the version.

        Raises StaleIncarnation, CorruptWeights if the trainer that published them is gone or has moved on.
        """
        await self.in_thread(self._load, manifest)
        self._armed.set()
        return manifest.version

    @message(concurrent=True, deadline_s=PATIENCE_S)
    async def generate(self, requests: list[Request]) -> AsyncIterator[list[Chunk]]:
        """Streams chunks of all responses until the last has finished. `key` of each request is echoed in its chunks.

        Raises ValueError for a request that can't be generated; none of `requests` has begun then. Raises TimeoutError
        if there are no weights.
        """
        try:
            async with asyncio.timeout(WEIGHTS_S):
                await self._armed.wait()
        except TimeoutError:
            raise TimeoutError(f"no weights within {WEIGHTS_S:g} s; the trainer has published none") from None
        assert self._engine is not None
        for request in requests:
            self._engine.check(request)
        theirs = {self._keys + i: request.key for i, request in enumerate(requests)}
        self._keys += len(requests)
        queue: asyncio.Queue[list[Chunk]] = asyncio.Queue()
        for key, request in zip(theirs, requests, strict=True):
            request.key = key
            self._streams[key] = queue
        self._submitted += requests
        self._work.set()
        unfinished = sum(len(request.members) for request in requests)
        try:
            while unfinished:
                chunks = await queue.get()
                unfinished -= sum(1 for chunk in chunks if chunk.finish)
                for chunk in chunks:
                    chunk.key = theirs[chunk.key]
                yield chunks
        finally:
            for key in theirs:
                del self._streams[key]
            if unfinished:
                self._cancelled += theirs
                self._work.set()

    @message(concurrent=True, lane=Lane.CONTROL)
    async def stats(self) -> dict[str, Any]:
        """version, live, waiting, steps, tokens, prefilled_tokens; busy_s: seconds in which there was work to do."""
        return self._stats

    async def _generate(self) -> None:
        """Drives the engine while there is anything to do, and hands its chunks to the streams that wait for them.

        Runs several times at once: the thread takes the turns, and the loop their chunks, in the order they were given.
        """
        while True:
            await self._work.wait()
            await self._armed.wait()
            submitted, self._submitted = self._submitted, []
            cancelled, self._cancelled = self._cancelled, []
            chunks, more = await self.in_thread(self._turn, submitted, cancelled)
            by_stream: dict[asyncio.Queue[list[Chunk]], list[Chunk]] = {}
            for chunk in chunks:
                queue = self._streams.get(chunk.key)
                if queue is not None:
                    by_stream.setdefault(queue, []).append(chunk)
            for queue, batch in by_stream.items():
                queue.put_nowait(batch)
            if more or self._submitted or self._cancelled:
                self._work.set()
            else:
                self._work.clear()

    def _turn(self, submitted: list[Request], cancelled: list[int]) -> tuple[list[Chunk], bool]:
        """On the actor's thread: some decode steps. Returns what is due, and whether there is more to do."""
        engine = self._engine
        assert engine is not None
        begun = self._busy_since or time.perf_counter()
        for request in submitted:
            engine.submit(request)
        for key in cancelled:
            engine.cancel(key)
        chunks: list[Chunk] = []
        for _ in range(STEPS_PER_TURN):
            chunks += engine.step()
            if not engine.num_live:
                break
        more = engine.num_live + engine.num_waiting > 0
        ended = time.perf_counter()
        self._busy_s += ended - begun
        self._busy_since = ended if more else 0.0
        self._stats = {
            "version": engine.version, "live": engine.num_live, "waiting": engine.num_waiting,
            "steps": engine.stats.num_steps, "tokens": engine.stats.num_generated_tokens,
            "prefilled_tokens": engine.stats.num_prefilled_tokens, "busy_s": self._busy_s,
        }  # fmt: skip
        return chunks, more

    def _load(self, manifest: Manifest) -> None:
        """On the actor's thread, hence between two turns."""
        from .engine import Engine

        tensors = self._receiver.receive(manifest)
        if self._engine is not None:
            self._engine.load(manifest.version, tensors)
            self._stats = {**self._stats, "version": manifest.version}
            return
        self._engine = Engine(
            self.model, tensors, version=manifest.version, num_slots=self.num_slots,
            max_prompt_tokens=self.task.max_prompt_tokens, max_new_tokens=self.rl.max_new_tokens,
            eos_id=self.task.eos_id, seed=self.run.seed, chunk_tokens=self.chunk_tokens,
        )  # fmt: skip


def _import_torch() -> None:
    import torch

    torch.set_num_threads(1)
