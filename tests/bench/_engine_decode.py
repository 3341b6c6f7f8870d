"""What the rollout actor adds to decoding: rates inside it over those of bare decode steps, in one process.

    python -P _engine_decode.py        prints the figures as JSON. One thread.

rate      N responses of the same length through Rollout.generate (scheduling, sampling, log-probabilities, versions,
          chunks), less what the same responses cost with a single token; against steps of Decoder over a contiguous
          cache that are fed the same tokens, and nothing else; and against passes of the engine's own runner over
          pages, each response with all of its own
waste     places for tokens in pages in use in which there is none, over all places there, summed over the steps of
          long-tailed groups
prompt    tokens of prompts that were computed, over those that there are: once for each group
swap      the longest step during which new weights came, over the median step, less one: the median of some swaps, and
          the worst of them
"""

from __future__ import annotations

import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import aclosing
from typing import Any

import numpy as np
import torch
from _engine_work import EOS_ID, GROUP_SIZE, MAX_NEW, MAX_PROMPT, MODEL, Endless, make_work

from headrace.actors.model.decode import Decoder, KvCache
from headrace.actors.rollout import Rollout
from headrace.actors.rollout.engine import Engine
from headrace.actors.rollout.local import LocalBackend
from headrace.actors.rollout.requests import Request
from headrace.actors.rollout.runner import Batch
from headrace.actors.rollout.single import SingleRunner
from headrace.actors.trainer.settings import RlSettings
from headrace.runtime.exchange import Publisher
from headrace.runtime.rundir import RunSpec

SIZES = (16, 64, 256)
PROMPT_TOKENS, NEW_TOKENS = 24, 97
ROUNDS = 5
PAGE_TOKENS = 8
"""As Rollout.page_tokens."""
SWAPS = 12


