"""Oracles: generation by a full forward pass of the training model for every token, with no cache and no batch."""

from dataclasses import replace

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

from headrace.actors.model.decode import Decoder, KvCache
from headrace.actors.rollout.engine import Engine
from headrace.actors.rollout.requests import Chunk
from headrace.runtime.codec import decode, encode


@pytest.mark.parametrize("temperature", [0, 1.0, 0.7])
def test_responses_equal_full_forward_generation(temperature):
    running = engine()
    for key in range(5):
        running.submit(request(key, temperature=temperature))
    responses = collect(finish(running))
    assert len(responses) == 20
    assert_expected(responses, temperature=temperature)
    num_distinct = len({tuple(tokens) for tokens, *_ in responses.values()})
    assert num_distinct <= 5 if temperature == 0 else num_distinct > 10
    if temperature == 1:
        assert {end for *_, end in responses.values()} == {"stop", "length"}


@pytest.mark.parametrize("num_slots", [1, 3, 7, 64])
@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4], [3, 1, 4, 0, 2]])
def test_a_response_does_not_depend_on_what_it_is_batched_with(num_slots, order):
    running = engine(num_slots)
    for key in order:
        running.submit(request(key))
    assert_expected(collect(finish(running)))


def test_requests_that_come_while_others_run():
    running = engine(num_slots=5)
    chunks = []
    for key in range(6):
        running.submit(request(key))
        for _ in range(key):
            chunks += running.step()
    assert_expected(collect(finish(running, chunks)))


def test_a_prompt_is_prefilled_once_for_its_group():
    for num_slots in (2, 64):
        running = engine(num_slots)
        for key in range(12):
            running.submit(request(key, members=5))
        chunks = finish(running)
        assert running.stats.num_prefilled_tokens == sum(len(request(key).prompt) for key in range(12))
        assert running.stats.num_generated_tokens == sum(len(chunk.tokens) for chunk in chunks)
        assert running.stats.num_finished == 60


def test_members_budget_and_temperature_of_mixed_requests():
    running = engine(num_slots=64)
    running.submit(request(1, temperature=0, members=1))
    running.submit(replace(request(2), members=[3, 0]))
    running.submit(request(3, max_new_tokens=2, temperature=0.7))
    responses = collect(finish(running))
    assert responses.keys() == {(1, 0), (2, 3), (2, 0), (3, 0), (3, 1), (3, 2), (3, 3)}
    assert responses[1, 0][0] == expected(1, 0, 0)[0]
    assert responses[2, 3][0] == expected(2, 3)[0]
    assert responses[3, 2][0] == expected(3, 2, 0.7, 2)[0]


def test_chunks_come_while_a_response_grows():
    running = engine(chunk_tokens=4)
    running.submit(request(4, members=8))
    held_back = dict.fromkeys(range(8), 0)
    while running.num_live or running.num_waiting:
        chunks = running.step()
        held_back = {member: count + 1 for member, count in held_back.items()}
        for chunk in chunks:
            assert len(chunk.tokens) == held_back[chunk.member] <= 4
            held_back[chunk.member] = 0
            if chunk.finish:
                del held_back[chunk.member]
        assert max(held_back.values(), default=0) < 4


@pytest.mark.parametrize("temperature", [0, 1.0])
@pytest.mark.parametrize("num_steps", [1, 6, 13])
def test_an_interrupted_group_goes_on_in_another_engine(num_steps, temperature):
    first, second = engine(num_slots=6), engine(num_slots=3)
    keys = [1, 5, 7]
    for key in keys:
        first.submit(request(key, temperature=temperature))
    chunks = [chunk for _ in range(num_steps) for chunk in first.step()] + first.flush()
    assert first.flush() == []
    for key in keys:
        first.cancel(key)
    assert first.num_live == first.num_waiting == 0
    done = collect(chunks)
    prefixes = {}
    for key in keys:
        left = [m for m in range(4) if (key, m) not in done or not done[key, m][3]]
        prefixes |= {(key, m): done[key, m][0] if (key, m) in done else [] for m in left}
        asked = replace(request(key, temperature=temperature), members=left)
        asked.prefixes = [np.array(prefixes[key, m], np.int32) for m in left]
        if left:
            second.submit(decode(*encode(asked)))
    assert_expected(collect(finish(second)), temperature=temperature, prefixes=prefixes)
    assert_expected({k: v for k, v in done.items() if v[3]}, temperature=temperature)


