"""What a kernel's speed depends on besides its shape: how many tokens come, and how unevenly they fall on experts.

    counts_E --Load.of--> tokens, skew, active --Watch.bucket--> a bucket that doesn't flap --> kernels/tuner.py

Knows nothing of kernels or devices.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

SKEWS = (1.15, 1.4, 1.75, 2.25, 3.0, 4.5, 7.0)
"""Bounds between the buckets of max/mean load."""

STEPS = 8
"""Buckets of tokens for each factor of two: where a grid fills whole waves, a few percent more change the best."""

STICKY = 0.03
"""A load leaves its bucket when it is past the bound by this share: at a bound it would come and go."""


class Bucket(NamedTuple):
    """Loads for which one configuration is as good as another."""

    tokens: int
    """floor(STEPS * log2(tokens)); 0 for none."""
    skew: int
    """Index into `SKEWS`, from 0 (even) to len(SKEWS) (one expert has nearly all)."""
    active: int
    """ceil(log2(experts with a token))."""

    def distance(self, other: Bucket) -> float:
        """How far one is from the other, in factors of two, bounds of skew and factors of two again."""
        return abs(self.tokens - other.tokens) / STEPS + abs(self.skew - other.skew) + abs(self.active - other.active)

    def __str__(self) -> str:
        return f"t{self.tokens}-s{self.skew}-a{self.active}"

    @classmethod
    def parse(cls, text: str) -> Bucket:
        """Reads what `str` gives. Raises ValueError for anything else."""
        parts = text.split("-")
        if [part[:1] for part in parts] != ["t", "s", "a"]:
            raise ValueError(f"a bucket is written like t10-s0-a7, got {text!r}")
        return cls(*(int(part[1:]) for part in parts))


@dataclass(frozen=True)
class Load:
    """One batch as a router left it."""

    tokens: int
    """(token, choice) pairs, or rows where nothing is routed."""
    skew: float = 1.0
    """Load of the busiest expert over the mean of all, >= 1."""
    active: int = 1
    """Experts with at least one token."""

    def __post_init__(self) -> None:
        if self.tokens < 0 or self.active < 0 or not 1.0 <= self.skew < math.inf:
            raise ValueError(
                f"a load has tokens >= 0, active experts >= 0 and a finite skew >= 1, got tokens {self.tokens}, "
                f"active {self.active}, skew {self.skew}"
            )

    @classmethod
    def of(cls, counts_E: Sequence[int]) -> Load:
        """From the pairs of each expert, on the host."""
        total, active = sum(counts_E), sum(count > 0 for count in counts_E)
        return cls(total, max(1.0, max(counts_E) * len(counts_E) / total) if total else 1.0, active)

    @property
    def bucket(self) -> Bucket:
        return Bucket(
            tokens=math.floor(STEPS * math.log2(max(1, self.tokens))),
            skew=bisect_right(SKEWS, self.skew),
            active=max(0, self.active - 1).bit_length(),
        )


class Watch:
    """The bucket of a load that changes from batch to batch, slow to leave a bucket at its bounds."""

    def __init__(self) -> None:
        self._bucket: Bucket | None = None

    def bucket(self, load: Load) -> Bucket:
        """The bucket to go by now that `load` has come."""
        old, new = self._bucket, load.bucket
        if old is not None and old != new:
            # It moves only if the load would have moved from `STICKY` nearer to where it was, too.
            reach = [_nudged(load, share).bucket for share in (1 - STICKY, 1 + STICKY)]
            new = Bucket(
                *(a if a in near else b for a, b, near in zip(old, new, zip(*reach, strict=True), strict=True))
            )
        self._bucket = new
        return new


def _nudged(load: Load, share: float) -> Load:
    return Load(round(load.tokens * share), max(1.0, load.skew * share), round(load.active * share))
