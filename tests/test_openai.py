"""Rollout by a completions server, in a process of its own, that answers with real tokens and misbehaves on demand.

What it must give is what our engine gives: greedy tokens and their log-probabilities, whatever happens on the way.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from openai_server import Process, serving

from headrace.actors.data.running_sum import RunningSum
from headrace.actors.model import checkpoint
from headrace.actors.model.config import ModelConfig
from headrace.actors.model.qwen3_moe import Qwen3Moe
from headrace.actors.rollout import Rollout
from headrace.actors.rollout.engine import Engine
from headrace.actors.rollout.openai.backend import OpenAiBackend
from headrace.actors.rollout.openai.faults import KINDS
from headrace.actors.rollout.openai.server import Server
from headrace.actors.rollout.openai.settings import ServerSettings
from headrace.actors.rollout.requests import Request
from headrace.actors.trainer.settings import RlSettings
from headrace.actors.types import Trajectory
from headrace.runtime.exchange import Manifest, Publisher
from headrace.runtime.rundir import RunSpec

MODEL = ModelConfig(
    hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16, num_experts=4, moe_intermediate_size=32,
    initializer_range=0.3,
)  # fmt: skip
TASK = RunningSum(max_operands=3)
RL = RlSettings(group_size=2, max_new_tokens=24)
QUICK = {"backoff_s": 0.01, "silence_s": 1.5, "stall_s": 20.0, "update_s": 20.0, "connect_s": 1.0}


def weights(seed: int) -> dict[str, np.ndarray]:
    return {name: p.detach().numpy() for name, p in Qwen3Moe(MODEL, seed=seed).named_parameters()}


WEIGHTS = {version: weights(version) for version in (1, 2)}


def request(ordinal: int, *, temperature: float = 0.0, prefix: np.ndarray | None = None) -> Request:
    prompt = np.array([4 + ordinal // 40, 5 + ordinal % 40, 7, 8], np.int32)
    members = list(range(RL.group_size))
    return Request(
        key=ordinal, ordinal=ordinal, prompt=prompt, members=members, max_new_tokens=RL.max_new_tokens,
        temperature=temperature, prefixes=[] if prefix is None else [prefix] * len(members),
    )  # fmt: skip


def local(version: int, requests: list[Request]) -> dict[int, list[Trajectory]]:
    """What our engine gives for each request, by its ordinal."""
    engine = Engine(
        MODEL, WEIGHTS[version], version=version, num_slots=16, max_prompt_tokens=TASK.max_prompt_tokens,
        max_new_tokens=RL.max_new_tokens, eos_id=TASK.eos_id, seed=0,
    )  # fmt: skip
    answers = {r.ordinal: [Trajectory(member=m) for m in r.members] for r in requests}
    for asked in requests:
        engine.submit(asked)
    while engine.num_live or engine.num_waiting:
        for chunk in engine.step():
            answers[chunk.key][chunk.member].append(chunk)
    return answers


async def answer(rollout: Rollout, requests: list[Request]) -> dict[int, list[Trajectory]]:
    answers = {r.ordinal: [Trajectory(member=m) for m in r.members] for r in requests}
    async with asyncio.timeout(30), aclosing(rollout.generate(requests)) as stream:
        async for chunks in stream:
            for chunk in chunks:
                answers[chunk.key][chunk.member].append(chunk)
    assert all(t.finish for trajectories in answers.values() for t in trajectories)
    return answers


def same(mine: dict[int, list[Trajectory]], theirs: dict[int, list[Trajectory]]) -> None:
    assert mine.keys() == theirs.keys()
    for ordinal, trajectories in mine.items():
        for a, b in zip(trajectories, theirs[ordinal], strict=True):
            assert (a.tokens().tolist(), a.finish, a.refusal) == (b.tokens().tolist(), b.finish, ""), ordinal
            np.testing.assert_allclose(a.logprobs(), b.logprobs(), atol=1e-4)


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    folder = tmp_path_factory.mktemp("base")
    checkpoint.save(folder, MODEL, weights(0))
    with serving(folder, TASK.eos_id) as process:
        yield process


@pytest.fixture
def server(process: Process) -> Process:
    process.post("/behave")
    return process


@asynccontextmanager
async def worker(server: Process, tmp: Path, version: int = 1, **settings: Any) -> AsyncIterator[tuple[Rollout, Any]]:
    """A rollout worker that holds `version`, and a function that publishes further ones."""
    publisher = Publisher("policy")

    def publish(version: int) -> Manifest:
        return publisher.publish(version, WEIGHTS[version])

    rollout = Rollout(
        run=RunSpec(name="r", directory=str(tmp), seed=3), model=MODEL, task=TASK, rl=RL, chunk_tokens=4,
        engine="openai", base_url=server.url, server=ServerSettings(**{**QUICK, **settings}),
    )  # fmt: skip
    await rollout.start()
    try:
        assert await rollout.load(publish(version)) == version
        yield rollout, publish
    finally:
        await rollout.stop(None)
        publisher.close()


@pytest.mark.parametrize("dialect", ["vllm", "sglang"])
async def test_a_server_gives_what_the_engine_gives(server: Process, tmp_path: Path, dialect: str) -> None:
    requests = [request(ordinal) for ordinal in range(12)]
    expected = local(1, [request(ordinal) for ordinal in range(12)])
    async with worker(server, tmp_path, dialect=dialect) as (rollout, _):
        answers = await answer(rollout, requests)
        stats = await rollout.stats()
    same(answers, expected)
    finishes = {t.finish for trajectories in answers.values() for t in trajectories}
    assert finishes == {"stop", "length"}, "the model of this test ends in both ways"
    assert stats["tokens"] == sum(t.num_tokens for trajectories in answers.values() for t in trajectories)
    assert (stats["version"], stats["live"], stats["waiting"], stats["refused"]) == (1, 0, 0, {})
    assert all((t.versions() == 1).all() for trajectories in answers.values() for t in trajectories)
    assert server.log()["version"] == "1"


async def test_answers_go_on_after_their_prefixes(server: Process, tmp_path: Path) -> None:
    expected = local(1, [request(0)])[0][0]
    cut = request(0, prefix=expected.tokens()[:5])
    async with worker(server, tmp_path) as (rollout, _):
        (trajectories,) = (await answer(rollout, [cut])).values()
    for trajectory in trajectories:
        np.testing.assert_array_equal(trajectory.tokens(), expected.tokens()[5:])
        np.testing.assert_allclose(trajectory.logprobs(), expected.logprobs()[5:], atol=1e-4)


async def test_samples_are_of_the_models_distribution(server: Process, tmp_path: Path) -> None:
    """First tokens at temperature 1, of two members and many ordinals, against the engine's own probabilities."""
    requests = [request(0, temperature=1.0) for _ in range(60)]
    for number, asked in enumerate(requests):
        asked.ordinal = asked.key = number
        asked.max_new_tokens = 1
    async with worker(server, tmp_path, silence_s=30.0, stall_s=30.0) as (rollout, _):
        answers = await answer(rollout, requests)
    first = [(int(t.tokens()[0]), float(t.logprobs()[0])) for group in answers.values() for t in group]
    counts = np.bincount([token for token, _ in first], minlength=MODEL.vocab_size)
    probabilities = {token: np.exp(logprob) for token, logprob in first}
    assert sum(probabilities.values()) > 0.9
    for token, probability in probabilities.items():
        expected = probability * len(first)
        assert abs(counts[token] - expected) < 5 * np.sqrt(expected) + 1


