"""A batch that stays with the ranks that made it: its handle travels, its arrays go from rank to rank when asked for.

    answers = await policy.generate.keep(prompts)     RemoteBatch: 3 parts, 96 samples; nothing came here
    values = await critic.values(answers)             each critic rank fetches its part from the ranks that have it
    await critic.release(answers)

Knows nothing of how parts are kept; see worker.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from .batches import Cuttable
from .codec import wire


@wire
@dataclass(frozen=True)
class RemotePart:
    """Samples `start` to `stop` of what one rank keeps."""

    owner: str
    """Name of the rank's actor."""
    key: str
    start: int
    stop: int


@wire
@dataclass(frozen=True)
class RemoteBatch(Cuttable):
    """Parts that are kept elsewhere, in order. It is good until it is released, or one of its ranks is restarted."""

    parts: list[RemotePart]
    nbytes: int
    """Of the arrays that the ranks keep for it."""

    def __len__(self) -> int:
        return sum(part.stop - part.start for part in self.parts)

    def part(self, start: int, stop: int) -> RemoteBatch:
        """The handle of some samples; past the end it begins again with the first one."""
        number, pieces = len(self), []
        while start < stop:
            first = start % number
            last = min(first + stop - start, number)
            pieces += self._cut(first, last)
            start += last - first
        share = self.nbytes * sum(piece.stop - piece.start for piece in pieces) // number
        return RemoteBatch(pieces, share)

    def _cut(self, start: int, stop: int) -> list[RemotePart]:
        pieces, before = [], 0
        for part in self.parts:
            size = part.stop - part.start
            low, high = max(start - before, 0), min(stop - before, size)
            if low < high:
                pieces.append(RemotePart(part.owner, part.key, part.start + low, part.start + high))
            before += size
        return pieces
