"""Does what a rank's schedule says, over any link: one bucket travels while the next one is filled.

    buffer 0  fill 0 | ... travels ... | fill 2 | ...
    buffer 1         | fill 1          | ...

Blocks: run it on a thread of its own. The link has the deadlines: a peer that is gone or stuck ends in its error.
Knows nothing of sockets and of GPUs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np

from .buckets import Schedule
from .staging import HEADER_BYTES, Arrays, copy_local, pack, require_arrays, unpack


class Link(Protocol):
    """Carries bytes between this rank and others; those of a pair of ranks arrive in order."""

    def send(self, dest: int, data: np.ndarray) -> Callable[[], None]:
        """Begins to send uint8 [n]; what it returns waits until `data` may be overwritten."""

    def receive(self, source: int, into: np.ndarray) -> np.ndarray:
        """Waits for what `source` sends, uint8 [n]: in the front of `into`, or in memory of the link's own, which stays
        as it is until the next call."""


class Transfer:
    """Moves a version between the arrays of all ranks of a plan; each rank has one of these.

    `source` are the arrays that this rank has to give, `dest` those that it receives into; none for a rank that is only
    on the other side. Until `run` has returned `dest` is a mixture: give it a second set, and swap.
    """

    def __init__(self, schedule: Schedule, link: Link, source: Arrays | None, dest: Arrays | None) -> None:
        """Raises BadWeights if the arrays are not those that the plan expects."""
        self._schedule = schedule
        self._link = link
        self._source = source or {}
        self._dest = dest or {}
        for arrays, receiving in ((source, False), (dest, True)):
            if arrays is not None:
                require_arrays(schedule, arrays, receiving=receiving)
        largest = max((bucket.nbytes for bucket in schedule.buckets), default=0)
        self._buffers = [np.empty(HEADER_BYTES + largest, np.uint8) for _ in schedule.buckets[:2]]

    @property
    def nbytes(self) -> int:
        """Memory that it takes beside the arrays."""
        return sum(buffer.nbytes for buffer in self._buffers)

    def run(self, version: int, epoch: int) -> None:
        """Raises BadWeights or CorruptWeights (see staging.py), or what the link raises."""
        schedule, busy = self._schedule, [_nothing, _nothing]
        copy_local(schedule, self._source, self._dest)
        for number, bucket in enumerate(schedule.buckets):
            buffer = self._buffers[number % 2]
            busy[number % 2]()
            busy[number % 2] = _nothing
            if bucket.source == schedule.rank:
                data = pack(schedule, bucket, self._source, buffer, version=version, epoch=epoch)
                busy[number % 2] = self._link.send(bucket.dest, data)
            else:
                data = self._link.receive(bucket.source, buffer)
                unpack(schedule, bucket, data, self._dest, version=version, epoch=epoch)
        for wait in busy:
            wait()


def _nothing() -> None:
    """Waits for nothing."""
