"""What requests may ask of an engine, what becomes of those that fail, and what it does with little memory."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import special
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
    full_forward_logits,
    model,
    request,
    weights,
)

from headrace.actors.model import qwen3_moe
from headrace.actors.rollout.engine import Engine
from headrace.actors.rollout.requests import Request
from headrace.actors.rollout.sampling import truncate
from headrace.actors.rollout.single import SingleRunner
from headrace.actors.types import Group, Prompt, Trajectory
from headrace.runtime.codec import decode, encode

LONG = next(k for k in range(10) if len(expected(k, 0)[0]) > 8)


def generate(running, *requests):
    trajectories = {(r.key, m): Trajectory(member=m) for r in requests for m in r.members}
    for asked in requests:
        running.submit(asked)
    for chunk in finish(running):
        trajectories[chunk.key, chunk.member].append(chunk)
    return trajectories


# Stops --------------------------------------------------------------------------------------------------------


def text_of(tokens):
    return "".join(chr(ord("a") + t) for t in tokens)


def test_stop_sequences_and_texts_end_only_the_responses_that_have_them():
    whole = [expected(LONG, m)[0] for m in range(4)]
    pair = whole[0][4:6]
    asked = replace(request(LONG), stop=[np.array(pair, np.int32), np.array([EOS, EOS], np.int32)])
    texts = replace(request(LONG), key=50, stop_strings=[text_of(pair), "never there"])
    never = replace(request(LONG), key=51, stop_strings=["never there"], stop=[np.array([1] * 9, np.int32)])
    responses = collect(r for r in _all(engine(detokenize=text_of), asked, texts, never))
    for member, tokens in enumerate(whole):
        ends = [n for n in range(2, len(tokens) + 1) if tokens[n - 2 : n] == pair]
        cut = ends[0] if ends else len(tokens)
        for key in (LONG, 50):
            assert responses[key, member][0] == tokens[:cut]
            assert responses[key, member][3] == ("stop" if ends or tokens[-1] == EOS else "length")
        assert responses[51, member][0] == tokens
        assert responses[51, member][3] == ("stop" if tokens[-1] == EOS else "length")


def _all(running, *requests):
    for asked in requests:
        running.submit(asked)
    return finish(running)


def test_a_stop_sequence_may_begin_before_an_interruption():
    tokens = expected(LONG, 0)[0]
    asked = replace(
        request(LONG, members=1), prefixes=[np.array(tokens[:5], np.int32)], stop=[np.array(tokens[4:6], np.int32)]
    )
    trajectory = generate(engine(), asked)[LONG, 0]
    assert trajectory.tokens().tolist() == tokens[5:6] and trajectory.finish == "stop"


# Truncation ---------------------------------------------------------------------------------------------------


def test_truncation_is_that_of_transformers():
    logits_process = pytest.importorskip("transformers.generation.logits_process")
    logits = torch.tensor(np.random.default_rng(0).normal(size=(40, 30)) * 2, dtype=torch.float32)
    for k, p, least in ((5, 1.0, 0.0), (0, 0.6, 0.0), (0, 1.0, 0.1), (7, 0.8, 0.05), (1, 1.0, 0.0), (0, 1e-6, 0.0)):
        wanted = logits
        if k:
            wanted = logits_process.TopKLogitsWarper(k)(None, wanted)
        if p < 1:
            wanted = logits_process.TopPLogitsWarper(p)(None, wanted)
        if least:
            wanted = logits_process.MinPLogitsWarper(least)(None, wanted)
        given = truncate(logits, top_k=torch.full((40,), k), top_p=torch.full((40,), p), min_p=torch.full((40,), least))
        torch.testing.assert_close(given, wanted, rtol=0, atol=0)


def test_tokens_and_log_probabilities_are_of_what_truncation_leaves():
    asked = [
        replace(request(3), key=1, top_k=2),
        replace(request(3), key=2, top_p=0.5, temperature=0.7),
        replace(request(3), key=3, min_p=0.4),
        replace(request(3), key=4),
        replace(request(3), key=5, top_k=1),
    ]
    for (key, _), trajectory in generate(engine(num_slots=20), *asked).items():
        settings = asked[key - 1]
        tokens, logprobs = trajectory.tokens(), trajectory.logprobs()
        for n in range(0, len(tokens), 3):
            tempered = full_forward_logits([*settings.prompt, *tokens[:n]])[-1] / settings.temperature
            order = np.argsort(-tempered)
            probabilities = special.softmax(tempered)[order]
            kept = np.arange(len(order)) < (settings.top_k or len(order))
            kept &= np.cumsum(probabilities) - probabilities < settings.top_p
            kept &= probabilities >= settings.min_p * probabilities[0]
            left = special.log_softmax(np.where(kept, tempered[order], -np.inf))
            assert logprobs[n] == pytest.approx(left[order == tokens[n]][0], abs=1e-4)
        if key == 5:
            assert (logprobs == 0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0.0; for the likeliest token: temperature 0"),
        ({"top_p": 1.5}, "top_p must be above 0"),
        ({"top_k": -1}, "top_k must be at least 0"),
        ({"min_p": 2.0}, r"min_p must be 0\.\.1"),
        ({"stop": [np.zeros(0, np.int32)]}, "a stop sequence must have tokens"),
        ({"stop": [np.array([77], np.int32)]}, "a stop sequence has token ids 77"),
        ({"stop_strings": ["x"]}, "need an engine with a detokenizer"),
        ({"stop_strings": [""]}, "must not be empty"),
        ({"prefixes": [np.array([3, 4], np.int32)] * 4, "stop": [np.array([4], np.int32)]}, "member 0 has finished"),
    ],
)
def test_what_cannot_be_is_refused_with_the_remedy(change, message):
    with pytest.raises(ValueError, match=message):
        engine().submit(replace(request(2), **change))


# Routes -------------------------------------------------------------------------------------------------------


def routes_of_training(tokens):
    """Experts of each input token, from the training model."""
    chosen, real = [], qwen3_moe.block

    def watched(*arguments):
        x, gate, rows = real(*arguments)
        chosen.append(gate.ids_TK.numpy())
        return x, gate, rows

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(qwen3_moe, "block", watched)
        model()(torch.tensor(np.asarray(tokens, np.int64)), torch.arange(len(tokens)), [len(tokens)])
    return np.stack(chosen, 1)


@pytest.mark.parametrize("memory", [{}, {"page_tokens": 2, "kv_tokens": 40, "prefill_tokens": 3}])
def test_routes_are_those_of_the_training_model_for_every_input(memory):
    asked = [request(9), request(0), request(1), replace(request(9), key=70, members=[5])]
    running = engine(num_slots=13, routes=True, **memory)
    for (key, _), trajectory in generate(running, *asked).items():
        prompt = next(r.prompt for r in asked if r.key == key)
        routes = trajectory.routes(len(prompt))
        inputs = [*prompt, *trajectory.tokens()[:-1]]
        assert routes.dtype == np.uint8 and routes.shape == (len(inputs), CONFIG.num_layers, 2)
        np.testing.assert_array_equal(routes, routes_of_training(inputs))
    assert (running.scheduler.num_preempted > 0) == bool(memory)


def test_routes_go_on_in_another_worker_and_miss_where_one_kept_none():
    tokens = expected(LONG, 0)[0]
    asked = request(LONG, members=1)
    trajectory, kept = Trajectory(member=0), (True, False, True)
    for part, routes in enumerate(kept):
        running = engine(routes=routes, chunk_tokens=2)
        running.submit(replace(asked, prefixes=[trajectory.tokens()] if part else []))
        chunks = finish(running) if part == 2 else [c for _ in range(3) for c in running.step()] + running.flush()
        for chunk in chunks:
            trajectory.append(decode(*encode(chunk)))
    assert trajectory.tokens().tolist() == tokens
    wanted = routes_of_training([*asked.prompt, *tokens[:-1]])
    before = len(asked.prompt) - 1
    wanted[before + 3 : before + 6] = 255
    np.testing.assert_array_equal(trajectory.routes(len(asked.prompt)), wanted)


# Failures -----------------------------------------------------------------------------------------------------


class Spoiled(SingleRunner):
    """Gives NaN after one token id: to whoever writes it, and for good."""

    def run(self, batch):
        out = super().run(batch)
        lasts = batch.tokens[batch.lasts]
        out.logits[torch.from_numpy(lasts == self.spoil)] = torch.nan
        rows = np.flatnonzero(lasts == self.spoil)
        pages = batch.tables[batch.wanted[rows], batch.positions[batch.lasts][rows] // self.page_tokens]
        self._cache._by_page[:, :, pages // self._cache._per_block, :, pages % self._cache._per_block] = torch.nan
        return out


def test_logits_that_are_not_numbers_end_only_the_responses_they_are_of():
    runner = Spoiled(CONFIG, num_pages=60, page_tokens=4)
    runner.spoil = 7
    running = engine(num_slots=6, runner=runner)
    keys = range(4)
    requests = [request(key) for key in keys]
    asked = [r for r in requests if r.prompt[-1] != 7]
    trajectories = generate(running, *asked)
    refused = 0
    for (key, member), trajectory in trajectories.items():
        wanted, logprobs = expected(key, member)
        if 7 in wanted[:-1]:
            refused += 1
            cut = wanted.index(7) + 1
            assert trajectory.finish == "refused" and trajectory.refusal.startswith("nan logits: policy version 0")
            assert trajectory.tokens().tolist() == wanted[:cut]
        else:
            assert trajectory.tokens().tolist() == wanted and trajectory.finish in ("stop", "length")
            np.testing.assert_allclose(trajectory.logprobs(), logprobs, atol=1e-4)
    assert 0 < refused < len(trajectories)
    assert running.stats.refused == {"nan logits": refused}
    assert running.stats.num_finished == len(trajectories) - refused


def test_what_waits_beyond_the_bound_is_refused_and_counted():
    running = engine(num_slots=2, max_waiting=9)
    trajectories = generate(running, *(request(key, members=4) for key in range(4)))
    for key in range(4):
        for member in range(4):
            trajectory = trajectories[key, member]
            if key < 2:
                assert trajectory.tokens().tolist() == expected(key, member)[0]
            else:
                assert trajectory.finish == "refused" and "max_waiting is 9; ask again later" in trajectory.refusal
    assert running.stats.refused == {"queue full": 8}
    assert generate(running, request(3))[3, 0].tokens().tolist() == expected(3, 0)[0]


def test_a_memory_that_cannot_hold_one_response_is_refused():
    with pytest.raises(ValueError, match="raise kv_tokens to 40 or more"):
        engine(page_tokens=4, kv_tokens=36)
    with pytest.raises(ValueError, match="max_positions"):
        engine(max_new_tokens=60)


# Memory -------------------------------------------------------------------------------------------------------


def test_where_memory_is_short_the_newest_gives_way_and_no_response_changes():
    running = engine(num_slots=16, page_tokens=2, kv_tokens=40)
    for key in range(5):
        running.submit(request(key))
    chunks, room = [], 40
    while running.num_live or running.num_waiting:
        chunks += running.step()
        held, used = running.kv_use()
        assert 0 <= held <= used <= room
        assert running.num_live <= 16
    assert_expected(collect(chunks))
    assert running.scheduler.num_preempted > 0
    assert 1 <= running.scheduler.cap.limit < 16


def test_long_prompts_are_computed_in_parts_while_others_go_on():
    running = engine(num_slots=8, prefill_tokens=2, chunk_tokens=1)
    running.submit(request(0, members=2))
    chunks = running.step()
    for key in (9, 19):
        running.submit(request(key, members=2))
    written = []
    while running.num_live or running.num_waiting:
        live, new = running.num_live, running.step()
        written.append(len(new) >= live)
        chunks += new
    assert all(written), "a live response had no token in a step"
    assert_expected(collect(chunks))
    assert running.stats.num_prefilled_tokens == 1 + 10 + 10


def test_a_known_beginning_is_not_computed_again_but_under_new_weights_it_is():
    asked = [replace(request(9), key=key, ordinal=100 + key) for key in range(4)]
    running = engine(page_tokens=4)
    first = generate(running, asked[0])
    assert running.stats.num_prefilled_tokens == 10
    generate(running, asked[1])
    assert running.stats.num_prefilled_tokens == 10 + 2 and running.scheduler.num_prefix_tokens == 8
    running.load(running.prepare(1, weights(1)))
    again = generate(running, replace(asked[2], temperature=0))
    assert running.stats.num_prefilled_tokens == 12 + 10
    fresh = Engine(
        CONFIG, weights(1), version=1, num_slots=8, max_prompt_tokens=MAX_PROMPT, max_new_tokens=MAX_NEW, eos_id=EOS,
        seed=SEED,
    )  # fmt: skip
    wanted = generate(fresh, replace(asked[2], temperature=0))
    for name in wanted:
        np.testing.assert_array_equal(again[name].tokens(), wanted[name].tokens())
    assert first.keys() == {(0, m) for m in range(4)}


# Explain ------------------------------------------------------------------------------------------------------


def test_a_response_is_reproduced_from_what_is_kept_with_it():
    """Two workers, three versions, seed and sampling of their own: all that is used again comes from the group."""
    versions = {4: weights(0), 5: weights(1), 6: weights(2)}
    asked = replace(request(1, members=4), top_k=6, temperature=0.8, stop=[np.array([5, 5], np.int32)])
    group = Group(
        prompt=Prompt(ordinal=asked.ordinal, tokens=asked.prompt, answer="", size=1),
        trajectories=[Trajectory(member=m) for m in asked.members],
    )
    for worker, first in (("a", 4), ("b", 5)):
        running = engine(num_slots=7, worker=worker, fixed_shapes=True, seed=99)
        running.load(running.prepare(first, versions[first]))
        left = [t for t in group.trajectories if not t.finish]
        assert left
        running.submit(
            replace(asked, members=[t.member for t in left], prefixes=[t.tokens() for t in left] if first > 4 else [])
        )
        chunks = [c for _ in range(3) for c in running.step()] + running.flush()
        if first == 5:
            running.load(running.prepare(6, versions[6]))
            chunks += finish(running)
        for chunk in chunks:
            group.trajectories[chunk.member].append(chunk)
    kept = decode(*encode(group))
    origins = [[(s.version, s.origin.worker) for s in t.segments] for t in kept.trajectories]
    assert [(4, "a"), (5, "b"), (6, "b")] in origins
    for trajectory in kept.trajectories:
        done = np.zeros(0, np.int32)
        for segment in trajectory.segments:
            if segment.origin.afresh:
                running = made_as(segment, kept.prompt, trajectory.member, done, versions)
            running.load(running.prepare(segment.version, versions[segment.version]))
            again = [c for _ in segment.tokens for c in running.step()] + running.flush()
            np.testing.assert_array_equal(np.concatenate([c.tokens for c in again]), segment.tokens)
            assert b"".join(c.logprobs.tobytes() for c in again) == segment.logprobs.tobytes()
            done = np.concatenate([done, segment.tokens])


def made_as(segment, prompt, member, done, versions):
    """An engine that goes on as the one did that began `segment` after `done`, from the record alone."""
    origin, sampling = segment.origin, segment.origin.sampling
    settings = dict(pair.split("=") for pair in origin.engine.split()[1:])
    limits = {name: int(settings[name]) for name in ("num_slots", "page_tokens", "max_prompt_tokens", "max_new_tokens")}
    running = Engine(
        CONFIG, versions[segment.version], version=segment.version, eos_id=EOS, seed=origin.seed,
        fixed_shapes=origin.exact, **limits,
    )  # fmt: skip
    running.submit(
        Request(
            key=0, ordinal=prompt.ordinal, prompt=prompt.tokens, members=[member],
            prefixes=[done] if len(done) else [], max_new_tokens=sampling.max_new_tokens, top_k=sampling.top_k,
            temperature=sampling.temperature, top_p=sampling.top_p, min_p=sampling.min_p,
            stop=[np.array(tokens, np.int32) for tokens in sampling.stop], stop_strings=list(sampling.stop_strings),
        )
    )  # fmt: skip
    return running
