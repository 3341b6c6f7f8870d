"""One response while a server writes it: what it has so far, what may come, and whether an end fits.

Knows nothing of connections; `Answer` is plain Python.
"""

from __future__ import annotations

import numpy as np

from ...types import Finish, Origin
from ..requests import Chunk, Request
from .faults import Fault
from .protocol import Event


class Answer:
    """The member at `index` of `request`, continued after its prefix."""

    def __init__(
        self, request: Request, index: int, *, eos_id: int, vocab_size: int, origin: Origin | None = None
    ) -> None:
        self.request = request
        self.member = request.members[index]
        prefix = request.prefixes[index] if request.prefixes else request.prompt[:0]
        self._sequence = [*request.prompt.tolist(), *prefix.tolist()]
        self._num_prompt = len(request.prompt)
        self.ends = (eos_id, *(int(tokens[0]) for tokens in request.stop))
        """Tokens of which any ends the response."""
        self._origin = origin
        self.vocab_size = vocab_size
        self.version = -1
        """Of the tokens that were not handed out."""
        self._tokens: list[int] = []
        """Not handed out yet, as `_logprobs`."""
        self._logprobs: list[float] = []
        self.finish: Finish = ""

    @property
    def sequence(self) -> list[int]:
        """Prompt and all tokens so far: what a request goes on after."""
        return self._sequence

    @property
    def num_tokens(self) -> int:
        """Of the response, prefix included."""
        return len(self._sequence) - self._num_prompt

    @property
    def num_left(self) -> int:
        """Tokens that may still come."""
        return self.request.max_new_tokens - self.num_tokens

    @property
    def num_held_back(self) -> int:
        """Tokens that were not handed out."""
        return len(self._tokens)

    def take(self, event: Event) -> None:
        """Adds what an event brings. Raises Fault, and takes none of the event, if it does not fit."""
        if self.finish and (event.tokens or event.finish not in ("", self.finish)):
            raise Fault("bad_finish", f"more after the response's end ({self.finish})")
        if len(event.tokens) > self.num_left:
            raise Fault("too_many", f"more than the {self.request.max_new_tokens} tokens that were asked for")
        if any(token in self.ends for token in event.tokens[:-1]):
            raise Fault("bad_finish", "tokens after one that ends the response")
        ended: Finish = ""
        last = event.tokens[-1:] or self._sequence[-1:]
        if (event.tokens or self.num_tokens) and last[0] in self.ends:
            ended = "stop"
        elif len(event.tokens) == self.num_left:
            ended = "length"
        if event.finish in ("stop", "length") and event.finish != ended:
            have = self.num_tokens + len(event.tokens)
            remedy = ", or its context is shorter than the job's" if event.finish == "length" else ""
            raise Fault(
                "bad_finish",
                f"the server says {event.finish} after {have} of {self.request.max_new_tokens} tokens, the last of "
                f"which is {last[0] if have else 'none'}: it ends at other tokens than {list(self.ends)}{remedy}",
            )
        self._sequence += event.tokens
        self._tokens += event.tokens
        self._logprobs += event.logprobs
        self.finish = ended

    def chunk(self, finish: Finish = "", refusal: str = "") -> Chunk:
        """The tokens that were not handed out."""
        tokens, self._tokens = self._tokens, []
        logprobs, self._logprobs = self._logprobs, []
        return Chunk(
            key=self.request.key,
            member=self.member,
            version=self.version,
            tokens=np.array(tokens, np.int32),
            logprobs=np.array(logprobs, np.float32),
            finish=finish,
            refusal=refusal,
            origin=self._origin if len(tokens) else None,
        )
