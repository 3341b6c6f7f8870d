"""Completions with token ids, as three servers speak them: what is asked, and what an answer's events say.

    vLLM       return_token_ids -> choice.token_ids, logprobs.tokens "token_id:7", logprobs.token_logprobs
    SGLang     return_token_ids -> choice.token_ids, logprobs.token_logprobs
    llama.cpp                      logprobs.content: [{id, logprob}, ...]

Whatever form comes is read; where ids come twice they must agree. Pure functions: nothing here waits or counts.
Sources: vllm/entrypoints/openai/completion, sglang/srt/entrypoints/openai/serving_completions.py, llama.cpp
tools/server, as of autumn 2026.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from ...types import Sampling
from .faults import Fault
from .settings import Dialect

COMPLETIONS = "/v1/completions"

SHOWN_CHARS = 200
"""Of what a server says, in messages."""

LOGPROB_SLACK = 1e-3
"""How far above 0 rounding may bring a log-probability."""

LEAST_LOGPROB = -1e30
"""Below it one would be infinite as a float32, or is too long to be a float at all."""

MAX_DIGITS = 12
"""Of a token id: no vocabulary has as many, and Python refuses to read very long ones."""

_FINISHES = {None: "", "": "", "stop": "stop", "length": "length", "abort": "abort"}


@dataclass(slots=True)
class Event:
    """Some tokens of an answer, checked one by one but not yet against the request."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish: str = ""
    """"", "stop", "length" or "abort": given up by the server, to be asked for again"""


def completion_body(
    dialect: Dialect,
    model: str,
    prompt: list[int],
    *,
    max_tokens: int,
    sampling: Sampling,
    ends: Sequence[int],
    seed: int,
) -> dict[str, Any]:
    """The JSON of a streamed request for one response that ends at any token of `ends`.

    All of sampling is said: servers have other defaults, such as those of the model's generation_config.
    """
    body: dict[str, Any] = {
        "model": model, "prompt": prompt, "max_tokens": max_tokens, "seed": seed, "stream": True, "n": 1,
        "temperature": sampling.temperature, "top_p": sampling.top_p, "min_p": sampling.min_p,
    }  # fmt: skip
    if dialect == "llama.cpp":
        samplers = ["top_k", "top_p", "min_p", "temperature"]
        return body | {"logprobs": 1, "top_k": sampling.top_k, "samplers": samplers, "cache_prompt": True}
    extra = {"logprobs": 0, "top_k": sampling.top_k or -1, "repetition_penalty": 1.0, "stop_token_ids": list(ends)}
    extra |= {"skip_special_tokens": False, "return_token_ids": True}
    if dialect == "vllm":
        extra["return_tokens_as_token_ids"] = True
    return body | extra


def read_event(data: bytes, prompt: Sequence[int], vocab_size: int) -> Event:
    """One event of an answer to `prompt`. Raises Fault."""
    message = _json(data)
    if not isinstance(message, dict):
        raise Fault("bad_answer", f"an answer must be an object, got {shown(data)}")
    if message.get("error") or message.get("object") == "error":
        raise Fault("server_error", f"the server gave up: {shown(data)}")
    choices = message.get("choices")
    if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
        raise Fault("bad_answer", f"an answer must have choices, got {shown(data)}")
    if not choices:
        return Event()  # Usage alone.
    if len(choices) > 1 or choices[0].get("index", 0) != 0:
        raise Fault("bad_answer", f"one response was asked for, got {shown(data)}")
    (choice,) = choices
    echoed = choice.get("prompt_token_ids")
    if echoed is not None and echoed != list(prompt):
        raise Fault("bad_ids", "the server answers another prompt than it was given")
    finish = choice.get("finish_reason")
    if not isinstance(finish, str | None) or finish not in _FINISHES:
        raise Fault("bad_finish", f"finish_reason must be stop, length or abort, got {reprlib.repr(finish)}")
    tokens, logprobs = _tokens(choice)
    for token in tokens:
        if type(token) is not int or not 0 <= token < vocab_size:
            raise Fault("bad_ids", f"a token id must be 0..{vocab_size - 1}, got {reprlib.repr(token)}")
    for logprob in logprobs:
        if type(logprob) not in (float, int) or not LEAST_LOGPROB <= logprob <= LOGPROB_SLACK:
            got = reprlib.repr(logprob)
            raise Fault("bad_logprobs", f"a log-probability must be finite and at most 0, got {got}")
    return Event(tokens, [min(float(logprob), 0.0) for logprob in logprobs], _FINISHES[finish])


def shown(data: bytes) -> str:
    """The beginning of what a server said, on one line."""
    text = " ".join(data[: 4 * SHOWN_CHARS].decode("utf-8", "replace").split())
    return text if len(text) <= SHOWN_CHARS else f"{text[:SHOWN_CHARS]}..."


def _json(data: bytes) -> Any:
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError:
        pass
    try:
        return json.loads(data)  # This one reads NaN, which is a matter of the log-probabilities.
    except (ValueError, RecursionError):
        raise Fault("bad_json", f"no JSON: {shown(data)}") from None


def _tokens(choice: dict[str, Any]) -> tuple[list[Any], list[Any]]:
    """Ids and log-probabilities of one choice, one of these for each of those; not yet looked at."""
    ids, logprobs = choice.get("token_ids"), choice.get("logprobs")
    named, values = _named(logprobs) if isinstance(logprobs, dict) else (None, [])
    if ids is None:
        ids = named
    elif not isinstance(ids, list):
        raise Fault("bad_ids", f"token_ids must be a list, got {reprlib.repr(ids)}")
    elif named is not None and named != ids:
        raise Fault("bad_ids", "token_ids and the tokens that log-probabilities are given for differ")
    if ids is None:
        if choice.get("text"):
            raise Fault("no_ids", f"text without token ids: {reprlib.repr(choice['text'])}")
        return [], []
    if ids and not values:
        raise Fault("no_logprobs", f"{len(ids)} tokens without log-probabilities")
    if len(ids) != len(values):
        raise Fault("bad_logprobs", f"{len(ids)} tokens and {len(values)} log-probabilities")
    return ids, values


def _named(logprobs: dict[str, Any]) -> tuple[list[Any] | None, list[Any]]:
    """Ids, if the log-probabilities name them, and values."""
    content = logprobs.get("content")
    if isinstance(content, list):
        items = [item if isinstance(item, dict) else {} for item in content]
        return [item.get("id") for item in items], [item.get("logprob") for item in items]
    values, names = logprobs.get("token_logprobs"), logprobs.get("tokens")
    prefix = "token_id:"
    if isinstance(names, list) and names and all(isinstance(name, str) and name.startswith(prefix) for name in names):
        numbers = [name.removeprefix(prefix) for name in names]
        named: list[Any] | None = [int(n) if len(n) < MAX_DIGITS and n.isdecimal() else None for n in numbers]
    else:
        named = None
    return named, values if isinstance(values, list) else []
