"""What a verifier has done so far, in numbers. Bounded memory, whatever it judges."""

from __future__ import annotations

import bisect
import time
from collections import Counter

from ..types import Verdict
from .case import PAST_LIMITS

_EDGES_S = [1e-4 * 1.25**i for i in range(64)]
"""Upper edges of the latency classes, 0.1 ms to 130 s, each a quarter above the one before."""

COUNTS = ("correct", "incorrect", "graded", "past_limits", "out_of_tokens", "cache_hits", "retries", "errors")
"""What `snapshot` always has, beside errors by kind and latencies; it only grows."""

QUANTILES = (0.5, 0.9, 0.99)


class VerdictMetrics:
    """Counts of verdicts by outcome and errors by kind, and latency quantiles to within 25 %."""

    def __init__(self) -> None:
        self._since = time.time()
        self._counts: Counter[str] = Counter()
        self._errors: Counter[str] = Counter()
        self._classes = [0] * (len(_EDGES_S) + 1)

    def count(self, what: str) -> None:
        """One more `what`: "cache_hits", "retries"."""
        self._counts[what] += 1

    def judged(self, verdict: Verdict, seconds: float) -> None:
        """A verdict that was reached, or not, in `seconds`; those from the cache are not among them."""
        self._outcome(verdict)
        self._classes[bisect.bisect_left(_EDGES_S, seconds)] += 1

    def unheard(self, verdict: Verdict) -> None:
        """A verdict on a response that had no end, which takes no time."""
        self._outcome(verdict)
        self._counts["out_of_tokens"] += not verdict.error

    def _outcome(self, verdict: Verdict) -> None:
        if verdict.error:
            self._errors[verdict.kind] += 1
        elif verdict.reward is not None:
            self._counts["graded"] += 1
        else:
            self._counts["correct" if verdict.correct else "incorrect"] += 1
            self._counts["past_limits"] += verdict.note.startswith(PAST_LIMITS)

    def snapshot(self) -> dict[str, float]:
        """Every number by its name: COUNTS, `errors/timeout`, `latency_p90_s`, ...; `past_limits` and `out_of_tokens`
        are some of the incorrect ones. `since`, unix seconds, is when counting began: after a restart another one."""
        numbers: dict[str, float] = {"since": self._since, **{name: self._counts[name] for name in COUNTS}}
        numbers |= dict(self._counts)
        numbers["errors"] = self._errors.total()
        numbers |= {f"errors/{kind}": count for kind, count in sorted(self._errors.items())}
        return numbers | {f"latency_p{100 * q:g}_s": self._quantile(q) for q in QUANTILES}

    def _quantile(self, q: float) -> float:
        """The upper edge of the class that holds the quantile; 0 before there is anything."""
        rank, seen = q * sum(self._classes), 0
        for edge, count in zip([*_EDGES_S, 2 * _EDGES_S[-1]], self._classes, strict=True):
            seen += count
            if seen and seen >= rank:
                return edge
        return 0.0
