"""Generates responses with the newest weights it has been given. Knows nothing of rewards, batches or training.

    generate.stream(requests) --> [Chunk, ...] as tokens come      load(manifest) --> weights swapped between two steps

What generates is a backend: the engine of this project on the actor's own thread (local.py), or a server of others that
speaks OpenAI's completions (openai/). Leaving a stream cancels its requests. A worker that was killed has lost nothing
but the tokens since its last chunks: ask another one to go on from them.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import numpy as np
from annotated_types import Ge

from ...runtime import Lane, message
from ...runtime.exchange import Manifest, Route, Seat
from ...runtime.rundir import RunSpec
from ...runtime.worker import Worker
from ..data.task import Task
from ..model.config import ModelConfig
from ..trainer.settings import RlSettings
from .backend import Backend
from .openai.settings import ServerSettings, addresses
from .parallel.mesh import Mesh
from .precision import Precision
from .requests import Chunk, Request

WEIGHTS_S = 240.0
"""How long a request waits for the first weights: the trainer may have to repeat its last steps before it has any."""

PATIENCE_S = 300.0
"""How long a caller waits for the next chunk, or for weights to be taken."""


@dataclass(kw_only=True)
class Rollout(Worker):
    """One rollout worker: an engine with its KV cache. `start` imports torch, which takes seconds.

    With `ranks` = tp * ep * sp in its table the model is divided over so many processes (parallel/): the first of them
    is asked, the others follow it. Raises ValueError if the model can't be divided so.
    """

    run: RunSpec
    model: ModelConfig
    task: Task
    rl: RlSettings
    num_slots: Annotated[int, Ge(1)] = 128
    """Responses that are generated at once."""
    chunk_tokens: Annotated[int, Ge(1)] = 32
    """Tokens of a response between two chunks: what a kill costs at most."""
    page_tokens: Annotated[int, Ge(1)] = 4
    """Tokens whose keys and values are given room together. Half a page of each response is empty; for contexts of
    thousands of tokens 16 makes shorter tables."""
    kv_tokens: Annotated[int, Ge(0)] = 0
    """Room for keys and values of so many tokens; 0: for all slots at their longest. Less has responses wait."""
    routes: bool = False
    """Whether each token comes with the experts that it chose, for routing replay."""
    fixed_shapes: bool = False
    """Whether a response is the same to the last bit whatever it is batched with, which costs time."""
    precision: Precision = field(default_factory=Precision)
    """Which phases compute in FP8, and when they are to fall back; of our own engine."""
    tp: Annotated[int, Ge(1)] = 1
    """Ranks that share the heads of attention, and the inner width of each expert."""
    ep: Annotated[int, Ge(1)] = 1
    """Ranks that share the experts; which has which follows their load."""
    sp: Annotated[int, Ge(1)] = 1
    """Ranks that share the tokens of a step, if there are many: of long prompts."""
    spare_experts: Annotated[int, Ge(0)] = 0
    """Replicas of busy experts that a rank has room for, in each layer."""
    device: Literal["cpu", "cuda"] = "cpu"
    """"cuda": weights, keys and values in bfloat16 on a GPU of compute capability 9.0 or more; decode steps are CUDA
    graphs, and tokens come to the host one step late."""
    engine: Literal["headrace", "openai"] = "headrace"
    """"openai": a server at `base_url` generates, as `server` says."""
    base_url: str = ""
    """Of the server, such as http://127.0.0.1:8000; for several workers one for each, separated by commas."""
    server: ServerSettings = field(default_factory=ServerSettings)

    live = ("rl.temperature",)

    def __post_init__(self) -> None:
        if self.engine == "openai":
            addresses(self.base_url)
            if self.server.logprobs == "raw" and self.rl.temperature != 1.0:
                raise ValueError(
                    f"the server's log-probabilities are those of temperature 1, and [rl] temperature is "
                    f'{self.rl.temperature}; set server.logprobs = "processed" if it gives those that it samples from'
                )
            if self.precision.uses_fp8:
                raise ValueError("precision is of our own engine; leave it out, a server has its own settings for that")
        elif self.base_url:
            raise ValueError('base_url is of a server; set engine = "openai", or leave it out')
        if self.device == "cuda":
            self._check_cuda()
        self.mesh.check(self.model)
        if self.mesh.size > 1 and self.engine != "headrace":
            raise ValueError("tp, ep and sp divide our own engine over ranks; a server has its own settings for that")
        if self.mesh.size > 1 and self.precision.uses_fp8:
            raise ValueError('precision must be "full" on several ranks; leave it out, or set tp, ep and sp to 1')
        if self.precision.uses_fp8 and self.fixed_shapes:
            raise ValueError("fixed_shapes are of full precision; leave them out, or set precision to full")
        if self.mesh.size > 1 and self.fixed_shapes:
            raise ValueError("fixed_shapes are of a worker of one rank; leave them out, or set tp, ep and sp to 1")

    def _check_cuda(self) -> None:
        others = {
            'engine = "openai"': self.engine == "openai", "precision": self.precision.uses_fp8,
            "tp, ep and sp": self.mesh.size > 1, "routes": self.routes, "fixed_shapes": self.fixed_shapes,
        }  # fmt: skip
        for name, asked in others.items():
            if asked:
                raise ValueError(f'device "cuda" does not go with {name}; leave one of them out')

    @property
    def mesh(self) -> Mesh:
        """How the ranks share the work."""
        return Mesh(tp=self.tp, ep=self.ep, sp=self.sp, spare_experts=self.spare_experts)

    async def start(self) -> None:
        if self.layout.size != self.mesh.size:
            raise ValueError(
                f"ranks must be tp * ep * sp = {self.tp} * {self.ep} * {self.sp}, got {self.layout.size}; "
                f"set ranks = {self.mesh.size}"
            )
        self._armed = asyncio.Event()
        if self.rank:
            self._armed.set()  # Whoever asks it is told whom to ask.
        self._backend = self._make_backend()
        await self._backend.open()

    async def stop(self, reason: BaseException | None) -> None:
        await self._backend.close()

    def _make_backend(self) -> Backend:
        if self.engine == "openai":
            from .openai.backend import OpenAiBackend

            return OpenAiBackend(self)
        if self.mesh.size > 1:
            from .parallel.backend import FollowerBackend, RanksBackend

            return RanksBackend(self) if self.rank == 0 else FollowerBackend(self)
        from .local import LocalBackend

        return LocalBackend(self)

    @message(concurrent=True, lane=Lane.CONTROL, deadline_s=PATIENCE_S)
    async def seat(self) -> Seat:
        """Where this worker sits, for the weight exchange; see coordinator.Port."""
        return self._backend.seat()

    @message(concurrent=True, lane=Lane.CONTROL, deadline_s=PATIENCE_S)
    async def load(self, manifest: Manifest, route: Route | None = None) -> int:
        """Takes the weights of a policy version; tokens requested from now on carry it. Returns the version.

        `route`: how they come; by default through the memory of this host. Raises StaleIncarnation, CorruptWeights if
        the trainer that published them is gone or has moved on, BadWeights for an older version than the last.
        """
        await self._backend.load(manifest, route)
        self._armed.set()
        return manifest.version

    @message(concurrent=True, lane=Lane.CONTROL, deadline_s=PATIENCE_S)
    async def take_part(self, manifest: Manifest, ticket: int, experts: np.ndarray) -> None:
        """For all ranks but the first, which asks: prepares this rank's part of a version's weights.

        `experts`: int64 [layers, slots], those in the slots of all ranks. Raises as `load`, and ValueError at a rank
        that follows none.
        """
        from .parallel.backend import FollowerBackend

        if not isinstance(self._backend, FollowerBackend):
            raise ValueError(f"{self.name} follows no other rank; have it load the whole version")
        await self._backend.take_part(manifest, ticket, experts)

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
        for request in requests:
            self._backend.check(request)
        async with aclosing(self._backend.generate(requests)) as chunks:
            async for some in chunks:
                yield some

    @message(concurrent=True, lane=Lane.CONTROL)
    async def stats(self) -> dict[str, Any]:
        """version, live, waiting, steps, tokens, prefilled_tokens; busy_s: seconds in which there was work to do; on
        several ranks moved_experts."""
        return self._backend.stats()
