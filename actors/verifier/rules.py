"""Judges answers by rule. Pure functions; what a model wrote is compared as text and never evaluated.

Knows nothing of models, rewards or actors.
"""

from __future__ import annotations

import numpy as np

from ..data import running_sum
from ..types import Verdict


def judge_running_sum(tokens: np.ndarray, answer: str) -> Verdict:
    """Right iff the response (int32 [n]) ends with the end-of-sequence token and after its last `#` comes `answer`.

    The comparison is exact: "7", "+7" and "07=" are not "07". Partial totals are not judged.
    """
    if len(tokens) == 0 or tokens[-1] != running_sum.EOS_ID:
        return Verdict(correct=False)
    _, mark, final = running_sum.decode(tokens).rpartition("#")
    return Verdict(correct=bool(mark) and final == answer)
