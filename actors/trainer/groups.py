"""DAPO, arXiv 2503.14476, section 3.2: which groups are trained, and what each response of a group is worth.

Plain numpy, since the controller decides this too. Knows nothing of models, tokens or losses.
"""

from __future__ import annotations

import numpy as np

from ..types import Group, Trajectory

_MIN_STD = 1e-6


def judged(group: Group) -> list[Trajectory]:
    """The responses that take part: those with a verdict that is no error, and at least one token."""
    return [t for t in group.trajectories if t.verdict is not None and not t.verdict.error and t.num_tokens]


def has_signal(group: Group) -> bool:
    """Dynamic sampling, eq. 11: 0 < number of correct responses < number of responses.

    Of graded verdicts, that not all are the same. What is added to a verdict to make a reward doesn't matter here.
    """
    values = {t.verdict.value for t in judged(group) if t.verdict is not None}
    return len(values) > 1


def advantages(rewards: np.ndarray) -> np.ndarray:
    """A_i = (R_i - mean(R)) / std(R) over the responses of one group, eq. 9: float32 [n] -> float32 [n].

    The deviation is that of the group itself (divided by n). Equal rewards give zeros.
    """
    centred = rewards - rewards.mean(dtype=np.float64)
    std = rewards.std(dtype=np.float64)
    return np.asarray(centred / std if std > _MIN_STD else np.zeros(len(rewards)), np.float32)
