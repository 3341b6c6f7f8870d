"""Restart or give up: decisions on a clock of the test's own."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.runtime import RestartPolicy
from headrace.runtime.errors import RestartBudgetExceeded
from headrace.runtime.supervisor import RestartBudget


def test_the_first_restart_is_immediate_then_delays_double_up_to_the_maximum_with_some_jitter():
    budget = RestartBudget("a", RestartPolicy(max_restarts=10, backoff_s=0.1, max_backoff_s=1.0))
    for expected in [0.0, 0.1, 0.2, 0.4, 0.8, 1.0, 1.0]:
        delay = budget.after_failure(0.0, "x")
        assert 0.8 * expected <= delay <= 1.2 * expected
    assert budget.total == 7


def test_one_failure_too_many_gives_up_and_says_why():
    budget = RestartBudget("verifier", RestartPolicy(max_restarts=2, window_s=10.0))
    budget.after_failure(0.0, "first")
    budget.after_failure(1.0, "second")
    with pytest.raises(RestartBudgetExceeded, match=r"verifier failed again after 2 restarts within 10 s .*: third"):
        budget.after_failure(2.0, "third")


def test_failures_are_forgotten_after_the_window():
    budget = RestartBudget("a", RestartPolicy(max_restarts=1, window_s=10.0, backoff_s=1.0))
    assert budget.after_failure(0.0, "x") == budget.after_failure(10.5, "x") == 0.0, "the back-off starts anew as well"


def test_a_temporary_child_stays_down_and_costs_nothing():
    budget = RestartBudget("a", RestartPolicy(restart="temporary", max_restarts=0))
    assert all(budget.after_failure(float(t), "x") is None for t in range(5)) and budget.total == 0


def test_which_children_are_started_again_after_an_orderly_stop():
    assert RestartBudget("a", RestartPolicy()).after_stop()
    assert not RestartBudget("a", RestartPolicy(restart="transient")).after_stop()
    assert not RestartBudget("a", RestartPolicy(restart="temporary")).after_stop()


def test_jitter_is_the_same_for_the_same_seed_and_differs_between_children():
    def delays(name, seed):
        budget = RestartBudget(name, RestartPolicy(max_restarts=5), seed)
        return [budget.after_failure(0.0, "x") for _ in range(5)]

    assert delays("a", 1) == delays("a", 1) != delays("a", 2)
    assert delays("a", 1) != delays("b", 1)


@given(
    st.lists(st.floats(0, 20), max_size=60),
    st.integers(0, 5),
    st.floats(0.5, 30),
    st.floats(0, 1),
    st.floats(0, 3),
)
def test_never_more_restarts_than_allowed_in_any_window(gaps, most, window, backoff, max_backoff):
    """Oracle: the times of all restarts so far, counted by hand."""
    policy = RestartPolicy(max_restarts=most, window_s=window, backoff_s=backoff, max_backoff_s=max_backoff)
    budget, now, restarts = RestartBudget("a", policy), 0.0, []
    for gap in gaps:
        now += gap
        recent = sum(now - t <= window for t in restarts)
        if recent >= most:
            with pytest.raises(RestartBudgetExceeded):
                budget.after_failure(now, "x")
        else:
            longest = 1.2 * min(backoff * 2 ** (recent - 1), max_backoff) if recent else 0.0
            assert 0 <= budget.after_failure(now, "x") <= longest + 1e-9
            restarts.append(now)
    assert budget.total == len(restarts)


def test_thousands_of_restarts_do_not_overflow_the_back_off():
    budget = RestartBudget("a", RestartPolicy(max_restarts=3000, backoff_s=0.5, max_backoff_s=2.0))
    assert max(budget.after_failure(0.0, "x") for _ in range(3000)) <= 2.4