PASSING = (
    "500", "502", "503", "429", "silent", "dead", "garbage", "nothing", "half an answer", "truncated", "ends",
    "dead later", "silent later", "half a JSON", "error", "abort",
)  # fmt: skip


@pytest.mark.parametrize("dialect", ["vllm", pytest.param("sglang", marks=pytest.mark.slow)])
async def test_what_passes_costs_time_and_nothing_else(server: Process, tmp_path: Path, dialect: str) -> None:
    """Every way to fail once or twice, at the beginning and in the middle: all answers come, whole and right."""
    requests = [request(ordinal) for ordinal in range(len(PASSING))]
    expected = local(1, [request(ordinal) for ordinal in range(len(PASSING))])
    async with worker(server, tmp_path, dialect=dialect) as (rollout, _):
        for asked, how in zip(requests, PASSING, strict=True):
            server.misbehave(how, times=2, after=asked.ordinal % 5, prompt=asked.prompt.tolist())
        answers = await answer(rollout, requests)
        stats = await rollout.stats()
    same(answers, expected)
    assert stats["refused"] == {}
    assert {"server_error", "busy", "silent", "unreachable", "truncated", "bad_json"} <= set(stats["retried"])
    assert stats["resumed"] >= 6


LASTING = {
    "400": "rejected", "401": "rejected", "302": "rejected", "a page": "truncated", "no object": "bad_answer",
    "no choices": "bad_answer", "two choices": "bad_answer", "no ids": "no_ids", "wrong ids": "bad_ids",
    "ids out of range": "bad_ids", "ids are texts": "bad_ids", "another prompt": "bad_ids",
    "no logprobs": "no_logprobs", "NaN": "bad_logprobs", "null logprobs": "bad_logprobs",
    "positive logprobs": "bad_logprobs", "too few logprobs": "bad_logprobs", "too many tokens": "too_many",
    "filtered": "bad_finish", "early length": "bad_finish", "early stop": "bad_finish", "after the end": "bad_finish",
    "500": "server_error", "nothing": "truncated", "half a JSON": "bad_json", "endless logprobs": "bad_logprobs",
    "an endless id": "bad_ids",
}  # fmt: skip


