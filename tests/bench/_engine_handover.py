"""Answers that one process was writing go on in another: how long nothing is written, and that the same is written.

    python -P _engine_handover.py        prints the figures as JSON

A rollout worker writes 128 responses; in the middle its stream is left, and another worker, in another process, is
asked to go on after what there is, which is near the end. Measured from leaving until the last has ended, less what a
bare engine takes for that: prefilling the same sequences, and the few tokens that they miss. One thread each.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from _engine_decode import PAGE_TOKENS, PROMPT_TOKENS
from _engine_work import EOS_ID, GROUP_SIZE, MODEL, make_work

from headrace.actors.data.running_sum import RunningSum
from headrace.actors.rollout import Rollout
from headrace.actors.rollout.engine import Engine
from headrace.actors.rollout.requests import Request
from headrace.actors.trainer.settings import RlSettings
from headrace.runtime import System
from headrace.runtime.exchange import Publisher
from headrace.runtime.ref import Ref
from headrace.runtime.rundir import RunSpec

SIZE = 128
NEW_TOKENS, CUT_TOKENS = 96, 72
TRIALS = 7

Written = dict[tuple[int, int], np.ndarray]
"""(prompt, member) -> its tokens, int32 [n]"""


def requests(prompts: list[np.ndarray], after: Written) -> list[Request]:
    """For all responses that have room, after what they have."""
    asked = []
    for number, prompt in enumerate(prompts):
        prefixes = {m: after.get((number, m), prompt[:0]) for m in range(GROUP_SIZE)}
        members = [m for m, prefix in prefixes.items() if len(prefix) < NEW_TOKENS]
        if members:
            asked.append(
                Request(
                    key=number, ordinal=number, prompt=prompt, members=members, max_new_tokens=NEW_TOKENS,
                    prefixes=[prefixes[m] for m in members] if after else [], temperature=0.0,
                )
            )  # fmt: skip
    return asked


async def write(worker: Ref, asked: list[Request], have: Written, until: int) -> float:
    """Adds to `have` until all of `asked` have `until` tokens, then leaves. Returns when it does."""
    wanted = [(request.key, member) for request in asked for member in request.members]
    stream = worker.generate.stream(asked)
    async for chunks in stream:
        for chunk in chunks:
            name = (chunk.key, chunk.member)
            have[name] = np.concatenate([have.get(name, chunk.tokens[:0]), chunk.tokens])
        if min(len(have.get(name, ())) for name in wanted) >= until:
            break
    left = time.perf_counter()
    await stream.aclose()
    return left


def bare_s(prompts: list[np.ndarray], weights: dict[str, np.ndarray], after: Written) -> float:
    """What an engine takes to end all responses."""
    engine = Engine(
        MODEL, weights, version=1, num_slots=SIZE, max_prompt_tokens=PROMPT_TOKENS, max_new_tokens=NEW_TOKENS,
        eos_id=EOS_ID, seed=0, page_tokens=PAGE_TOKENS,
    )  # fmt: skip
    begun = time.perf_counter()
    for request in requests(prompts, after):
        engine.submit(request)
    while engine.num_live or engine.num_waiting:
        engine.step()
    return time.perf_counter() - begun


async def measure(folder: Path) -> dict[str, float]:
    work, publisher, task = make_work(), Publisher("policy"), RunningSum()
    rng = np.random.default_rng(1)
    prompts = [rng.integers(2, MODEL.vocab_size, PROMPT_TOKENS).astype(np.int32) for _ in range(SIZE // GROUP_SIZE)]

    def worker() -> Rollout:
        return Rollout(
            run=RunSpec(name="bench", directory=str(folder)), model=MODEL, task=task,
            rl=RlSettings(max_new_tokens=NEW_TOKENS), num_slots=SIZE, chunk_tokens=8,
        )  # fmt: skip

    async with System(folder) as system:
        workers = [await system.spawn(worker(), name=name, node=name) for name in ("one", "other")]
        manifest = publisher.publish(1, work.weights)
        for ref in workers:
            await ref.load(manifest)
        whole: Written = {}
        await write(workers[0], requests(prompts, {}), whole, NEW_TOKENS)
        gaps, same = [], []
        for trial in range(TRIALS):
            one, other = workers[trial % 2], workers[1 - trial % 2]
            have: Written = {}
            left = await write(one, requests(prompts, {}), have, CUT_TOKENS + trial)
            cut = dict(have)
            ended = await write(other, requests(prompts, cut), have, NEW_TOKENS)
            gaps.append(ended - left - bare_s(prompts, work.weights, cut))
            same.append(np.mean([np.array_equal(have[name], whole[name]) for name in whole]))
    publisher.close()
    return {"handover_ms": 1000 * statistics.median(gaps), "handover_equal_ratio": float(np.mean(same))}


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(asyncio.run(measure(Path(folder)))))


if __name__ == "__main__":
    main()
