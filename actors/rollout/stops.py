"""Whether a response has just come to a stop sequence or text. Knows nothing of engines; of tokens only the end."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

Detokenize = Callable[[np.ndarray], str]
"""int32 [n] -> their text; bytes that are no whole character give some replacement."""

MOST_BYTES = 4
"""Of a character in UTF-8; a token has at least one."""


def stops(
    tokens: np.ndarray, sequences: Sequence[np.ndarray], texts: Sequence[str], detokenize: Detokenize | None
) -> bool:
    """Whether `tokens` (int32 [n], a response so far) end with one of `sequences`, or their newest has completed one
    of `texts`."""
    for sequence in sequences:
        if len(sequence) <= len(tokens) and np.array_equal(tokens[len(tokens) - len(sequence) :], sequence):
            return True
    if texts and detokenize is not None:
        tail = detokenize(tokens[-MOST_BYTES * max(map(len, texts)) :])
        return any(text in tail for text in texts)
    return False