async def test_what_lasts_is_one_typed_refusal_and_the_others_go_on(server: Process, tmp_path: Path) -> None:
    """Each fault for one prompt, again and again; between them prompts that nothing happens to."""
    requests = [request(ordinal) for ordinal in range(2 * len(LASTING))]
    expected = local(1, [request(ordinal) for ordinal in range(2 * len(LASTING))])
    async with worker(server, tmp_path, max_tries=3) as (rollout, _):
        for asked, how in zip(requests[::2], LASTING, strict=True):
            # What may pass is no reason to give up as long as tokens come.
            server.misbehave(how, times=1000, after=0 if how in PASSING else 2, prompt=asked.prompt.tolist())
        answers = await answer(rollout, requests)
        stats = await rollout.stats()
        again = await answer(rollout, [request(1)])
    same({o: answers[o] for o in range(1, len(requests), 2)}, {o: expected[o] for o in range(1, len(requests), 2)})
    same(again, {1: expected[1]})
    for ordinal, (how, kind) in zip(range(0, len(requests), 2), LASTING.items(), strict=True):
        for mine, whole in zip(answers[ordinal], expected[ordinal], strict=True):
            assert mine.finish == "refused" and mine.refusal.startswith(f"{kind}: "), (how, mine.refusal)
            assert mine.num_tokens < whole.num_tokens
            np.testing.assert_array_equal(mine.tokens(), whole.tokens()[: mine.num_tokens], how)
            assert len(mine.refusal) < 400
    assert sum(stats["refused"].values()) == 2 * len(LASTING)
    assert set(stats["refused"]) <= set(KINDS)


