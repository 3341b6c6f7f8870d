"""The soft overlong punishment against the three cases of DAPO eq. 13."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.actors.reward.shaping import soft_overlong_punishment


def test_the_numbers_of_the_paper() -> None:
    def punish(num_tokens: int) -> float:
        return soft_overlong_punishment(num_tokens, max_tokens=20480, cache_tokens=4096)

    assert [punish(n) for n in (0, 16384, 18432, 20480, 20481, 99999)] == [0, 0, -0.5, -1, -1, -1]


@given(st.integers(0, 300), st.integers(1, 200), st.data())
def test_longer_is_never_better(num_tokens: int, max_tokens: int, data: st.DataObject) -> None:
    cache_tokens = data.draw(st.integers(0, max_tokens))
    here, next_ = (
        soft_overlong_punishment(n, max_tokens=max_tokens, cache_tokens=cache_tokens)
        for n in (num_tokens, num_tokens + 1)
    )
    assert -1 <= next_ <= here <= 0


def test_a_cache_beyond_the_budget_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must be 0\.\.10 \(max_tokens\), got 11"):
        soft_overlong_punishment(1, max_tokens=10, cache_tokens=11)
