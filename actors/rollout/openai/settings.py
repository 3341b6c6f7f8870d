"""How a completions server is spoken to: the `[actors.rollout.server]` table. Knows nothing of requests or sockets."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Literal
from urllib.parse import urlsplit

from annotated_types import Ge, Gt

from ....runtime.codec import wire

Dialect = Literal["vllm", "sglang", "llama.cpp"]


@wire
@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """A server that answers POST /v1/completions with token ids and log-probabilities."""

    dialect: Dialect = "vllm"
    """What is understood beyond OpenAI's fields: how to ask for token ids, and how to give it weights."""
    model: str = "policy"
    """The name under which the server serves the policy."""
    key_variable: str = ""
    """Environment variable with the server's API key; empty where it wants none. The key itself is written nowhere."""
    weights: Literal["update", "fixed"] = "update"
    """"update": each version is given to the server. "fixed": it keeps what it has, and a second version is refused."""
    weights_folder: str = ""
    """Where versions are written for the server to read, by its path for both; empty: a folder of the run."""
    logprobs: Literal["raw", "processed"] = "raw"
    """Whether the server's log-probabilities are of the model, at temperature 1, or of what it sampled from (vLLM:
    --logprobs-mode processed_logprobs). Raw ones can only be used where responses are sampled at temperature 1."""
    max_requests: Annotated[int, Ge(1)] = 256
    """Requests that are open at once."""
    connect_s: Annotated[float, Gt(0)] = 5.0
    """Longest wait for a connection."""
    silence_s: Annotated[float, Gt(0)] = 120.0
    """Longest wait for the next bytes of an answer; also while the server has it wait for its turn."""
    stall_s: Annotated[float, Gt(0)] = 240.0
    """A response that got no further token for this long, whatever was tried, is refused."""
    max_tries: Annotated[int, Ge(1)] = 6
    """Requests in a row that brought a response no further before it is refused."""
    backoff_s: Annotated[float, Gt(0)] = 0.2
    """Wait after the first failure; it doubles with each, up to 10 s, and a random half of it is left out."""
    update_s: Annotated[float, Gt(0)] = 180.0
    """Longest wait for one call that gives the server weights."""


def addresses(base_url: str) -> list[str]:
    """The roots of the servers, separated by commas there. Raises ValueError if one is no HTTP address."""
    return [_root(part.strip()) for part in base_url.split(",")]


def address_of(base_url: str, worker: str) -> str:
    """That of a worker by its name: the first server for rollout, the second for rollout_2, ...

    Raises ValueError if there is none: a server of two workers would be given weights by both.
    """
    found, number = addresses(base_url), re.search(r"_(\d+)$", worker)
    index = int(number[1]) if number else 1
    if index > len(found):
        raise ValueError(
            f"base_url names {len(found)} server{'s' * (len(found) > 1)}, and {worker} is worker number {index}; "
            "give each worker its own, separated by commas"
        )
    return found[index - 1]


def _root(base_url: str) -> str:
    """Without a trailing /v1."""
    parts = urlsplit(base_url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise ValueError(f"base_url must be an address such as http://host:8000, got {base_url!r}")
    if parts.username or parts.password:
        raise ValueError("base_url must not hold a password; put the key in a variable and name it by key_variable")
    return base_url.rstrip("/").removesuffix("/v1").rstrip("/")
