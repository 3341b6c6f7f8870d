"""Texts of tokens, and back: the longest token that fits comes first. Knows nothing of what is spelled."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

EOS_ID = 0
"""The end-of-sequence token is the first of every vocabulary."""


class Vocabulary:
    """`texts` of the token ids 0.., each another; the first is the end-of-sequence token."""

    def __init__(self, name: str, texts: Sequence[str]) -> None:
        self._name, self._texts = name, tuple(texts)
        self._ids = {text: token for token, text in enumerate(texts)}
        self._token = re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))))

    def __len__(self) -> int:
        return len(self._texts)

    def encode(self, text: str) -> np.ndarray:
        """Token ids, int32 [n]. Raises ValueError for text that the vocabulary can't spell."""
        ids, at = [], 0
        while at < len(text):
            match = self._token.match(text, at)
            if match is None:
                raise ValueError(f"the {self._name} vocabulary has no token for {text[at]!r} at character {at}")
            ids.append(self._ids[match.group()])
            at = match.end()
        return np.array(ids, np.int32)

    def decode(self, tokens: np.ndarray) -> str:
        """Text of `tokens` (int [n]), without a last end-of-sequence token; an id that is none reads `<id>`."""
        ids = np.asarray(tokens).tolist()
        if ids and ids[-1] == EOS_ID:
            ids.pop()
        return "".join(self._texts[i] if 0 <= i < len(self._texts) else f"<{i}>" for i in ids)