class Bench:
    def __init__(self, num_slots: int) -> None:
        self.work = make_work()
        self.publisher = Publisher("policy")
        self.directory = tempfile.TemporaryDirectory()
        task = Endless()
        assert task.max_prompt_tokens >= PROMPT_TOKENS, task.max_prompt_tokens
        self.rollout = Rollout(
            run=RunSpec(name="bench", directory=self.directory.name), model=MODEL, task=task,
            rl=RlSettings(max_new_tokens=MODEL.max_positions - task.max_prompt_tokens), num_slots=num_slots,
        )  # fmt: skip

    async def __aenter__(self) -> Bench:
        await self.rollout.start()
        await self.load(1)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.rollout.stop(None)
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()  # There is no node that would end what the actor runs.
        self.publisher.close()
        self.directory.cleanup()

    async def load(self, version: int) -> None:
        await self.rollout.load(self.publisher.publish(version, self.work.weights))

    def requests(self, size: int, max_new_tokens: int) -> list[Request]:
        rng = np.random.default_rng(size)
        return [
            Request(
                key=number, ordinal=number, prompt=rng.integers(2, MODEL.vocab_size, PROMPT_TOKENS).astype(np.int32),
                members=list(range(GROUP_SIZE)), max_new_tokens=max_new_tokens,
            )
            for number in range(size // GROUP_SIZE)
        ]  # fmt: skip

    async def answer(self, requests: list[Request]) -> tuple[float, np.ndarray]:
        """Seconds, and the sequences: int64 [responses, prompt and response]."""
        prompts = [request.prompt for request in requests]
        responses: dict[tuple[int, int], list[np.ndarray]] = {}
        begun = time.perf_counter()
        async with aclosing(self.rollout.generate(requests)) as stream:
            async for chunks in stream:
                for chunk in chunks:
                    responses.setdefault((chunk.key, chunk.member), []).append(chunk.tokens)
        seconds = time.perf_counter() - begun
        rows = [np.concatenate([prompts[key], *parts]) for (key, _), parts in sorted(responses.items())]
        assert len({len(row) for row in rows}) == 1, "a response has ended early"
        return seconds, np.stack(rows).astype(np.int64)


def raw_steps(work_weights: dict[str, np.ndarray], rows: np.ndarray) -> Callable[[], float]:
    """Seconds that the decoder takes for all steps but the first, fed with `rows`."""
    size, width = rows.shape
    cache = KvCache(MODEL, num_slots=size, max_len=width)
    decoder = Decoder(MODEL, work_weights)
    prompts = torch.from_numpy(rows[:, :PROMPT_TOKENS].reshape(-1))

    def run() -> float:
        decoder.prefill(cache, prompts, [PROMPT_TOKENS] * size, torch.arange(size))
        columns = [torch.from_numpy(rows[:, at].copy()) for at in range(PROMPT_TOKENS, width - 1)]
        begun = time.perf_counter()
        for at, tokens in enumerate(columns, PROMPT_TOKENS):
            decoder.step(cache, tokens, torch.full((size,), at))
        return time.perf_counter() - begun

    return run


def paged_steps(weights: dict[str, np.ndarray], rows: np.ndarray) -> Callable[[], float]:
    """The same by the engine's runner, with batches that are there already."""
    size, width = rows.shape
    per_row = -(-width // PAGE_TOKENS)
    runner = SingleRunner(MODEL, num_pages=size * per_row, page_tokens=PAGE_TOKENS)
    runner.load(runner.prepare(weights))
    tables = np.arange(size * per_row, dtype=np.int32).reshape(size, per_row)
    everyone, ones = np.arange(size), np.ones(size, np.int64)

    def batch(first: int, end: int) -> Batch:
        count = end - first
        return Batch(
            tokens=rows[:, first:end].reshape(-1).copy(), positions=np.tile(np.arange(first, end), size),
            counts=ones * count, tables=tables, num_decode=size if count == 1 else 0, wanted=everyone,
        )  # fmt: skip

    def run() -> float:
        runner.run(batch(0, PROMPT_TOKENS))
        batches = [batch(at, at + 1) for at in range(PROMPT_TOKENS, width - 1)]
        begun = time.perf_counter()
        for one in batches:
            runner.run(one)
        return time.perf_counter() - begun

    return run


async def decode_ratio(size: int) -> dict[str, float]:
    async with Bench(size) as bench:
        _, rows = await bench.answer(bench.requests(size, NEW_TOKENS))
        steps = raw_steps(bench.work.weights, rows)
        pages = paged_steps(bench.work.weights, rows)
        steps()
        pages()
        raw, paged, whole, first = [], [], [], []
        for _ in range(ROUNDS):
            raw.append(await asyncio.to_thread(steps))
            paged.append(await asyncio.to_thread(pages))
            whole.append((await bench.answer(bench.requests(size, NEW_TOKENS)))[0])
            first.append((await bench.answer(bench.requests(size, 1)))[0])
    inside_s = statistics.median(whole) - statistics.median(first)
    raw_s = statistics.median(raw)
    return {
        f"decode_{size}_per_s": size * (NEW_TOKENS - 1) / inside_s,
        f"raw_decode_{size}_per_s": size * (NEW_TOKENS - 1) / raw_s,
        f"decode_{size}_ratio": raw_s / inside_s,
        f"decode_{size}_over_pages_ratio": statistics.median(paged) / inside_s,
    }


async def prompt_ratio() -> float:
    async with Bench(64) as bench:
        requests = bench.requests(128, 8)
        prompts = sum(len(request.prompt) for request in requests)
        await bench.answer(requests)
        return float((await bench.rollout.stats())["prefilled_tokens"] / prompts)


def kv_waste() -> float:
    work = make_work()
    engine = Engine(
        MODEL, work.weights, version=1, num_slots=128, max_prompt_tokens=MAX_PROMPT, max_new_tokens=MAX_NEW,
        eos_id=EOS_ID, seed=0, page_tokens=PAGE_TOKENS,
    )  # fmt: skip
    for number, prompt in enumerate(work.prompts):
        engine.submit(
            Request(
                key=number, ordinal=number, prompt=prompt, members=list(range(GROUP_SIZE)), temperature=0.0,
                max_new_tokens=int(work.lengths[number * GROUP_SIZE]),
            )
        )  # fmt: skip
    held = room = 0
    while engine.num_live or engine.num_waiting:
        engine.step()
        tokens, places = engine.kv_use()
        held, room = held + tokens, room + places
    return 1 - held / room


async def swap_delay() -> dict[str, float]:
    """Step times as the thread sees them, while weights arrive as they do in a run."""
    async with Bench(64) as bench:
        ends = _record_steps(bench.rollout)
        work = asyncio.create_task(bench.answer(bench.requests(64, 8 * NEW_TOKENS // 2)))
        swapped: list[tuple[float, float]] = []
        for version in range(2, 2 + SWAPS):
            await asyncio.sleep(0.1)
            begun = time.perf_counter()
            await bench.load(version)
            swapped.append((begun, time.perf_counter()))
        await work
    steps = np.diff(ends)
    median = float(np.median(steps))
    during = [float(steps[_between(ends, *span)].max()) for span in swapped if _between(ends, *span).any()]
    return {
        "swap_delay_ratio": statistics.median(during) / median - 1,
        "swap_delay_worst_ratio": max(during) / median - 1,
    }


def _between(ends: list[float], begun: float, ended: float) -> np.ndarray:
    """Which steps overlap with a span of time: bool [steps]."""
    times = np.array(ends)
    return (times[1:] >= begun) & (times[:-1] <= ended)


def _record_steps(rollout: Rollout) -> list[float]:
    """When each step of its engine ends, from now on."""
    backend: Any = rollout._backend
    assert isinstance(backend, LocalBackend) and backend._engine is not None
    engine: Any = backend._engine
    step, ends = engine.step, []

    def timed() -> Any:
        chunks = step()
        ends.append(time.perf_counter())
        return chunks

    engine.step = timed
    return ends


async def main() -> None:
    torch.set_num_threads(1)
    figures: dict[str, float] = {}
    for size in SIZES:
        figures |= await decode_ratio(size)
    figures["kv_waste_ratio"] = kv_waste()
    figures["prompt_computed_ratio"] = await prompt_ratio()
    figures |= await swap_delay()
    print(json.dumps(figures))


if __name__ == "__main__":
    asyncio.run(main())
