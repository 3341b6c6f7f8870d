"""Rollout by a completions server: each response is one streamed request at a time, repeated where it broke.

    waits for room --> request: prompt and what there is --> tokens --> ended: its last Chunk
          ^                                                    |
          |---- interrupted for new weights -------------------|
          '---- a passing fault: after a wait -----------------'--> a lasting one, or no progress: "refused"

A response that a server can't write to its end is refused, typed and counted; the others go on. Knows nothing of how
tokens are computed.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ....runtime.exchange import Intake, Manifest, Route, Seat
from ...philox import Stream, uniforms
from ...types import Origin
from ..requests import Chunk, Request, check_request
from .answer import Answer
from .client import Client
from .faults import WAITED_OUT, Fault
from .server import MAX_BACKOFF_S, Server
from .settings import address_of
from .weights import ServerWeights

if TYPE_CHECKING:
    from ..actor import Rollout

HandOut = Callable[[Chunk], None]


class OpenAiBackend:
    """See backend.Backend."""

    def __init__(self, worker: Rollout) -> None:
        settings = worker.server
        self._worker = worker
        self._settings = settings
        self._address = address_of(worker.base_url, worker.name)
        self._client = Client(self._address, settings)
        given, run = settings.weights_folder, worker.run
        folder = (Path(given) / run.name if given else run.path / "weights") / (worker.name or "rollout")
        self._weights = ServerWeights(self._client, settings, folder.absolute())
        self._server = Server(self._client, self._weights, settings, worker.log)
        self._intake: Intake[None] = Intake(self._write)
        self._receiving = asyncio.Lock()
        self._room = asyncio.Semaphore(settings.max_requests)
        self._num_answers = 0
        self._resumed = 0
        self._refused: Counter[str] = Counter()
        self._retried: Counter[str] = Counter()
        self._busy_s = 0.0
        self._busy_since = 0.0

    async def open(self) -> None:
        self._client.open()

    async def close(self) -> None:
        await self._server.close()
        await self._client.close()
        await self._intake.close()

    def seat(self) -> Seat:
        load_s = self._server.load_s if self._settings.weights == "update" else 0.0
        return replace(self._intake.seat(), load_s=load_s)

    async def load(self, manifest: Manifest, route: Route | None = None) -> None:
        """Raises RuntimeError if the server does not take it, or is one whose weights are fixed."""
        async with self._receiving:
            if self._settings.weights == "fixed":
                self._fix(manifest.version)
                return
            await self._intake.load(manifest, route)
            try:
                await self._server.load(manifest.version)
            except Fault as fault:
                raise RuntimeError(f"{self._address}: {fault}") from None

    def _fix(self, version: int) -> None:
        held = self._server.version
        if held not in (-1, version):
            raise RuntimeError(
                f"{self._address} keeps version {held}, and version {version} was published; set "
                '[actors.rollout.server] weights = "update" for a server that takes weights'
            )
        self._server.fix(version)

    def _write(self, version: int, tensors: Mapping[str, np.ndarray]) -> None:
        """On the weights' thread, while the server generates."""
        self._weights.write(version, self._worker.model, tensors)

    def check(self, request: Request) -> None:
        """Raises ValueError also where the server's log-probabilities would be of another temperature."""
        worker = self._worker
        check_request(
            request,
            vocab_size=worker.model.vocab_size,
            max_prompt_tokens=worker.task.max_prompt_tokens,
            max_new_tokens=worker.rl.max_new_tokens,
            eos_id=worker.task.eos_id,
        )
        whole = (request.top_k, request.top_p, request.min_p) == (0, 1.0, 0.0)
        if self._settings.logprobs == "raw" and (request.temperature not in (0.0, 1.0) or not whole):
            raise ValueError(
                f"request {request.key}: the server's log-probabilities are those of the whole distribution at "
                f"temperature 1, and it is asked to sample otherwise ({request.sampling()}); have it give those that "
                "it samples from (vLLM: --logprobs-mode processed_logprobs) and set [actors.rollout.server] logprobs = "
                '"processed"'
            )
        if request.stop and (self._settings.dialect == "llama.cpp" or max(map(len, request.stop)) > 1):
            raise ValueError(
                f"request {request.key}: a completions server stops at single tokens, and llama.cpp's only at those of "
                'its model; leave out stop, or use engine = "headrace"'
            )

    def stats(self) -> dict[str, Any]:
        """Beside those of Rollout.stats: requests, resumed answers, retries and refusals by kind."""
        counts = self._server.counts
        busy_s = self._busy_s + (time.perf_counter() - self._busy_since if self._busy_since else 0.0)
        return {
            "version": self._server.version, "live": self._server.num_open,
            "waiting": self._num_answers - self._server.num_open, "steps": counts["events"],
            "tokens": counts["tokens"], "prefilled_tokens": counts["prefilled_tokens"], "busy_s": busy_s,
            "requests": counts["requests"], "resumed": self._resumed, "retried": dict(self._retried),
            "refused": dict(self._refused),
        }  # fmt: skip

    async def generate(self, requests: list[Request]) -> AsyncGenerator[list[Chunk], None]:
        eos_id, vocab_size = self._worker.task.eos_id, self._worker.model.vocab_size
        answers = [
            Answer(request, index, eos_id=eos_id, vocab_size=vocab_size, origin=self._origin(request))
            for request in requests
            for index in range(len(request.members))
        ]
        # Bounded by the tokens that the requests may ask for.
        chunks: asyncio.Queue[Chunk | BaseException] = asyncio.Queue()

        def ended(task: asyncio.Task[None]) -> None:
            if not task.cancelled() and (error := task.exception()) is not None:
                chunks.put_nowait(error)  # Else its last chunk would be waited for for ever.

        tasks = [asyncio.create_task(self._finish(answer, chunks.put_nowait)) for answer in answers]
        for task in tasks:
            task.add_done_callback(ended)
        unfinished = len(tasks)
        self._wants(unfinished)
        try:
            while unfinished:
                some: list[Chunk] = []
                while not some or not chunks.empty():
                    chunk = await chunks.get()
                    if isinstance(chunk, BaseException):
                        raise chunk
                    some.append(chunk)
                num_ended = sum(1 for chunk in some if chunk.finish)
                unfinished -= num_ended
                self._wants(-num_ended)
                yield some
        finally:
            self._wants(-unfinished)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _origin(self, request: Request) -> Origin:
        """The seed of each request follows from these; what the server makes of it is its own."""
        engine = f"openai {self._settings.dialect} {self._settings.model} at {self._address}"
        worker, seed = self._worker.name, self._worker.run.seed
        return Origin(engine=engine, worker=worker, seed=seed, sampling=request.sampling(), precision="the server's")

    def _wants(self, more: int) -> None:
        """Counts responses that have not ended, and the time in which there are any."""
        self._num_answers += more
        now = time.perf_counter()
        if self._num_answers and not self._busy_since:
            self._busy_since = now
        elif not self._num_answers and self._busy_since:
            self._busy_s += now - self._busy_since
            self._busy_since = 0.0

    async def _finish(self, answer: Answer, hand_out: HandOut) -> None:
        """Has one response written to its end, by as many requests as that takes, or refuses it."""
        settings, begun = self._settings, answer.num_tokens
        left_s, tries, failures = settings.stall_s, 0, 0
        while True:
            had = answer.num_tokens
            self._resumed += had > begun
            fault, asked = None, 0.0
            async with self._room:
                asked = time.monotonic()
                try:
                    interrupted = not await self._ask(answer, left_s, hand_out)
                except Fault as caught:
                    fault, interrupted = caught, False
            if answer.finish and (fault is None or fault.passing):
                hand_out(answer.chunk(answer.finish))
                return
            if fault is None and not interrupted and answer.num_tokens == had:
                fault = Fault("server_error", "the server ends the response without a token or a reason")
            if answer.num_tokens > had:
                left_s, tries, failures = settings.stall_s, 0, 0
            else:
                left_s -= time.monotonic() - asked
            if fault is None:
                continue
            backoff_s = min(settings.backoff_s * 2.0**tries, MAX_BACKOFF_S)
            wait_s = max(fault.wait_s, backoff_s * random.uniform(0.5, 1.0))
            tries += 1
            failures += fault.kind not in WAITED_OUT
            left_s -= wait_s
            if not fault.passing or failures == settings.max_tries or left_s <= 0:
                self._refused[fault.kind] += 1
                hand_out(answer.chunk("refused", fault.refusal))
                return
            self._retried[fault.kind] += 1
            await asyncio.sleep(wait_s)

    async def _ask(self, answer: Answer, stall_s: float, hand_out: HandOut) -> bool:
        """One request, handing out what comes; all of it, unless the response has ended. Returns as Server.ask."""

        def progressed() -> None:
            if answer.num_held_back >= self._worker.chunk_tokens and not answer.finish:
                hand_out(answer.chunk())

        run, request = self._worker.run, answer.request
        drawn = uniforms(run.seed, Stream.SAMPLING, request.ordinal, answer.member, answer.num_tokens + 1)
        try:
            return await self._server.ask(answer, int(drawn[-1] * 2**31), stall_s, progressed)
        finally:
            if answer.num_held_back and not answer.finish:
                hand_out(answer.chunk())
