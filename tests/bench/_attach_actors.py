"""Actors of the benchmark of bin/attach, in a module that node processes can import."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from itertools import repeat

from headrace.runtime import Actor, message


@dataclass(kw_only=True)
class Stuck(Actor):
    """Holds up its loop."""

    @message
    async def compute(self, seconds: float) -> None:
        """In Python: other threads have their turns."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            pass

    @message
    async def keep_the_interpreter(self, seconds: float) -> None:
        """In C code that gives no other thread a turn."""
        begun, trial = time.perf_counter(), 10**6
        deque(repeat(None, trial), maxlen=0)
        deque(repeat(None, round(trial * seconds / (time.perf_counter() - begun))), maxlen=0)
