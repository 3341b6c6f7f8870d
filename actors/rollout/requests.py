"""What a rollout engine is asked for and what it hands out. Knows nothing of torch, prompts' meaning or actors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from ...runtime.codec import wire
from ..types import Finish, Origin, Sampling
from .stops import Detokenize, stops

MIN_TEMPERATURE, MAX_TEMPERATURE = 0.01, 100.0
"""Beyond these logits lose their meaning in fp32."""


@wire
@dataclass(kw_only=True, slots=True)
class Request:
    """Some or all members of one group, to be generated or continued."""

    key: int
    """Name of the request in its engine; free again when all its members have finished or it is cancelled."""
    ordinal: int
    """Number of the prompt in the run: with seed, member and position it fixes the random numbers."""
    prompt: np.ndarray
    """int32 [P], P >= 1"""
    members: list[int]
    """Which members of the group, each at least 0 and once."""
    prefixes: list[np.ndarray] = field(default_factory=list)
    """int32 [n] of each member, what it has written so far; an empty list if none has written anything."""
    max_new_tokens: int
    """Tokens of a whole response, prefix included."""
    temperature: float = 1.0
    """0 decodes greedily, with log-probabilities at temperature 1."""
    top_k: int = 0
    """Only the k likeliest tokens may be drawn; 0: all. Log-probabilities are of what is left, here and below."""
    top_p: float = 1.0
    """Only the likeliest tokens whose probabilities sum to top_p may be drawn, at least one."""
    min_p: float = 0.0
    """Only tokens at least min_p times as likely as the likeliest may be drawn."""
    stop: list[np.ndarray] = field(default_factory=list)
    """int32 [n] each: token sequences that end a response, itself the last of it."""
    stop_strings: list[str] = field(default_factory=list)
    """Texts that end a response with the token that completes one; for an engine with a detokenizer."""

    def sampling(self) -> Sampling:
        """All of it that tokens depend on."""
        return Sampling(
            temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, min_p=self.min_p,
            stop=tuple(tuple(tokens.tolist()) for tokens in self.stop), stop_strings=tuple(self.stop_strings),
            max_new_tokens=self.max_new_tokens,
        )  # fmt: skip


@wire
@dataclass(kw_only=True, slots=True)
class Chunk:
    """Some more tokens of one response, all sampled by one policy version."""

    key: int
    member: int
    version: int
    tokens: np.ndarray
    """int32 [n]; n is 0 only where a response ends whose tokens have all been handed out"""
    logprobs: np.ndarray
    """float32 [n]: of the behaviour policy, at the sampling temperature"""
    finish: Finish = ""
    refusal: str = ""
    """Why a response was refused: "kind: why"; empty otherwise."""
    routes: np.ndarray | None = None
    """uint8 or uint16 [n, layers, choices]: experts that the input before each token chose; the first chunk of a
    response has the prompt's, too: n + P - 1 rows. None unless the engine was asked."""
    origin: Origin | None = None
    """In the first chunk that an engine hands out of a response; of those after it, too."""


def check_request(
    request: Request,
    *,
    vocab_size: int,
    max_prompt_tokens: int,
    max_new_tokens: int,
    eos_id: int,
    detokenize: Detokenize | None = None,
) -> None:
    """Raises ValueError with rule, value and remedy if an engine of these limits can't generate `request`."""

    def refuse(text: str) -> ValueError:
        return ValueError(f"request {request.key}: {text}")

    _check_ids(request.prompt, "the prompt", vocab_size, refuse)
    if not 1 <= len(request.prompt) <= max_prompt_tokens:
        raise refuse(
            f"a prompt must have 1..{max_prompt_tokens} tokens, got {len(request.prompt)}; "
            "shorten it or raise max_prompt_tokens"
        )
    if not 1 <= request.max_new_tokens <= max_new_tokens:
        raise refuse(f"max_new_tokens must be 1..{max_new_tokens} (the engine's), got {request.max_new_tokens}")
    if request.temperature != 0 and not MIN_TEMPERATURE <= request.temperature <= MAX_TEMPERATURE:
        raise refuse(
            f"temperature must be 0 (greedy) or {MIN_TEMPERATURE}..{MAX_TEMPERATURE}, got {request.temperature}"
        )
    if request.top_k < 0:
        raise refuse(f"top_k must be at least 0 (all tokens), got {request.top_k}")
    if not 0 < request.top_p <= 1:
        raise refuse(
            f"top_p must be above 0 and at most 1, got {request.top_p}; for the likeliest token: temperature 0"
        )
    if not 0 <= request.min_p <= 1:
        raise refuse(f"min_p must be 0..1, got {request.min_p}")
    for tokens in request.stop:
        _check_ids(tokens, "a stop sequence", vocab_size, refuse)
        if not len(tokens):
            raise refuse("a stop sequence must have tokens; leave it out")
    if not all(request.stop_strings):
        raise refuse("a stop string must not be empty; leave it out")
    if request.stop_strings and detokenize is None:
        raise refuse("stop_strings need an engine with a detokenizer; give token sequences as stop instead")
    if not request.members or min(request.members) < 0 or len(set(request.members)) < len(request.members):
        raise refuse(f"members must be distinct indices from 0 up, at least one, got {request.members}")
    if request.prefixes and len(request.prefixes) != len(request.members):
        raise refuse(
            f"prefixes must be none or one for each of {len(request.members)} members, got {len(request.prefixes)}"
        )
    for member, prefix in zip(request.members, request.prefixes, strict=False):
        _check_ids(prefix, f"the prefix of member {member}", vocab_size, refuse)
        if (
            len(prefix) >= request.max_new_tokens
            or eos_id in prefix
            or stops(prefix, request.stop, request.stop_strings, detokenize)
        ):
            raise refuse(
                f"member {member} has finished: its prefix ends the response or fills max_new_tokens; leave it out"
            )


def _check_ids(ids: object, what: str, vocab_size: int, refuse: Callable[[str], ValueError]) -> None:
    if not (isinstance(ids, np.ndarray) and ids.ndim == 1 and np.issubdtype(ids.dtype, np.integer)):
        raise refuse(f"{what} must be a one-dimensional integer array")
    if len(ids) and not 0 <= ids.min() <= ids.max() < vocab_size:
        raise refuse(f"{what} has token ids {ids.min()}..{ids.max()} outside the vocabulary 0..{vocab_size - 1}")