def test_flushing_does_not_disturb():
    running = engine()
    for key in range(3):
        running.submit(request(key))
    chunks = []
    while running.num_live or running.num_waiting:
        chunks += running.step() + running.flush()
    assert_expected(collect(chunks))


def test_tokens_carry_the_version_that_sampled_them():
    running = engine(num_slots=4, version=7)
    running.submit(request(2, members=2))
    running.submit(request(3, members=4))
    steps_by_version = {7: 3, 8: 0, 9: 4, 10: 100}
    chunks = []
    for version, num_steps in steps_by_version.items():
        if version > 7:
            running.load(running.prepare(version, weights()))
        assert running.version == version
        for _ in range(num_steps):
            chunks += running.step()
    responses = collect(chunks)
    assert_expected(responses)  # the weights are the same under each version, so nothing else may change
    assert responses[2, 0][2][:7] == ([7] * 3 + [9] * 4 + [10] * 99)[: len(responses[2, 0][2])][:7]
    assert set(responses[3, 3][2]) <= {7, 9, 10}
    for chunk in chunks:
        assert len(chunk.tokens) or chunk.finish


def test_new_weights_go_on_over_the_old_keys_and_values():
    running = engine()
    asked = request(6, members=1, temperature=0)
    running.submit(asked)
    chunks = [chunk for _ in range(5) for chunk in running.step()]
    running.load(running.prepare(1, weights(1)))
    tokens, _, versions, _ = collect(finish(running, chunks))[6, 0]

    decoder, kv = Decoder(CONFIG, weights()), KvCache(CONFIG, num_slots=1, max_len=MAX_PROMPT + MAX_NEW)
    prompt = torch.tensor(asked.prompt.astype(np.int64))
    wanted = [int(decoder.prefill(kv, prompt, [len(prompt)], torch.tensor([0])).argmax())]
    while len(wanted) < MAX_NEW and wanted[-1] != EOS:
        if len(wanted) == 5:
            decoder.load(weights(1))
        position = torch.tensor([len(prompt) + len(wanted) - 1])
        wanted.append(int(decoder.step(kv, torch.tensor(wanted[-1:]), position).argmax()))
    assert len(wanted) > 6 and tokens == wanted
    assert versions == [0] * 5 + [1] * (len(wanted) - 5)


def test_a_prompt_that_waits_is_prefilled_with_the_weights_it_starts_with():
    running = engine(num_slots=1)
    running.submit(request(1, members=1, max_new_tokens=3, temperature=0))
    running.submit(request(2, members=1, temperature=0))
    chunks = running.step()
    running.load(running.prepare(1, weights(1)))
    responses = collect(finish(running, chunks))
    fresh = Engine(CONFIG, weights(1), version=1, num_slots=1, max_prompt_tokens=MAX_PROMPT,
                   max_new_tokens=MAX_NEW, eos_id=EOS, seed=SEED)  # fmt: skip
    fresh.submit(request(2, members=1, temperature=0))
    assert responses[2, 0][0] == collect(finish(fresh))[2, 0][0]


