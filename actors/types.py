"""The nouns of the stream: prompt, segment, trajectory, group, verdict. Knows nothing of actors, models or files."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

import numpy as np

from ..runtime.codec import wire

Finish = Literal["", "stop", "length", "refused"]
"""Why a response ended: "" = it has not (partial), "stop" = end-of-sequence token or a stop sequence, "length" = budget
used up, "refused" = it failed for good: an error, never a wrong answer (`Trajectory.refusal` says why)."""


def refusal_kind(refusal: str) -> str:
    """What a refusal "kind: why" is counted as."""
    return refusal.partition(":")[0]


@wire
@dataclass(kw_only=True, slots=True, frozen=True)
class Sampling:
    """How tokens are drawn from logits, and what ends a response."""

    temperature: float = 1.0
    """0 decodes greedily, with log-probabilities at temperature 1."""
    top_k: int = 0
    """Only the k likeliest tokens may be drawn; 0: all."""
    top_p: float = 1.0
    """Only the likeliest tokens whose probabilities sum to top_p may be drawn, at least one; above 0."""
    min_p: float = 0.0
    """Only tokens at least min_p times as likely as the likeliest may be drawn."""
    stop: tuple[tuple[int, ...], ...] = ()
    """Token sequences that end a response, itself the last of it."""
    stop_strings: tuple[str, ...] = ()
    """Texts that end a response as soon as its detokenized end has one; needs an engine with a detokenizer."""
    max_new_tokens: int = 0
    """Tokens of a whole response, at most."""


@wire
@dataclass(kw_only=True, slots=True, frozen=True)
class Origin:
    """What generated some tokens: with prompt, member and the versions' weights, all that is needed to do it again."""

    engine: str
    """Its name and settings, as "headrace page_tokens=16 ..."."""
    worker: str
    seed: int
    sampling: Sampling
    precision: str = "float32"
    afresh: bool = True
    """Whether all keys and values before these tokens were computed anew under their version; else the engine went on
    over those of the segments before."""
    exact: bool = False
    """Whether the engine's batch shapes are fixed: then every bit comes again, else all but the rounding of logits."""


@wire
@dataclass(kw_only=True, slots=True)
class Prompt:
    """One problem."""

    ordinal: int
    """Monotonic number of the prompt in its run: never skipped, never used twice. Evaluation uses negative ones."""
    tokens: np.ndarray
    """int32 [P]"""
    answer: str
    """What the verifier compares with."""
    size: int
    """Difficulty class: number of operands of a running sum, level of a puzzle."""
    dataset: str = ""
    """Where the problem comes from: which policy a verifier applies, which puzzle it is."""


@wire
@dataclass(kw_only=True, slots=True)
class Segment:
    """Tokens of one response that were requested under one policy version."""

    version: int
    tokens: np.ndarray
    """int32 [n]"""
    logprobs: np.ndarray
    """float32 [n]: behaviour log-probabilities, at the sampling temperature"""
    routes: np.ndarray | None = None
    """uint8 or uint16 [rows, L, K]: experts of each layer and choice, None where nobody asked. A row for the input
    before each token: the first segment has those of the prompt, too, P - 1 more than tokens."""
    origin: Origin | None = None


@wire
@dataclass(kw_only=True, slots=True)
class Verdict:
    """What the verifier says of one response: correct, incorrect, a number, or an error; never two of them.

    An error is never a wrong answer: the sample is excluded. Raises ValueError where they are mixed.
    """

    correct: bool
    error: str = ""
    """Empty, or why no verdict could be reached."""
    kind: str = ""
    """Of an error, for counting: "timeout", "worker died", "bad reference", ..."""
    retryable: bool = False
    """Of an error: whether asking again may help."""
    reward: float | None = None
    """A graded verdict's number; None where right or wrong is all there is."""
    note: str = ""
    """Why, in a few words; for people only."""

    def __post_init__(self) -> None:
        if self.error:
            self.kind = self.kind or "error"
            if self.correct or self.reward is not None:
                raise ValueError(f"a verdict is an error or a judgement, not both: {self.error}")
        elif self.kind or self.retryable:
            raise ValueError(f"a verdict of kind {self.kind!r} needs an error text; a judgement has no kind")
        if self.reward is not None and not math.isfinite(self.reward):
            raise ValueError(f"reward must be a finite number, got {self.reward}; return an error instead")

    @property
    def value(self) -> float:
        """What a judgement is worth among its group: its number, or 1 and 0 for right and wrong."""
        return float(self.correct) if self.reward is None else self.reward


