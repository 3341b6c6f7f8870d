"""The rollout worker that weights.py watches while it is given weights. Node processes import it by this name."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from headrace.actors.rollout.actor import Rollout
from headrace.actors.rollout.local import LocalBackend
from headrace.runtime import Lane, message


@dataclass(kw_only=True)
class TimedRollout(Rollout):
    """Notes when each step of its engine ended, and how long each swap of weights took it."""

    async def start(self) -> None:
        self.ends: list[float] = []
        self.swaps: list[tuple[float, float]] = []
        self.failed = 0
        self.watched: object = None
        await super().start()

    @message(concurrent=True, lane=Lane.CONTROL)
    async def watch(self) -> None:
        """From here on; the engine is there once the first weights are."""
        assert isinstance(self._backend, LocalBackend) and self._backend._engine is not None
        engine: Any = self._backend._engine
        step, load = engine.step, engine.load

        def timed_step() -> Any:
            try:
                return step()
            except BaseException:
                self.failed += 1
                raise
            finally:
                self.ends.append(time.perf_counter())

        def timed_load(prepared: Any) -> Any:
            began, computed = time.perf_counter(), time.thread_time()
            old = load(prepared)
            self.swaps.append((time.perf_counter() - began, time.thread_time() - computed))
            return old

        engine.step, engine.load = timed_step, timed_load

    @message(concurrent=True, lane=Lane.CONTROL)
    async def times(self) -> tuple[list[float], list[tuple[float, float]], int]:
        """Ends of steps, on the clock that all processes of a host share; seconds of swaps, and those of computing in
        them; steps that failed."""
        return self.ends, self.swaps, self.failed
