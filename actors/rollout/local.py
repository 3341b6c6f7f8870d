"""The engine of this project as a backend: it and torch live on the actor's own thread.

    loop: generate --submitted, cancelled--> thread: a turn of some decode steps --chunks--> loop: the streams

The loop only hands requests in and chunks out. Knows nothing of how tokens are computed.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ...runtime.exchange import Intake, Manifest, Route, Seat
from ...runtime.exchange.intake import tree_sinks
from .precision import Schedule, Watch
from .requests import Chunk, Request

if TYPE_CHECKING:
    from .actor import Rollout
    from .engine import Engine, Prepared
    from .runner import Runner

    Weights = Prepared | Mapping[str, np.ndarray]

STEPS_PER_TURN = 16
"""Decode steps between two looks at what was asked for: each look costs the loop, which shares the core."""

DTYPES = {"cpu": "float32", "cuda": "bfloat16"}
"""What a model is computed in, where no schedule says otherwise."""

TURNS_AHEAD = 2
"""Turns that the thread has been given: while the chunks of one are handed out, the next is computed. A weight swap
waits for them, some tens of milliseconds."""


class LocalBackend:
    """See backend.Backend."""

    def __init__(self, worker: Rollout) -> None:
        self._worker = worker
        # A stream's queue is bounded by the tokens that its requests may ask for.
        self._streams: dict[int, asyncio.Queue[list[Chunk]]] = {}
        self._engine: Engine | None = None
        self._schedule = Schedule(worker.precision)
        self._watch: Watch | None = None
        self._told: list[dict[str, Any]] = []
        self._intake: Intake[Weights] = Intake(self._prepare, tree_sinks(worker))
        self._submitted: list[Request] = []
        self._cancelled: list[int] = []
        self._keys = 0
        self._busy_s = 0.0
        self._busy_since = 0.0
        names = ("live", "waiting", "steps", "tokens", "prefilled_tokens", "busy_s")
        self._stats: dict[str, Any] = {"version": -1, **dict.fromkeys(names, 0)}
        self._work = asyncio.Event()

    async def open(self) -> None:
        """Imports torch, which takes seconds."""
        await self._worker.in_thread(_import_torch)
        for number in range(TURNS_AHEAD):
            self._worker.background(self._generate(), name=f"generate/{number}")

    async def close(self) -> None:
        await self._intake.close()

    def seat(self) -> Seat:
        return self._intake.seat()

    async def load(self, manifest: Manifest, route: Route | None = None) -> None:
        weights = await self._receive(manifest, route)
        old = [await self._worker.in_thread(self._load, manifest.version, weights)]
        await asyncio.to_thread(old.clear)  # Frees it beside generation.

    async def _receive(self, manifest: Manifest, route: Route | None) -> Weights:
        """A version as `_load` takes it, received and prepared beside generation."""
        return await self._intake.load(manifest, route)

    def check(self, request: Request) -> None:
        assert self._engine is not None
        self._engine.check(request)

    async def generate(self, requests: list[Request]) -> AsyncGenerator[list[Chunk], None]:
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

    def stats(self) -> dict[str, Any]:
        return self._stats

    async def _generate(self) -> None:
        """Drives the engine while there is anything to do, and hands its chunks to the streams that wait for them.

        Runs several times at once: the thread takes the turns, and the loop their chunks, in the order they were given.
        """
        while True:
            await self._work.wait()
            submitted, self._submitted = self._submitted, []
            cancelled, self._cancelled = self._cancelled, []
            chunks, more = await self._worker.in_thread(self._turn, submitted, cancelled)
            by_stream: dict[asyncio.Queue[list[Chunk]], list[Chunk]] = {}
            for chunk in chunks:
                queue = self._streams.get(chunk.key)
                if queue is not None:
                    by_stream.setdefault(queue, []).append(chunk)
            for queue, batch in by_stream.items():
                queue.put_nowait(batch)
            told, self._told = self._told, []
            for fields in told:
                self._worker.log("precision", **fields)
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
        idle = not self._busy_since
        for _ in range(STEPS_PER_TURN):
            chunks += engine.step()
            if not engine.num_live or (idle and chunks) or self._cancelled:
                break  # Whoever waits for a first token, or has left, waits for no whole turn.
        if self._watch is not None:
            chunks += self._look(engine, self._watch, submitted, cancelled, chunks)
        more = engine.num_live + engine.num_waiting > 0
        ended = time.perf_counter()
        self._busy_s += ended - begun
        self._busy_since = ended if more else 0.0
        self._stats = {
            "version": engine.version, "live": engine.num_live, "waiting": engine.num_waiting,
            "steps": engine.stats.num_steps, "tokens": engine.stats.num_generated_tokens,
            "prefilled_tokens": engine.stats.num_prefilled_tokens, "busy_s": self._busy_s,
            "preempted": engine.scheduler.num_preempted, "kv_waste": _share_empty(*engine.kv_use()),
            "refused": dict(engine.stats.refused), **self._precision_stats(),
        }  # fmt: skip
        return chunks, more

    def _look(
        self, engine: Engine, watch: Watch, submitted: list[Request], cancelled: list[int], chunks: list[Chunk]
    ) -> list[Chunk]:
        """Shows the watch what went in and came out. If the precision changes by it, returns what is of the old one."""
        watch.begin(submitted, engine.version)
        for key in cancelled:
            watch.cancel(key)
        watch.take(chunks)
        told = watch.look(engine.version)
        if told is None:
            return []
        self._told.append(told)
        engine.now_in(self._schedule.describe())
        return engine.flush()

    def _make_runner(self) -> Runner | None:
        """What the engine computes with; None leaves it to the engine."""
        worker = self._worker
        if worker.device == "cuda":
            from .graphs import CudaGraphs
            from .on_device import graph_runner

            return graph_runner(
                worker.model, CudaGraphs(), num_slots=worker.num_slots,
                max_prompt_tokens=worker.task.max_prompt_tokens, max_new_tokens=worker.rl.max_new_tokens,
                page_tokens=worker.page_tokens, kv_tokens=worker.kv_tokens or None,
            )  # fmt: skip
        if not worker.precision.uses_fp8:
            return None
        from .room import num_pages_of
        from .scheduled import ScheduledRunner

        size = worker.page_tokens
        num_pages = num_pages_of(
            worker.num_slots, worker.task.max_prompt_tokens, worker.rl.max_new_tokens,
            page_tokens=size, kv_tokens=worker.kv_tokens,
        )  # fmt: skip
        runner = ScheduledRunner(
            worker.model, self._schedule, num_pages=num_pages, page_tokens=size, routes=worker.routes
        )
        self._watch = Watch(self._schedule, runner.read)
        return runner

    def _precision_stats(self) -> dict[str, float]:
        return {} if self._watch is None else self._schedule.stats()

    def _prepare(self, version: int, tensors: Mapping[str, np.ndarray]) -> Weights:
        """On the weights' thread: makes the second buffer. The first weights wait for their engine as they are."""
        if self._engine is None:
            return {name: tensor.copy() for name, tensor in tensors.items()}
        _import_torch()
        return self._engine.prepare(version, tensors)

    def _load(self, version: int, weights: Weights) -> Any:
        """On the actor's thread, hence between two turns. Returns the old weights."""
        from .engine import Engine, Prepared
        from .on_device import DeviceEngine

        if self._engine is not None:
            old = self._engine.load(
                weights if isinstance(weights, Prepared) else self._engine.prepare(version, weights)
            )
            self._stats = {**self._stats, "version": version}
            return old
        assert not isinstance(weights, Prepared)
        worker, runner = self._worker, self._make_runner()
        make = Engine if worker.device == "cpu" else DeviceEngine
        self._engine = make(
            worker.model, weights, version=version, num_slots=worker.num_slots,
            max_prompt_tokens=worker.task.max_prompt_tokens, max_new_tokens=worker.rl.max_new_tokens,
            eos_id=worker.task.eos_id, seed=worker.run.seed, chunk_tokens=worker.chunk_tokens, runner=runner,
            page_tokens=worker.page_tokens, kv_tokens=worker.kv_tokens or None, routes=worker.routes,
            fixed_shapes=worker.fixed_shapes, worker=worker.name, detokenize=worker.task.decode,
            precision=self._schedule.describe() if self._watch else DTYPES[worker.device],
        )  # fmt: skip
        return None


def _share_empty(held: int, room: int) -> float:
    return 1 - held / room if room else 0.0


def _import_torch() -> None:
    import torch

    torch.set_num_threads(1)
