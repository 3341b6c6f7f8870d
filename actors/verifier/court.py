"""What stands around a judge so that every case gets a verdict: cache, concurrency limit, deadline, retries.

    case -> cache -----------------------------------------------> verdict
              '-> a free place -> attempt -> error, retryable? -> pause -> attempt ... -> verdict
                  (the queue)     '------ within the deadline, as the budget allows ------'

A verdict that is an error comes back as a value; nothing raises but cancellation. The deadline counts from when work
begins: waiting for a place is the caller's own deadline's business, so that a busy verifier loses no verdicts. Knows
nothing of rules or processes.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Gt

from ...runtime.codec import wire
from ..types import Verdict
from .case import Case
from .metrics import VerdictMetrics


@wire
@dataclass(frozen=True, kw_only=True)
class Care:
    """How much is done for one verdict."""

    deadline_s: Annotated[float, Gt(0)] = 60.0
    """For all attempts at a case together."""
    attempts: Annotated[int, Ge(1)] = 3
    """At one case, the first included. Only errors that may pass by are tried again."""
    retry_share: Annotated[float, Ge(0)] = 0.2
    """Retries per case over the long run: where everything fails, load grows by no more than this."""
    pause_s: Annotated[float, Ge(0)] = 0.05
    """Before the second attempt; doubled before each further one."""
    cache_size: Annotated[int, Ge(0)] = 4096
    """Verdicts kept by content, those used least lately forgotten first; 0 = none, for judges that are not functions of
    the text."""


class RetryBudget:
    """Tokens that retries are paid with: each case brings `share` of one, and a few are there from the start."""

    RESERVE = 10.0

    def __init__(self, share: float) -> None:
        self._share = share
        self._tokens = self.RESERVE if share else 0.0

    def earn(self) -> None:
        self._tokens = min(self._tokens + self._share, self.RESERVE)

    def spend(self) -> bool:
        """Takes a token if there is one."""
        if self._tokens < 1.0:
            return False
        self._tokens -= 1.0
        return True


class Court:
    """Verdicts by `judge`, with care: of at most `places` cases at a time, the others in the order of their coming."""

    def __init__(self, judge: Callable[[Case], Awaitable[Verdict]], care: Care, *, places: int) -> None:
        self._judge, self._care = judge, care
        self._places = asyncio.Semaphore(places)
        self._budget = RetryBudget(care.retry_share)
        self._cache: OrderedDict[bytes, Verdict] = OrderedDict()
        self.metrics = VerdictMetrics()

    async def verdict(self, case: Case) -> Verdict:
        """The verdict on `case`, from the cache or reached now. Verdicts are shared: change none."""
        key = case.digest() if self._care.cache_size else b""
        if (known := self._cache.get(key)) is not None:
            self._cache.move_to_end(key)
            self.metrics.count("cache_hits")
            return known
        async with self._places:
            started = time.monotonic()
            verdict = await self._reach(case)
            self.metrics.judged(verdict, time.monotonic() - started)
        if key and not verdict.error:
            self._cache[key] = verdict
            while len(self._cache) > self._care.cache_size:
                self._cache.popitem(last=False)
        return verdict

    async def _reach(self, case: Case) -> Verdict:
        limit = asyncio.timeout(self._care.deadline_s)
        self._budget.earn()
        last: Verdict | None = None
        try:
            async with limit:
                for attempt in range(1, self._care.attempts + 1):
                    last = await self._judge(case)
                    if not last.retryable or attempt == self._care.attempts or not self._budget.spend():
                        break
                    self.metrics.count("retries")
                    await asyncio.sleep(self._care.pause_s * 2 ** (attempt - 1))
                assert last is not None
                return last
        except TimeoutError:
            if not limit.expired():
                raise
        why = f"; the last attempt: {last.error}" if last else ""
        text = f"{case.row or 'a case'}: no verdict within {self._care.deadline_s:g} s{why}"
        return Verdict(correct=False, error=text, kind="deadline", retryable=True)
