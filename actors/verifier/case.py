"""One response to judge, as text, and what a rule raises when it can't. Knows no rule."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from ...runtime.codec import wire


@wire
@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A response and what it is compared with."""

    reference: str
    """The right answer, or what the rule takes in its place: a pattern, a schema."""
    response: str
    """What the model wrote: hostile input."""
    question: str = ""
    dataset: str = ""
    """Which policy applies; "" = the verifier's own."""
    row: str = ""
    """Where the reference comes from, for messages: "gsm8k/train.jsonl:17"."""

    def digest(self) -> bytes:
        """16 bytes that stand for all that a verdict depends on; `row` is only a name."""
        digest = hashlib.blake2b(digest_size=16)
        for part in (self.dataset, self.question, self.reference, self.response):
            data = part.encode("utf-8", "surrogatepass")
            digest.update(len(data).to_bytes(8, "little"))
            digest.update(data)
        return digest.digest()


PAST_LIMITS = "past the limits: "
"""How the note begins of a response that is incorrect because it was too much for its process."""


class BadReference(ValueError):
    """The reference itself can't be used, so nothing can be judged by it. Mend the row of the data set."""