async def test_a_server_that_is_always_busy_or_silent_is_waited_for_until_the_answer_stalls(
    server: Process, tmp_path: Path
) -> None:
    async with worker(server, tmp_path, stall_s=2.0, silence_s=1.0, max_tries=2) as (rollout, _):
        server.misbehave("503", times=1000, prompt=request(0).prompt.tolist())
        server.misbehave("slow", times=2, prompt=request(1).prompt.tolist())
        server.misbehave("silent", times=1000, prompt=request(2).prompt.tolist())
        answers = await answer(rollout, [request(ordinal) for ordinal in range(3)])
        stats = await rollout.stats()
    assert all(t.refusal.startswith("busy: status 503") for t in answers[0])
    assert stats["retried"]["busy"] > 2, "more than max_tries: it said nothing of the request"
    assert all(t.finish != "refused" for t in answers[1]), "slow is not stalled"
    assert all(t.refusal.startswith(("silent: ", "stalled: ")) for t in answers[2])


async def test_no_more_requests_are_open_than_allowed(server: Process, tmp_path: Path) -> None:
    before = server.log()["completions"]
    async with worker(server, tmp_path, max_requests=3) as (rollout, _):
        server.misbehave("slow", times=1000)
        asked = [request(ordinal) for ordinal in range(6)]
        stream = rollout.generate(asked)
        await anext(stream)
        stats = await rollout.stats()
        assert stats["live"] == 3 and stats["waiting"] == 9
        await stream.aclose()
        async with asyncio.timeout(10):
            while server.log()["open"]:  # noqa: ASYNC110 (nobody tells)
                await asyncio.sleep(0.01)
        stats = await rollout.stats()
    assert (stats["live"], stats["waiting"]) == (0, 0)
    assert server.log()["completions"] == before + 3, "a stream that was left asks for no more"


@pytest.mark.parametrize("dialect", [pytest.param("vllm", marks=pytest.mark.slow), "sglang"])
async def test_new_weights_interrupt_answers_which_go_on_with_them(
    server: Process, tmp_path: Path, dialect: str
) -> None:
    paused = server.log().get("while paused", 0)
    async with worker(server, tmp_path, dialect=dialect) as (rollout, publish):
        server.misbehave("slow", times=8)
        server.misbehave("silent", times=2, prompt=request(4).prompt.tolist())  # Will not say that it was aborted.
        work = asyncio.create_task(answer(rollout, [request(ordinal) for ordinal in range(5)]))
        async with asyncio.timeout(10):
            while (await rollout.stats())["tokens"] < 20:  # noqa: ASYNC110 (nobody tells)
                await asyncio.sleep(0.005)
        assert await rollout.load(publish(2)) == 2
        answers = await work
    assert server.log().get("while paused", 0) == paused, "nothing is asked of a server while its weights change"
    assert server.log()["version"] == "2"
    assert os.listdir(tmp_path / "r/weights/rollout") == ["2"], "older versions are removed"
    crossed = 0
    for ordinal, trajectories in answers.items():
        for trajectory in trajectories:
            versions, tokens = trajectory.versions(), trajectory.tokens()
            assert (np.diff(versions) >= 0).all()
            split = int((versions == 1).sum())
            crossed += 0 < split < len(tokens)
            old = local(1, [request(ordinal)])[ordinal][0].tokens()
            np.testing.assert_array_equal(tokens[:split], old[:split])
            if split < len(tokens):
                prefix = tokens[:split] if split else None
                new = local(2, [request(ordinal, prefix=prefix)])[ordinal][0]
                np.testing.assert_array_equal(tokens[split:], new.tokens())
                np.testing.assert_allclose(trajectory.logprobs()[split:], new.logprobs(), atol=1e-4)
    assert crossed >= 4


@pytest.mark.slow
async def test_a_server_that_comes_back_is_given_the_weights_before_its_next_token(tmp_path: Path) -> None:
    """kill -9; the next process of the server has other weights, and another port would be another server."""
    folder = tmp_path / "base"
    checkpoint.save(folder, MODEL, weights(0))
    expected = local(1, [request(ordinal) for ordinal in range(4)])
    with serving(folder, TASK.eos_id) as server:
        async with worker(server, tmp_path, stall_s=60.0) as (rollout, _):
            server.misbehave("slow", times=8)
            work = asyncio.create_task(answer(rollout, [request(ordinal) for ordinal in range(4)]))
            async with asyncio.timeout(10):
                while (await rollout.stats())["tokens"] < 20:  # noqa: ASYNC110 (nobody tells)
                    await asyncio.sleep(0.005)
            server.kill()
            await asyncio.to_thread(server.start, server.port)
            answers = await work
            stats = await rollout.stats()
        assert server.log()["version"] == "1"
    same(answers, expected)
    assert stats["resumed"] >= 1 and stats["retried"] and not stats["refused"]