def test_other_seeds_ordinals_and_members_give_other_responses():
    def response(seed=SEED, ordinal=1, member=0):
        running = engine(seed=seed)
        running.submit(replace(request(9), ordinal=ordinal, members=[member], max_new_tokens=6))
        return tuple(collect(finish(running))[9, member][0])

    assert len({response(), response(seed=1), response(ordinal=2), response(ordinal=-1), response(member=1)}) == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": np.zeros(0, np.int32)}, r"1\.\.10 tokens, got 0"),
        ({"prompt": np.ones(11, np.int32)}, r"1\.\.10 tokens, got 11"),
        ({"prompt": np.array([1, 13], np.int32)}, r"token ids 1\.\.13 outside the vocabulary 0\.\.12"),
        ({"prompt": np.array([-1], np.int32)}, r"token ids -1\.\.-1 outside"),
        ({"prompt": np.array([1.5])}, "one-dimensional integer array"),
        ({"prompt": [1, 2]}, "one-dimensional integer array"),
        ({"max_new_tokens": 25}, r"1\.\.24 \(the engine's\), got 25"),
        ({"max_new_tokens": 0}, r"1\.\.24"),
        ({"temperature": -1.0}, "temperature must be 0"),
        ({"temperature": 1e-9}, "temperature must be 0"),
        ({"temperature": float("nan")}, "temperature must be 0"),
        ({"temperature": float("inf")}, "temperature must be 0"),
        ({"members": []}, "distinct indices"),
        ({"members": [0, 0, 1, 2]}, "distinct indices"),
        ({"members": [-1, 0]}, "distinct indices"),
        ({"prefixes": [np.ones(1, np.int32)]}, "one for each of 4 members, got 1"),
        ({"prefixes": [np.ones(24, np.int32)] * 4}, "member 0 has finished"),
        ({"prefixes": [np.array([3, EOS], np.int32)] * 4}, "member 0 has finished"),
        ({"prefixes": [np.array([99], np.int32)] * 4}, "the prefix of member 0 has token ids 99"),
        ({"key": 1}, "request key 1 is in use"),
    ],
)
def test_a_bad_request_is_refused_and_others_go_on(change, message):
    running = engine()
    running.submit(request(1))
    chunks = running.step()
    with pytest.raises(ValueError, match=message):
        running.submit(replace(request(2), **change))
    assert running.num_waiting == 0
    assert_expected(collect(finish(running, chunks)))


def test_a_key_is_free_again_when_its_request_has_ended():
    running = engine()
    for _ in range(3):
        running.submit(request(2))
        assert_expected(collect(finish(running)))
    running.submit(request(2))
    running.step()
    running.cancel(2)
    running.cancel(2)
    running.submit(request(2))
    assert_expected(collect(finish(running)))
    assert running.stats.num_finished == 16 and running.stats.num_cancelled == 4


def test_weights_that_are_not_finite_are_refused():
    running = engine()
    running.submit(request(1))
    chunks = running.step()
    bad = weights(1) | {"lm_head.weight": np.full_like(weights()["lm_head.weight"], np.nan)}
    with pytest.raises(FloatingPointError, match=r"policy version 1: lm_head\.weight is not finite"):
        running.load(running.prepare(1, bad))
    responses = collect(finish(running, chunks))
    assert_expected(responses)
    assert set(responses[1, 0][2]) == {0}
    with pytest.raises(FloatingPointError, match="policy version 3"):
        Engine(CONFIG, bad, version=3, num_slots=1, max_prompt_tokens=1, max_new_tokens=1, eos_id=EOS, seed=0)


def test_a_model_that_overflows_spoils_no_response():
    running = engine(num_slots=6)
    for key in (1, 4):
        running.submit(request(key))
    chunks = [chunk for _ in range(4) for chunk in running.step()]
    huge = {name: np.full_like(tensor, 1e38) for name, tensor in weights().items()}
    running.load(running.prepare(1, huge))
    for _ in range(2):
        with pytest.raises(FloatingPointError, match="policy version 1 gives log-probabilities"):
            running.step()
    running.load(running.prepare(2, weights()))
    responses = collect(finish(running, chunks))
    assert len(responses) == 8
    assert_expected(responses)
    assert {version for _, _, versions, _ in responses.values() for version in versions} == {0, 2}


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
@settings(max_examples=40, deadline=None)
def test_no_slot_or_page_leaks_and_no_response_is_disturbed(num_slots, script, memory):
    running = engine(num_slots, **memory)
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
    assert running.scheduler.num_used_pages == 0
    assert not any(unfinished.values()) and running.flush() == []
    assert_expected(collect(chunk for kept in chunks.values() for chunk in kept))


def test_chunks_and_requests_travel():
    chunk = decode(
        *encode(Chunk(key=1, member=2, version=3, tokens=np.ones(4, np.int32), logprobs=-np.ones(4, np.float32)))
    )
    assert chunk.finish == "" and chunk.tokens.tolist() == [1] * 4 and chunk.logprobs.tolist() == [-1.0] * 4
