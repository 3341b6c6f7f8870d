"""Which responses of a group take part, and whether a group has anything to teach. Knows nothing of models."""

from __future__ import annotations

from ..types import Group, Trajectory


def judged(group: Group) -> list[Trajectory]:
    """The responses that take part: those with a verdict that is no error, and at least one token."""
    return [t for t in group.trajectories if t.verdict is not None and not t.verdict.error and t.num_tokens]


def has_signal(group: Group) -> bool:
    """Dynamic sampling, DAPO (arXiv 2503.14476) eq. 11: 0 < number of correct responses < number of responses.

    Of graded verdicts, that not all are the same. What is added to a verdict to make a reward doesn't matter here.
    """
    values = {t.verdict.value for t in judged(group) if t.verdict is not None}
    return len(values) > 1
