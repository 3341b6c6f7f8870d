"""The judgement of silence, on a clock that is only a number: the unsteady are spared, the dead are found."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.runtime.detector import MAX_PHI, Detector, HeartbeatPolicy

POLICY = HeartbeatPolicy()


def simulate(beats, *, until, check_s=0.25, policy=POLICY):
    """The states seen by checks every `check_s`, and when each began; `beats` are times of arrival."""
    detector = Detector(policy, 0.0)
    changes = [(0.0, "alive")]
    arrivals = iter([*sorted(beats), math.inf])
    arrival = next(arrivals)
    now = 0.0
    while now < until:
        now += check_s
        while arrival <= now:
            detector.beat(arrival)
            arrival = next(arrivals)
        state = detector.state(now)
        if state != changes[-1][1]:
            changes.append((now, state))
    return changes


def sent(count, delay, seed, *, drop=0.0):
    """Arrivals of beats that are sent once a second, each delayed by `delay(random)`."""
    chance = random.Random(seed)
    return [n + delay(chance) for n in range(count) if chance.random() >= drop]


NETWORKS = {
    "quiet": (lambda _: 0.001, 0.0),
    "a loaded machine": (lambda chance: chance.uniform(0, 0.8), 0.0),
    "long tails": (lambda chance: min(6.0, chance.expovariate(1 / 0.4)), 0.0),
    "lossy": (lambda chance: chance.uniform(0, 0.1), 0.1),
    "stalls of 4 s": (lambda chance: 4.0 if chance.random() < 0.01 else 0.01, 0.0),
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("seed", range(3))
def test_the_unsteady_but_living_is_never_lost(name, seed):
    delay, drop = NETWORKS[name]
    changes = simulate(sent(4_000, delay, seed, drop=drop), until=3_990)
    assert "lost" not in {state for _, state in changes}
    # Now and then a suspicion, which passes.
    assert len(changes) < 4_000 * 0.06


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("seed", range(3))
def test_the_dead_is_suspected_then_lost_soon(name, seed):
    delay, drop = NETWORKS[name]
    arrivals = [at for at in sent(500, delay, seed, drop=drop) if at <= 500]
    changes = simulate(arrivals, until=600)
    (suspected, before), (lost, last) = changes[-2:]
    assert (before, last) == ("suspect", "lost")
    assert max(arrivals) < suspected <= max(arrivals) + 10 and lost <= max(arrivals) + 15
    if name == "quiet":
        assert suspected <= max(arrivals) + 1.75 and lost <= max(arrivals) + 6


def test_lost_is_lost_for_ever():
    detector = Detector(POLICY, 0.0)
    assert detector.state(100.0) == "lost"
    detector.beat(100.1)
    assert detector.state(100.2) == "lost"


def test_any_message_is_a_sign_of_life_but_teaches_nothing():
    detector = Detector(POLICY, 0.0)
    for n in range(1, 20):
        detector.beat(float(n))
    for n in range(20_000):
        detector.heard(19 + n / 1000)  # A flood; then silence for a second, which is nothing.
    assert detector.state(40.0) == "alive"
    for n in range(1, 1000):
        detector.heard(40.0 + n)  # No beats at all, as if they were stuck behind something.
        assert detector.state(40.5 + n) == "alive"


def test_who_stood_still_itself_blames_nobody():
    detector = Detector(POLICY, 0.0)
    for n in range(1, 20):
        detector.beat(float(n))
    detector.forgive(100.0, 119.5)
    assert detector.state(119.9) == "alive" and detector.silence(120.0) == 1.0
    assert detector.state(130.0) == "lost"


def test_forgiveness_reaches_no_further_than_now():
    detector = Detector(POLICY, 0.0)
    for n in range(1, 20):
        detector.beat(float(n))
    detector.beat(119.0)  # It was read before the standstill was noticed.
    detector.forgive(100.0, 119.5)
    assert detector.silence(121.0) == 1.5


@given(st.lists(st.floats(0.001, 20), max_size=50), st.floats(0, 1000), st.floats(0, 100))
def test_phi_rises_with_silence_and_stays_a_number(intervals, silence, more):
    detector = Detector(POLICY, 0.0)
    now = 0.0
    for interval in intervals:
        now += interval
        detector.beat(now)
    phi, later = detector.phi(now + silence), detector.phi(now + silence + more)
    assert 0 <= phi <= later <= MAX_PHI
