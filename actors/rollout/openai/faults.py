"""What can go wrong with a server, by kind. Knows nothing of what is then done about it."""

from __future__ import annotations

from typing import Literal, get_args

Kind = Literal[
    "unreachable",  # no connection, or it broke
    "busy",  # 429 or 503
    "server_error",  # another 5xx, or an error in the middle of an answer
    "rejected",  # another status: the request itself is refused
    "silent",  # no bytes for too long
    "truncated",  # the answer ended before its end
    "bad_json",  # what came is no JSON
    "bad_answer",  # it is JSON, and no completion
    "no_ids",  # text without token ids
    "bad_ids",  # ids outside the vocabulary, or that contradict each other or the prompt
    "no_logprobs",
    "bad_logprobs",  # not one for each token, not finite, or above 0
    "too_many",  # more tokens than asked for
    "bad_finish",  # an end that contradicts the tokens
    "no_weights",  # the server could not be given the version that is wanted
    "stalled",  # no further token for too long, whatever was tried
]

KINDS: tuple[Kind, ...] = get_args(Kind)

PASSING = frozenset({"unreachable", "busy", "server_error", "silent", "truncated", "bad_json"})
"""Those that another try may not meet. A server that breaks the protocol in well-formed answers will do so again."""

WAITED_OUT = frozenset({"unreachable", "busy"})
"""Those that say nothing of the request: it is repeated until it has stalled."""


class Fault(Exception):
    """One request failed; `str` says why. What came before it is valid."""

    def __init__(self, kind: Kind, why: str, *, wait_s: float = 0.0) -> None:
        super().__init__(why)
        self.kind = kind
        self.wait_s = wait_s
        """How long the server asked to be left alone."""

    @property
    def passing(self) -> bool:
        return self.kind in PASSING

    @property
    def refusal(self) -> str:
        """As Chunk.refusal wants it."""
        return f"{self.kind}: {self}"