async def test_weights_that_a_server_does_not_take_are_an_error(server: Process, tmp_path: Path) -> None:
    async with worker(server, tmp_path, dialect="sglang", stall_s=1.0) as (rollout, publish):
        server.misbehave("pause_500")  # It passes.
        server.misbehave("update_refused")
        with pytest.raises(RuntimeError, match=r"http://127.*could not be given version 2: .*no such file"):
            await rollout.load(publish(2))
        (refused,) = (await answer(rollout, [request(0)])).values()
        assert all(t.refusal.startswith("no_weights: ") for t in refused), "which weights it has is not known"
        await rollout.load(publish(2))
        same(await answer(rollout, [request(0)]), local(2, [request(0)]))


async def test_a_response_ends_at_a_stop_token_and_says_where_it_is_from(server: Process, tmp_path: Path) -> None:
    whole = local(1, [request(0)])[0][0].tokens()
    stopped = replace(request(0), stop=[whole[6:7]])
    async with worker(server, tmp_path) as (rollout, _):
        (trajectory, _) = (await answer(rollout, [stopped]))[0]
        assert trajectory.finish == "stop"
        assert trajectory.tokens().tolist() == whole[: whole.tolist().index(whole[6]) + 1].tolist()
        origin = trajectory.segments[0].origin
        assert origin is not None and origin.engine == f"openai vllm policy at {server.url}"
        assert (origin.seed, origin.sampling) == (3, stopped.sampling())
        for change, says in (
            ({"temperature": 0.5}, 'logprobs = "processed"'),
            ({"top_k": 5}, 'logprobs = "processed"'),
            ({"stop": [whole[:2]]}, "stops at single tokens"),
            ({"prompt": whole[:0]}, r"a prompt must have 1\.\."),
        ):
            with pytest.raises(ValueError, match=says):
                await answer(rollout, [replace(request(0), **change)])


def hurry(rollout: Rollout, update_s: float) -> Server:
    """Changes how long the worker's server may take for the next versions."""
    assert isinstance(rollout._backend, OpenAiBackend)
    server = rollout._backend._server
    server._settings = replace(server._settings, update_s=update_s)
    return server


async def test_a_server_that_takes_too_long_is_released(server: Process, tmp_path: Path) -> None:
    """By itself, and where the exchange gives up before."""
    async with worker(server, tmp_path, dialect="sglang") as (rollout, publish):
        assert (await rollout.seat()).load_s > QUICK["update_s"]
        hurry(rollout, 0.3)
        server.misbehave("update_silent", times=2)
        with pytest.raises(RuntimeError, match=r"could not be given version 2: .*not within 0\.3 s"):
            await rollout.load(publish(2))
        assert not server.log()["paused"]
        hurry(rollout, 20.0)
        before = server.log()["POST /update_weights_from_disk"]
        load = asyncio.create_task(rollout.load(publish(2)))
        async with asyncio.timeout(10):
            while server.log()["POST /update_weights_from_disk"] == before:  # noqa: ASYNC110 (nobody tells)
                await asyncio.sleep(0.01)
        assert server.log()["paused"]
        load.cancel()
        await asyncio.wait({load})
        assert load.cancelled() and not server.log()["paused"]
        server.post("/behave")
        await rollout.load(publish(2))
        same(await answer(rollout, [request(0)]), local(2, [request(0)]))


