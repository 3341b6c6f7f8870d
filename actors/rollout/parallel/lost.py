"""The error of ranks that can't work together any more. Knows nothing of torch."""

from __future__ import annotations


class RankLost(RuntimeError):
    """One has died, hangs, or is somewhere else in its work: only a restart of all of them helps."""
