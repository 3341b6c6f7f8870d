"""Rollout by a server that others wrote: llama.cpp's, over HTTP, on weights that the test writes for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path

import numpy as np
import pytest
import torch
from test_openai import MODEL, RL, TASK, WEIGHTS, answer, local, request

from headrace.actors.model.qwen3_moe import Qwen3Moe
from headrace.actors.rollout import Rollout
from headrace.actors.rollout.openai.settings import ServerSettings
from headrace.runtime.exchange import Publisher
from headrace.runtime.rundir import RunSpec

pytest.importorskip("xllamacpp", reason="llama.cpp is packaged for Linux alone")
pytest.importorskip("gguf")

import llama_server


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    path = tmp_path_factory.mktemp("llama") / "tiny.gguf"
    llama_server.write_gguf(path, MODEL, WEIGHTS[1], TASK.eos_id)
    with llama_server.serving(path) as url:
        yield url


def scores(prompt: np.ndarray, response: np.ndarray) -> np.ndarray:
    """Log-probabilities of the tokens of `response`, by the trainer's model."""
    model = Qwen3Moe(MODEL, seed=1)
    tokens = torch.from_numpy(np.concatenate([prompt, response]).astype(np.int64))
    with torch.no_grad():
        hidden = model(tokens, torch.arange(len(tokens)), [len(tokens)]).hidden
        logprobs = torch.log_softmax(model.logits(hidden), -1)
    rows = np.arange(len(prompt) - 1, len(tokens) - 1)
    return np.asarray(logprobs[rows, tokens[rows + 1]])


async def test_llama_cpp_gives_what_the_engine_gives(url: str, tmp_path: Path) -> None:
    """Greedy tokens equal, log-probabilities of greedy and sampled ones as ours; more answers than it has slots."""
    rollout = Rollout(
        run=RunSpec(name="r", directory=str(tmp_path)), model=MODEL, task=TASK, rl=RL, chunk_tokens=4,
        engine="openai", base_url=f"{url}/v1", server=ServerSettings(dialect="llama.cpp", weights="fixed"),
    )  # fmt: skip
    publisher = Publisher("policy")
    await rollout.start()
    try:
        await rollout.load(publisher.publish(1, WEIGHTS[1]))
        greedy = await answer(rollout, [request(ordinal) for ordinal in range(10)])
        sampled = await answer(rollout, [request(ordinal, temperature=1.0) for ordinal in range(10, 14)])
        stream = rollout.generate([request(20)])
        async with aclosing(stream):
            await anext(stream)
        resumed = await answer(rollout, [request(0, prefix=greedy[0][0].tokens()[:5])])
        stats = await rollout.stats()
    finally:
        await rollout.stop(None)
        publisher.close()
    worst = 0.0
    for ordinal, ours in local(1, [request(ordinal) for ordinal in range(10)]).items():
        for mine, theirs in zip(ours, greedy[ordinal], strict=True):
            assert (mine.tokens().tolist(), mine.finish) == (theirs.tokens().tolist(), theirs.finish)
            worst = max(worst, float(np.abs(mine.logprobs() - theirs.logprobs()).max()))
    assert worst < 1e-4, worst
    assert {t.finish for group in greedy.values() for t in group} == {"stop", "length"}
    np.testing.assert_array_equal(resumed[0][0].tokens(), greedy[0][0].tokens()[5:])
    for ordinal, trajectories in sampled.items():
        for trajectory in trajectories:
            expected = scores(request(ordinal).prompt, trajectory.tokens())
            np.testing.assert_allclose(trajectory.logprobs(), expected, atol=1e-4)
    different = {tuple(t.tokens().tolist()) for group in sampled.values() for t in group}
    assert len(different) == 8, "members of a group are sampled apart"
    assert stats["refused"] == {}