async def test_requests_that_do_not_end_do_not_hold_weights_up_for_ever(
    server: Process, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headrace.actors.rollout.openai.server.ABORT_S", 0.05)
    async with worker(server, tmp_path) as (rollout, publish):
        hurry(rollout, 0.3)._none_open.clear()
        with pytest.raises(RuntimeError, match="could not be given version 2"):
            await rollout.load(publish(2))


async def test_a_task_that_dies_ends_its_stream(
    server: Process, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Any:
        raise OverflowError("ours")

    async with worker(server, tmp_path) as (rollout, _):
        monkeypatch.setattr("headrace.actors.rollout.openai.server.read_event", broken)
        with pytest.raises(OverflowError, match="ours"):
            await answer(rollout, [request(0)])
        assert (await rollout.stats())["waiting"] == 0


async def test_workers_share_a_folder_and_remove_nothing_of_others(server: Process, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    kept = [shared / "0", shared / "r" / "rollout" / "0", shared / "r" / "rollout_2" / "1"]
    for folder in kept:
        folder.mkdir(parents=True)
    async with worker(server, tmp_path, weights_folder=str(shared)) as (rollout, publish):
        await rollout.load(publish(2))
        other = replace(rollout, base_url=f"{server.url}, {server.url}")
        other._name = "rollout_2"
        weights = OpenAiBackend(other)._weights
        weights.write(3, MODEL, WEIGHTS[2])
        weights.forget_older(3)
    kept.append(shared / "r" / "rollout_2" / "3")
    assert sorted(path for path in shared.glob("**/*") if path.name.isdecimal()) == sorted(
        [*kept, shared / "r" / "rollout" / "2"]
    )


async def test_a_fixed_server_keeps_its_version(server: Process, tmp_path: Path) -> None:
    async with worker(server, tmp_path, weights="fixed") as (rollout, publish):
        await rollout.load(publish(1))
        with pytest.raises(RuntimeError, match=r'keeps version 1, and version 2 was published; set .* = "update"'):
            await rollout.load(publish(2))


async def test_the_key_is_sent_and_shown_nowhere(
    server: Process, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="names HEADRACE_TEST_KEY, which is not set"):
        async with worker(server, tmp_path, key_variable="HEADRACE_TEST_KEY"):
            pass
    monkeypatch.setenv("HEADRACE_TEST_KEY", "s3cret")
    before = server.log().get("with key", 0)
    async with worker(server, tmp_path, key_variable="HEADRACE_TEST_KEY") as (rollout, _):
        server.misbehave("400", times=2, prompt=request(0).prompt.tolist())
        answers = await answer(rollout, [request(0), request(1)])
        stats = await rollout.stats()
    assert server.log()["with key"] == before + 4
    assert all("Bearer (key)" in t.refusal for t in answers[0]), "the server repeats it in its answer"
    assert "s3cret" not in repr((answers, stats, rollout))


def test_mistakes_in_the_settings_are_errors_before_anything_starts() -> None:
    def rollout(temperature: float = 1.0, **fields: Any) -> Rollout:
        rl = RlSettings(temperature=temperature)
        return Rollout(run=RunSpec(name="r"), model=MODEL, task=TASK, rl=rl, **fields)

    for url in ("", "host:8000", "ftp://host", "http://", "http://host?x=1"):
        with pytest.raises(ValueError, match="base_url must be an address such as"):
            rollout(engine="openai", base_url=url)
    with pytest.raises(ValueError, match="must not hold a password") as caught:
        rollout(engine="openai", base_url="http://me:s3cret@host")
    assert "s3cret" not in str(caught.value)
    with pytest.raises(ValueError, match=r"temperature is 0\.7; set server\.logprobs = .processed."):
        rollout(0.7, engine="openai", base_url="http://host/v1/")
    rollout(0.7, engine="openai", base_url="http://host/v1/", server=ServerSettings(logprobs="processed"))
    with pytest.raises(ValueError, match='set engine = "openai"'):
        rollout(base_url="http://host")
