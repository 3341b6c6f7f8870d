"""Oracles: the formula of the module worked by hand, scipy for the draws."""

import numpy as np
import pytest
from scipy import stats

from headrace.actors.data.adaptation import Adaptation
from headrace.actors.data.running_sum import RunningSum
from headrace.runtime.codec import decode, encode

SIZES = np.array([2, 3, 4])
PRIOR = np.array([0.5, 0.3, 0.2])


def fresh(seed=0):
    return Adaptation(sizes=SIZES, prior=PRIOR, seed=seed)


def test_weights_are_those_of_the_formula():
    adaptation = fresh()
    adaptation.observe(2, mixed=False)
    adaptation.observe(4, mixed=True)
    adaptation.observe(4, mixed=True)
    share = [0.5 * 0.95, 0.5, 1 - 0.5 * 0.95**2]
    weights = [p**0.35 * (s + 0.05) for p, s in zip(PRIOR, share, strict=True)]
    assert adaptation.probabilities == pytest.approx(np.array(weights) / sum(weights))


def test_draws_follow_the_probabilities():
    adaptation = fresh()
    for _ in range(40):
        adaptation.observe(2, mixed=False)
    counts = np.bincount([adaptation.choose(ordinal) for ordinal in range(3000)], minlength=5)[2:]
    assert stats.chisquare(counts, 3000 * adaptation.probabilities).pvalue > 1e-3


def test_a_hopeless_size_is_still_asked_for():
    adaptation = fresh()
    for _ in range(1000):
        for size in SIZES:
            adaptation.observe(int(size), mixed=bool(size == 3))
    assert adaptation.probabilities[1] > 0.8 and adaptation.probabilities.min() > 0.02


def test_what_is_forgotten_counts_as_unseen():
    adaptation = fresh()
    for _ in range(50):
        adaptation.observe(3, mixed=False)
    assert adaptation.probabilities[1] < fresh().probabilities[1] / 2
    adaptation.forget(3)
    assert adaptation.probabilities == pytest.approx(fresh().probabilities)


def test_a_restored_state_goes_on_the_same():
    task = RunningSum()
    first = Adaptation(sizes=task.sizes, prior=task.size_prior, seed=5)
    for ordinal in range(100):
        first.observe(first.choose(ordinal), mixed=ordinal % 3 == 0)
    second = Adaptation(sizes=task.sizes, prior=task.size_prior, seed=5)
    second.load_state(decode(*encode(first.state())))
    for ordinal in range(100, 200):
        size = first.choose(ordinal)
        assert second.choose(ordinal) == size
        first.observe(size, mixed=ordinal % 2 == 0)
        second.observe(size, mixed=ordinal % 2 == 0)
    assert first.state() == second.state()


def test_a_state_of_another_task_is_refused():
    state = fresh().state() | {"sizes": [2, 3]}
    with pytest.raises(ValueError, match=r"state is for problem sizes \[2, 3\]"):
        fresh().load_state(state)
