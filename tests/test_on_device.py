"""The engine whose tokens stay on the device, without a device: the same code, buffers, buckets and delays.

Oracles: the engine that waits for every token, and generation by full forward passes (tiny_engine).
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_engine import (
    CONFIG,
    EOS,
    MAX_NEW,
    MAX_PROMPT,
    SEED,
    assert_expected,
    collect,
    engine,
    expected,
    finish,
    request,
    weights,
)

from headrace.actors.job import load_job
from headrace.actors.model.qwen3_moe import Qwen3Moe
from headrace.actors.rollout import graphs
from headrace.actors.rollout.graphs import Eager, buckets, why_no_cuda
from headrace.actors.rollout.local import LocalBackend
from headrace.actors.rollout.on_device import DeviceEngine, graph_runner
from headrace.actors.rollout.requests import Request
from headrace.actors.rollout.sampling import sample, sample_unseen
from headrace.runtime.toml import ConfigError

CLUSTER = Path(__file__).parents[1] / "cluster.toml"

NOT_THERE = 99


class Late(Eager):
    """What has been copied to the host is there when it has been waited for, and not before."""

    def __init__(self):
        super().__init__()
        self._memory, self._hidden_by, self.num_captured, self._num_marks = [], [], 0, 0

    def capture(self, run):
        self.num_captured += 1
        return super().capture(run)

    def host(self, size, dtype):
        self._memory.append(torch.full((size,), NOT_THERE, dtype=dtype))
        self._hidden_by.append(0)
        return self._memory[-1]

    def mark(self):
        self._num_marks += 1
        number, there = self._num_marks, {}
        for i, memory in enumerate(self._memory):
            if (memory != NOT_THERE).any():
                there[i] = memory.clone()
                self._hidden_by[i] = number
                memory.fill_(NOT_THERE)

        def wait():
            for i in [i for i in there if self._hidden_by[i] == number]:
                self._memory[i].copy_(there[i])
                self._hidden_by[i] = 0

        return wait


def on_device(num_slots=8, *, capture=None, page_tokens=4, kv_tokens=None, **changes):
    limits = {"num_slots": num_slots, "max_prompt_tokens": MAX_PROMPT, "max_new_tokens": MAX_NEW}
    runner = graph_runner(
        CONFIG, capture or Late(), page_tokens=page_tokens, kv_tokens=kv_tokens, dtype=torch.float32, **limits
    )
    settings = {"version": 0, "eos_id": EOS, "seed": SEED, "chunk_tokens": 5} | changes
    return DeviceEngine(CONFIG, weights(), runner=runner, **limits, **settings)


@pytest.mark.parametrize("temperature", [0, 1.0, 0.7])
@pytest.mark.parametrize("num_slots", [1, 3, 64])
def test_responses_equal_full_forward_generation(temperature, num_slots):
    running = on_device(num_slots)
    for key in range(5):
        running.submit(request(key, temperature=temperature))
    responses = collect(finish(running))
    assert len(responses) == 20
    assert_expected(responses, temperature=temperature)


def test_truncated_drawing_and_stops_are_those_of_the_other_engine():
    def responses(running):
        pair, one = np.array([3, 4], np.int32), np.array([5], np.int32)
        for key, change in enumerate(
            [{"top_k": 3}, {"top_p": 0.7}, {"min_p": 0.2, "temperature": 1.4}, {}, {"stop": [pair]},
             {"stop": [one], "top_k": 5}]
        ):  # fmt: skip
            running.submit(replace(request(key), **change))
        return collect(finish(running))

    _assert_same(responses(on_device(7)), responses(engine(7)))


def test_a_token_that_was_drawn_too_late_is_dropped_and_counted_nowhere():
    running, waiting = on_device(4), engine(4)
    for both in (running, waiting):
        for key in range(6):
            both.submit(request(key))
    ours, theirs = collect(finish(running)), collect(finish(waiting))
    assert {end for *_, end in ours.values()} == {"stop", "length"}
    _assert_same(ours, theirs)
    assert running.stats.num_generated_tokens == waiting.stats.num_generated_tokens
    assert running.stats.num_finished == 24


def test_the_host_is_one_step_behind_and_steps_are_captured_once_per_bucket():
    capture = Late()
    running = on_device(6, capture=capture, chunk_tokens=1)
    running.submit(request(4, members=6, temperature=0))
    assert running.step() == []
    assert [len(chunk.tokens) for chunk in running.step()] == [1] * 6
    finish(running)
    first = capture.num_captured
    assert 0 < first <= len(buckets(6)) * len(buckets(9))
    running.submit(request(4, members=6, temperature=0))
    finish(running)
    assert capture.num_captured == first


def test_tokens_carry_the_version_that_sampled_them():
    def responses(running):
        for key in (2, 3, 6):
            running.submit(request(key))
        chunks = [chunk for _ in range(4) for chunk in running.step()]
        running.load(running.prepare(1, weights(1)))
        return collect(finish(running, chunks))

    for tokens, _, versions, _ in responses(on_device(64)).values():
        assert versions == [0] * min(4, len(tokens)) + [1] * max(0, len(tokens) - 4)
    _assert_same(responses(on_device(64)), responses(engine(64)))


def test_weights_are_copied_over_the_old_ones_so_that_captured_steps_read_them():
    running = on_device()
    held = running._runner._weights
    addresses = [tensor.data_ptr() for tensor in (*held.layers[0], held.embed, held.head)]
    for version in (1, 2):
        running.load(running.prepare(version, weights(version % 2)))
        now = running._runner._weights
        assert [tensor.data_ptr() for tensor in (*now.layers[0], now.embed, now.head)] == addresses
    running.submit(request(1))
    assert_expected(collect(finish(running)))


def test_a_model_that_overflows_spoils_no_response():
    running = on_device(num_slots=6)
    for key in (1, 4):
        running.submit(request(key))
    chunks = [chunk for _ in range(4) for chunk in running.step()]
    running.load(running.prepare(1, {name: np.full_like(tensor, 1e38) for name, tensor in weights().items()}))
    chunks += running.step()
    for _ in range(2):
        with pytest.raises(FloatingPointError, match="policy version 1 gives log-probabilities"):
            for _ in range(2):
                chunks += running.step()
    chunks += running.step()
    running.load(running.prepare(2, weights()))
    responses = collect(finish(running, chunks))
    assert len(responses) == 8
    assert_expected(responses)
    assert {version for _, _, versions, _ in responses.values() for version in versions} == {0, 2}


def test_whoever_writes_what_gives_nan_is_refused_and_the_others_go_on():
    spoilt, running = 7, on_device(6, page_tokens=3)
    with torch.inference_mode():
        running.runner._weights.embed[spoilt] = torch.nan
    keys = [key for key in range(12) if spoilt not in request(key).prompt]
    for key in keys:
        running.submit(request(key))
    responses, refused = collect(finish(running)), 0
    assert len(responses) == 4 * len(keys)
    for (key, member), (tokens, logprobs, _, end) in responses.items():
        wanted, wanted_logprobs = expected(key, member)
        if spoilt in wanted[:-1]:
            wanted = wanted[: wanted.index(spoilt) + 1]
            assert end == "refused"
            refused += 1
        else:
            assert end == ("stop" if wanted[-1] == EOS else "length")
        assert tokens == wanted
        assert logprobs == pytest.approx(wanted_logprobs[: len(wanted)], abs=1e-4)
    assert running.stats.refused == {"nan logits": refused} and refused > 4
    assert running.num_live == 0


actions = st.one_of(
    st.tuples(st.just("submit"), st.integers(0, 9), st.integers(1, 5)),
    st.tuples(st.just("step"), st.integers(1, 9), st.none()),
    st.tuples(st.just("cancel"), st.integers(0, 9), st.none()),
    st.tuples(st.just("flush"), st.none(), st.none()),
    st.tuples(st.just("load"), st.none(), st.none()),
)


@given(
    num_slots=st.integers(1, 9),
    script=st.lists(actions, max_size=40),
    memory=st.fixed_dictionaries(
        {"page_tokens": st.sampled_from([1, 3, 16]), "kv_tokens": st.sampled_from([64, 100, None]),
         "prefill_tokens": st.sampled_from([1, 7, 512])}
    ),
)  # fmt: skip
@settings(max_examples=30, deadline=None)
def test_whatever_happens_between_two_steps_responses_are_those_of_the_engine_that_waits(num_slots, script, memory):
    """Stops, budgets, cancels, giving way and new weights at any point; assert_expected is what `engine` gives too."""
    running = on_device(num_slots, **memory)
    chunks, unfinished = {}, {}
    submitted = version = 0

    def keep(new):
        for chunk in new:
            chunks[chunk.key].append(chunk)
            unfinished[chunk.key] -= bool(chunk.finish)

    for action, number, members in script:
        if action == "submit" and not unfinished.get(number):
            running.submit(request(number, members=members))
            chunks[number] = []
            unfinished[number] = members
            submitted += members
        elif action == "step":
            for _ in range(number):
                keep(running.step())
        elif action == "cancel":
            running.cancel(number)
            if unfinished.get(number):
                chunks[number], unfinished[number] = [], 0
        elif action == "flush":
            keep(running.flush())
        elif action == "load":
            version += 1
            running.load(running.prepare(version, weights()))
        stats = running.stats
        assert 0 <= running.num_live <= num_slots
        assert submitted == running.num_live + running.num_waiting + stats.num_finished + stats.num_cancelled
    keep(finish(running))
    running.load(running.prepare(version + 1, weights()))
    keep(running.flush())
    assert running.scheduler.num_used_pages == 0
    assert not any(unfinished.values()) and running.flush() == []
    assert_expected(collect(chunk for kept in chunks.values() for chunk in kept))


@given(at=st.lists(st.integers(0, 30), max_size=4))
@settings(max_examples=15, deadline=None)
def test_other_weights_at_any_step_are_taken_where_the_engine_that_waits_takes_them(at):
    def responses(running):
        for key in range(3):
            running.submit(request(key, members=2))
        chunks, step, version = [], 0, 0
        while running.num_live or running.num_waiting:
            for _ in range(at.count(step)):
                version += 1
                running.load(running.prepare(version, weights(version % 2)))
            chunks += running.step()
            step += 1
        return collect(chunks)

    _assert_same(responses(on_device(64)), responses(engine(64)))


def test_sampling_without_a_look_gives_the_same_bits():
    random = torch.Generator().manual_seed(3)
    logits, uniforms = torch.randn(40, 50, generator=random), torch.rand(40, generator=random, dtype=torch.float64)
    ones = torch.ones(40)
    off = {"top_k": torch.zeros(40, dtype=torch.int64), "top_p": ones, "min_p": 0 * ones}
    for temperatures in (ones, torch.linspace(0, 2, 40)):
        for mine in (
            sample_unseen(logits, temperatures, uniforms),
            sample_unseen(logits, temperatures, uniforms, **off),
        ):
            assert all(map(torch.equal, mine, sample(logits, temperatures, uniforms)))


@given(st.integers(1, 3000))
@settings(max_examples=50)
def test_buckets_hold_every_size_and_waste_a_third_at_most(most):
    sizes = buckets(most)
    assert sizes == sorted(set(sizes)) and sizes[-1] == most and len(sizes) <= 2 * most.bit_length() + 1
    for size in range(1, most + 1):
        bucket = next(b for b in sizes if b >= size)
        assert bucket - size <= bucket / 3


def test_bfloat16_is_near():
    limits = {"num_slots": 4, "max_prompt_tokens": MAX_PROMPT, "max_new_tokens": MAX_NEW}
    runner = graph_runner(CONFIG, Eager(), page_tokens=4, **limits)
    running = DeviceEngine(
        CONFIG, weights(), runner=runner, version=0, eos_id=EOS, seed=SEED, **limits
    )  # fmt: skip
    running.submit(request(3, members=4, max_new_tokens=1))
    for (_, member), (tokens, logprobs, *_) in collect(finish(running)).items():
        other = engine()
        other.submit(replace(request(3, max_new_tokens=1), members=[member]))
        wanted = collect(finish(other))[3, member]
        assert tokens != wanted[0] or logprobs == pytest.approx(wanted[1], abs=0.05)


def test_where_memory_is_short_responses_give_way_and_lose_nothing():
    running = on_device(8, kv_tokens=64, page_tokens=3)
    for key in range(4):
        running.submit(request(key))
    chunks = finish(running)
    assert running.scheduler.num_preempted > 0
    assert running.stats.num_generated_tokens == sum(len(chunk.tokens) for chunk in chunks)
    assert_expected(collect(chunks))


@pytest.mark.skipif(not why_no_cuda(), reason="there is a GPU: run tests/gpu/run")
def test_without_a_gpu_the_setting_is_refused_with_the_configuration():
    with pytest.raises(
        ConfigError, match=r"rollout\] device: \"cuda\" can't be had: .*torch.*, or use device = \"cpu\""
    ):
        load_job(CLUSTER, ['actors.rollout.device="cuda"'])


@pytest.mark.parametrize("other", ["routes=true", "fixed_shapes=true", 'precision.decode="fp8"'])
def test_what_does_not_go_with_a_gpu_is_refused(other):
    with pytest.raises(ConfigError, match=r'device: "cuda" does not go with .*; leave one'):
        load_job(CLUSTER, ['actors.rollout.device="cuda"', f"actors.rollout.{other}"])


def test_a_worker_with_a_gpu_makes_this_engine(monkeypatch):
    monkeypatch.setattr(graphs, "why_no_cuda", lambda: "")
    monkeypatch.setattr(graphs, "CudaGraphs", Eager)
    worker = load_job(CLUSTER, ['actors.rollout.device="cuda"']).cluster.actors["rollout"].instance
    monkeypatch.setattr(type(worker), "name", "rollout")
    backend = LocalBackend(worker)
    tensors = {name: p.detach().numpy() for name, p in Qwen3Moe(worker.model, seed=0).named_parameters()}
    assert backend._load(3, tensors) is None
    running = backend._engine
    assert isinstance(running, DeviceEngine) and running.version == 3
    running.submit(Request(key=0, ordinal=0, prompt=np.ones(3, np.int32), members=[0, 1], max_new_tokens=4))
    chunks = finish(running)
    assert {chunk.origin.precision for chunk in chunks if chunk.origin} == {"bfloat16"}
    assert backend._load(4, tensors) is not None and running.version == 4


def _assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for key, (tokens, logprobs, versions, end) in theirs.items():
        assert (ours[key][0], ours[key][2], ours[key][3]) == (tokens, versions, end)
        assert ours[key][1] == pytest.approx(logprobs, abs=1e-5)