class Piece(Protocol):
    """What a rollout engine hands out: tokens of one version (see rollout.requests.Chunk)."""

    version: int
    tokens: np.ndarray
    logprobs: np.ndarray
    finish: Finish
    refusal: str
    routes: np.ndarray | None
    origin: Origin | None


@wire
@dataclass(kw_only=True, slots=True)
class Trajectory:
    """One response: its segments in order, its verdict, its reward."""

    member: int
    """Index in the group, 0..G-1."""
    segments: list[Segment] = field(default_factory=list)
    finish: Finish = ""
    refusal: str = ""
    """Of a response that was refused: "kind: why"."""
    verdict: Verdict | None = None
    reward: float = 0.0
    """Shaped reward; meaningful only when `verdict` is present and has no error."""

    def append(self, piece: Piece) -> None:
        """Takes the next tokens of the response, in order; they join the last segment if the version is the same."""
        assert not self.finish, f"member {self.member} has ended"
        self.finish, self.refusal = piece.finish, piece.refusal
        if not len(piece.tokens):
            return
        last = self.segments[-1] if self.segments else None
        origin = piece.origin
        if last is not None and origin is None and last.origin is not None:
            origin = replace(last.origin, afresh=False)
        if last is not None and piece.origin is None and last.version == piece.version and _joins(last, piece):
            last.tokens = np.concatenate([last.tokens, piece.tokens])
            last.logprobs = np.concatenate([last.logprobs, piece.logprobs])
            if last.routes is not None and piece.routes is not None:
                last.routes = np.concatenate([last.routes, piece.routes])
        else:
            self.segments.append(
                Segment(
                    version=piece.version, tokens=piece.tokens, logprobs=piece.logprobs, routes=piece.routes,
                    origin=origin,
                )
            )  # fmt: skip

    def tokens(self) -> np.ndarray:
        """All response tokens, int32 [n]."""
        return _join([s.tokens for s in self.segments], np.int32)

    def logprobs(self) -> np.ndarray:
        """Behaviour log-probabilities, float32 [n]."""
        return _join([s.logprobs for s in self.segments], np.float32)

    def versions(self) -> np.ndarray:
        """Policy version of each token, int32 [n]."""
        return _join([np.full(len(s.tokens), s.version) for s in self.segments], np.int32)

    def routes(self, prompt_tokens: int) -> np.ndarray | None:
        """Experts of every input of the response: [P + n - 1, L, K]. None if no segment has them.

        The highest number of the dtype where only some segments have them. P = `prompt_tokens`; the last token is no
        input.
        """
        known = next((s.routes for s in self.segments if s.routes is not None), None)
        if known is None:
            return None
        missing = np.iinfo(known.dtype).max
        parts, more = [], prompt_tokens - 1
        for segment in self.segments:
            rows = len(segment.tokens) + more
            given = segment.routes
            parts.append(given if given is not None else np.full((rows, *known.shape[1:]), missing, known.dtype))
            more = 0
        return np.concatenate(parts)

    @property
    def num_tokens(self) -> int:
        return sum(len(s.tokens) for s in self.segments)


@wire
@dataclass(kw_only=True, slots=True)
class Group:
    """The G responses to one prompt."""

    prompt: Prompt
    trajectories: list[Trajectory]

    @property
    def finished(self) -> bool:
        """Whether all responses have ended."""
        return all(t.finish for t in self.trajectories)

    @property
    def oldest_version(self) -> int:
        """Version of the oldest token: staleness counts from here."""
        return min(s.version for t in self.trajectories for s in t.segments)

    @property
    def newest_version(self) -> int:
        return max(s.version for t in self.trajectories for s in t.segments)

    @property
    def num_tokens(self) -> int:
        return sum(t.num_tokens for t in self.trajectories)

    def as_read(self) -> Group:
        """What judges need to see: the answers in one piece, without behaviour log-probabilities."""
        none = np.zeros(0, np.float32)
        return replace(
            self,
            trajectories=[
                replace(t, segments=[Segment(version=t.segments[0].version, tokens=t.tokens(), logprobs=none)])
                for t in self.trajectories
            ],
        )


def _joins(segment: Segment, piece: Piece) -> bool:
    return (segment.routes is None) == (piece.routes is None)


def _join(parts: list[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate(parts).astype(dtype, copy=False) if parts else np.zeros(0, dtype)
