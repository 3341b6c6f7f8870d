"""What is read of a server's answers: three dialects to the same tokens, and nothing but Faults for anything else."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_job import CLUSTER

from headrace.actors.job import load_job
from headrace.actors.rollout import Rollout
from headrace.actors.rollout.openai.answer import Answer
from headrace.actors.rollout.openai.faults import KINDS, Fault
from headrace.actors.rollout.openai.protocol import Event, completion_body, read_event
from headrace.actors.rollout.openai.settings import address_of, addresses
from headrace.actors.rollout.requests import Request
from headrace.actors.types import Sampling
from headrace.runtime.toml import ConfigError

VOCAB, EOS = 50, 2
PROMPT = [5, 6, 7]


def vllm(tokens: list[int], logprobs: list[float], finish: str | None = None) -> dict[str, Any]:
    named = {"tokens": [f"token_id:{t}" for t in tokens], "token_logprobs": logprobs, "top_logprobs": []}
    return {"index": 0, "text": "x", "logprobs": named, "token_ids": tokens, "finish_reason": finish}


def sglang(tokens: list[int], logprobs: list[float], finish: str | None = None) -> dict[str, Any]:
    named = {"tokens": ["x"] * len(tokens), "token_logprobs": logprobs}
    return {"index": 0, "text": "x", "logprobs": named, "token_ids": tokens, "finish_reason": finish}


def llama(tokens: list[int], logprobs: list[float], finish: str | None = None) -> dict[str, Any]:
    content = [{"id": t, "token": "x", "logprob": p} for t, p in zip(tokens, logprobs, strict=True)]
    return {"index": 0, "text": "x", "logprobs": {"content": content}, "finish_reason": finish}


def read(*choices: Any, **more: Any) -> Event:
    return read_event(json.dumps({"choices": choices, **more}).encode(), PROMPT, VOCAB)


@given(
    st.lists(st.tuples(st.integers(0, VOCAB - 1), st.floats(-100, 0)), min_size=1, max_size=5),
    st.sampled_from([None, "stop", "length", "abort"]),
)
def test_three_dialects_say_the_same(items: list[tuple[int, float]], finish: str | None) -> None:
    tokens, logprobs = [t for t, _ in items], [p for _, p in items]
    for dialect in (vllm, sglang, llama):
        assert read(dialect(tokens, logprobs, finish)) == Event(tokens, logprobs, finish or "")


LEAF = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3)
JSON = LEAF | st.lists(LEAF, max_size=3) | st.dictionaries(st.text(max_size=3), LEAF, max_size=2)
FIELDS = ("index", "text", "logprobs", "token_ids", "finish_reason", "prompt_token_ids")
INNER = ("tokens", "token_logprobs", "content")


@given(st.sampled_from([vllm, sglang, llama]), st.sampled_from((*FIELDS, *INNER, "choices", "")), JSON)
def test_what_is_wrong_is_a_fault_and_what_is_read_is_sound(dialect: Any, field: str, value: Any) -> None:
    """One field of a good answer becomes anything."""
    choice = dialect([3, 4], [-1.0, -2.0])
    message: Any = {"choices": [choice]}
    if field in FIELDS:
        choice[field] = value
    elif field in INNER:
        choice["logprobs"][field] = value
    elif field:
        message[field] = value
    else:
        message = value
    try:
        event = read_event(json.dumps(message).encode(), PROMPT, VOCAB)
    except Fault as fault:
        assert fault.kind in KINDS and len(str(fault)) < 600
    else:
        assert len(event.tokens) == len(event.logprobs)
        assert all(type(token) is int and 0 <= token < VOCAB for token in event.tokens)
        assert all(np.isfinite(logprob) and logprob <= 0 for logprob in event.logprobs)
        assert event.finish in ("", "stop", "length", "abort")


@given(st.binary(max_size=40))
def test_bytes_are_an_event_or_a_fault(data: bytes) -> None:
    try:
        read_event(data, PROMPT, VOCAB)
    except Fault as fault:
        assert fault.kind in KINDS


@given(st.lists(st.tuples(st.lists(st.integers(0, 6), max_size=3), st.sampled_from(["", "stop", "length", "abort"]))))
def test_an_answer_is_a_valid_response_whatever_comes(events: list[tuple[list[int], str]]) -> None:
    """Within its budget, ended by its end-of-sequence token or by its length, and by nothing after it."""
    request = Request(key=1, ordinal=1, prompt=np.array(PROMPT), members=[4], max_new_tokens=6)
    answer = Answer(request, 0, eos_id=EOS, vocab_size=VOCAB)
    written: list[int] = []
    for tokens, finish in events:
        try:
            answer.take(Event(tokens, [-0.5] * len(tokens), finish))
        except Fault as fault:
            assert fault.kind in ("too_many", "bad_finish")
        written += answer.chunk().tokens.tolist()
    assert answer.sequence == PROMPT + written
    assert len(written) <= 6 and EOS not in written[:-1]
    expected = "stop" if written[-1:] == [EOS] else "length" if len(written) == 6 else ""
    assert answer.finish == expected


@pytest.mark.parametrize("dialect", ["vllm", "sglang", "llama.cpp"])
def test_requests_sample_from_the_whole_distribution(dialect: Any) -> None:
    body = completion_body(dialect, "m", PROMPT, max_tokens=9, sampling=Sampling(), ends=(EOS, 9), seed=4)
    assert (body["prompt"], body["max_tokens"], body["temperature"], body["seed"]) == (PROMPT, 9, 1.0, 4)
    assert (body["top_p"], body["min_p"], body["stream"]) == (1.0, 0.0, True)
    assert body["top_k"] == (0 if dialect == "llama.cpp" else -1)
    assert body["logprobs"] is not None
    assert dialect == "llama.cpp" or body["stop_token_ids"] == [EOS, 9]


def test_the_address_of_a_server() -> None:
    for given_url in ("http://h:8", "http://h:8/", "http://h:8/v1", "http://h:8/v1/"):
        assert addresses(given_url) == ["http://h:8"]
    assert addresses("https://h/proxy/v1, http://g:8") == ["https://h/proxy", "http://g:8"]
    assert address_of("http://h, http://g", "rollout") == "http://h"
    assert address_of("http://h, http://g", "rollout_2") == "http://g"
    with pytest.raises(ValueError, match="names 1 server, and rollout_2 is worker number 2; give each worker its own"):
        address_of("http://h", "rollout_2")


def test_a_cluster_file_names_a_server() -> None:
    sets = [
        "actors.rollout.engine=openai", "actors.rollout.base_url=http://h:8/v1", "actors.rollout.server.dialect=sglang",
        "actors.rollout.server.max_requests=64",
    ]  # fmt: skip
    rollout = load_job(CLUSTER, sets).cluster.actors["rollout"].instance
    assert isinstance(rollout, Rollout)
    assert (rollout.engine, rollout.server.dialect, rollout.server.max_requests) == ("openai", "sglang", 64)
    for wrong, says in (
        ("actors.rollout.base_url=h:8", r"\[actors\.rollout\] base_url: must be an address such as"),
        ("actors.rollout.server.dialect=tgi", r"actors\.rollout\.server\.dialect"),
        ("actors.rollout.server.max_request=3", r"max_request"),
        ("actors.rollout.count=2", r"base_url: names 1 server, and rollout_2 is worker number 2"),
        ("rl.temperature=0.7", r"temperature is 0\.7; set server\.logprobs"),
    ):
        with pytest.raises(ConfigError, match=says):
            load_job(CLUSTER, [*sets, wrong])
