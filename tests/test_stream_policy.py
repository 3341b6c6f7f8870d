"""The stream trains no group past the staleness bound, never deadlocks, and accounts for each group at each instant."""

import heapq
import itertools
import random
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.actors.stream.ledger import Ledger
from headrace.actors.stream.policy import StreamPolicy, priority, stream_policy
from headrace.actors.stream.pool import StreamPool
from headrace.actors.trainer.settings import RlSettings
from headrace.runtime.codec import decode, encode
from headrace.runtime.entries import Entry, Selection, View
from headrace.runtime.pool_state import Pool
from headrace.runtime.rundir import RunSpec


def entry(id, started, variance=0.0):
    return Entry(id=id, key=(float(started), -variance, float(id)), started=started, payload=None)


def view(waiting, version, count, pending=None, leased=()):
    return View(waiting=waiting, leased=leased, pending=pending or {}, version=version, count=count)


# The rule as streaming.md section 4 words it, for alpha = 0: the oracle of what follows.


def rule_holds(starts, version, slots, eta, batch):
    return all(sum(s <= version - eta + j for s in starts) <= slots + j * batch for j in range(eta + 1))


@st.composite
def situations(draw):
    """A policy and a state in which the rule holds: some groups finished, some running."""
    eta, batch, version = draw(st.integers(0, 4)), draw(st.integers(1, 6)), draw(st.integers(0, 9))
    starts = draw(st.lists(st.integers(version - eta, version), max_size=(eta + 1) * batch))
    while not rule_holds(starts, version, batch, eta, batch):
        starts.pop()
    finished = [draw(st.booleans()) for _ in starts]
    return eta, batch, version, starts, finished


@given(situations())
def test_selection_keeps_the_rule_and_takes_all_that_it_allows(situation):
    eta, batch, version, starts, finished = situation
    waiting = [entry(id, s) for id, (s, done) in enumerate(zip(starts, finished, strict=True)) if done]
    pending = {id: s for id, (s, done) in enumerate(zip(starts, finished, strict=True)) if not done}
    picks = StreamPolicy(batch=batch, max_staleness=eta)(view(waiting, version, batch, pending)).picks
    left, slots = list(starts), batch
    for pick in picks:
        left.remove(pick.started)
        slots -= 1
        assert rule_holds(left, version, slots, eta, batch)
    rest = sorted(e.started for e in waiting if e not in picks)
    if rest and slots:
        left.remove(rest[0])
        assert not rule_holds(left, version, slots - 1, eta, batch), "a group was held back without need"


@given(situations())
def test_with_nothing_running_a_full_batch_is_never_refused(situation):
    eta, batch, version, starts, _ = situation
    waiting = [entry(id, started) for id, started in enumerate(starts)]
    picks = StreamPolicy(batch=batch, max_staleness=eta)(view(waiting, version, batch)).picks
    assert len(picks) == min(batch, len(starts))


def test_a_slot_is_kept_for_the_running_group_that_is_due():
    policy = StreamPolicy(batch=2, max_staleness=1)
    finished = [entry(1, 4), entry(2, 4), entry(3, 4)]
    selection = policy(view(finished, version=4, count=2, pending={0: 3}))
    assert [e.id for e in selection.picks] == [1]
    assert "slots are kept for running groups" in selection.reason
    assert len(policy(view(finished, version=4, count=2, pending={0: 4})).picks) == 2


def test_order_is_deadline_then_information_then_age():
    rewards = {0: [1, 1, 1, 0], 1: [1, 1, 0, 0], 2: [1, 1, 0, 0], 3: [0, 0, 0, 1]}
    keys = {i: priority(3 if i == 3 else 5, r, i) for i, r in rewards.items()}
    waiting = [Entry(id=i, key=keys[i], started=int(keys[i][0]), payload=None) for i in rewards]
    assert [e.id for e in StreamPolicy(batch=4)(view(waiting, 5, 4)).picks] == [3, 1, 2, 0]


def test_past_the_bound_groups_are_dropped_and_hold_no_slot():
    policy = StreamPolicy(batch=2, max_staleness=1)
    selection = policy(view([entry(0, 2), entry(1, 5)], version=5, count=2, pending={2: 1, 3: 5}))
    assert [(e.id, reason) for e, reason in selection.drops] == [(0, "staler than 1")]
    assert [e.id for e in selection.picks] == [1]


@pytest.mark.parametrize(("alpha", "batch", "fresh"), [(0, 5, 0), (0.1, 30, 3), (0.3, 10, 3), (0.25, 6, 2), (1, 7, 7)])
def test_alpha_is_a_number_of_groups(alpha, batch, fresh):
    assert StreamPolicy(batch=batch, alpha=alpha).num_fresh == fresh


def test_alpha_takes_fresh_groups_and_the_oldest_continuations():
    policy = StreamPolicy(batch=4, max_staleness=3, alpha=0.5)
    waiting = [entry(i, s) for i, s in enumerate([7, 9, 8, 9, 9, 6])]
    assert sorted(e.id for e in policy(view(waiting, 9, 4)).picks) == [0, 1, 3, 5]
    few = policy(view([entry(0, 7), entry(1, 8), entry(2, 8), entry(3, 9)], 9, 4))
    assert len(few.picks) == 3 and "alpha" in few.reason
    all_fresh = policy(view([entry(i, 9) for i in range(5)], 9, 4))
    assert len(all_fresh.picks) == 4, "fresh groups fill what continuations leave"


@pytest.mark.parametrize(
    ("policy", "started"),
    [
        (StreamPolicy(batch=4, max_staleness=2, alpha=1.0), 8),
        (StreamPolicy(batch=4, max_staleness=2, alpha=0.5), 7),
        (StreamPolicy(batch=4, max_staleness=3, alpha=0.5, pool_capacity=4), 8),
    ],
    ids=["no slots for old ones", "all due now", "no place for fresh ones"],
)
def test_alpha_yields_to_old_groups_after_a_change_of_settings(policy, started):
    assert len(policy(view([entry(i, started) for i in range(4)], 9, 4)).picks) == 4


def test_incremental_leases_count_the_fresh_groups_that_they_have():
    policy = StreamPolicy(batch=4, max_staleness=3, alpha=0.5)
    waiting = [entry(i, s) for i, s in enumerate([7, 8])]
    assert len(policy(view(waiting, 9, 2, leased=[entry(8, 9), entry(9, 9)])).picks) == 2
    assert len(policy(view(waiting, 9, 2, leased=[entry(8, 9), entry(9, 7)])).picks) == 1


def test_settings_are_checked_and_travel():
    with pytest.raises(ValueError, match="pool_capacity must hold a batch: at least 16, got 8"):
        StreamPolicy(batch=16, pool_capacity=8)
    with pytest.raises(ValueError, match="capacity must hold a batch: at least 16 groups, got 15"):
        StreamPool(capacity=15, run=RunSpec(name="a"), rl=RlSettings(groups_per_step=16))
    pool = StreamPool(capacity=600, run=RunSpec(name="a", directory="b"), rl=RlSettings(max_staleness=3, alpha=0.5))
    assert pool.journal_path() == "b/a/journal/pool"
    assert pool.policy() == stream_policy(RlSettings(max_staleness=3, alpha=0.5))
    policy = StreamPolicy(batch=16, alpha=0.25)
    assert decode(*encode(policy)) == policy


def test_workers_that_lag_get_only_what_can_still_be_trained():
    policy, ledger = StreamPolicy(batch=2, max_staleness=1), Ledger()
    assert policy.capacity(ledger, version=5) == 4
    assert policy.capacity(ledger, version=5, started=4) == 2, "they are due in this step"
    assert policy.capacity(ledger, version=5, started=3) == 0
    assert StreamPolicy(batch=2, max_staleness=0).capacity(ledger, version=5, started=4) == 0
    small = StreamPolicy(batch=4, max_staleness=3, alpha=0.5, pool_capacity=5)
    assert small.capacity(ledger, version=9, started=8) == 3, "two places stay free for fresh ones"
    assert small.capacity(ledger, version=9) == 5


def test_overdue_groups_are_named():
    ledger = Ledger()
    ledger.submit(0, 1)
    ledger.submit(1, 4)
    ledger.pause(0)
    assert StreamPolicy(batch=2, max_staleness=2).overdue(ledger, 4) == [0]


# Ledger


def test_ledger_survives_the_wire_and_reports_drops_by_length():
    ledger = Ledger()
    for id in range(40):
        ledger.submit(id, 0)
    for id in range(20):
        ledger.accept(id, num_tokens=id)
    ledger.take(range(10))
    ledger.train(range(10))
    for id in range(10, 20):
        ledger.drop(id, "stale")
    ledger.filter(20)
    ledger.pause(21)
    ledger.check()
    assert ledger.drop_rates() == [0.0] * 5 + [1.0] * 5
    again = Ledger.restore(decode(*encode(ledger.snapshot())))
    assert again.counts == ledger.counts and again.pending() == ledger.pending()
    assert again.drop_rates() == ledger.drop_rates()
    assert ledger.reasons == {"stale": 10}
    with pytest.raises(ValueError, match="group 30 was submitted before"):
        ledger.submit(30, 0)


def test_a_group_that_is_leased_before_its_acceptance_is_noted_counts_once():
    ledger = Ledger()
    ledger.submit(0, 3)
    ledger.take([0])
    ledger.check()
    ledger.accept(0, 3, num_tokens=7)
    ledger.check()
    assert ledger.counts["leased"] == ledger.counts["accepted"] == 1
    ledger.give_back([0, 5])
    ledger.take([0])
    ledger.train([0])
    ledger.check()


# A run simulated by events: everything may end in any order, at any time.


@dataclass
class Simulation:
    policy: StreamPolicy
    seed: int
    sigma: float = 1.0
    train_time: float = 1.0
    swap_delay: float = 0.0
    p_filter: float = 0.0
    p_fail: float = 0.0
    p_pause: float = 0.0
    select: object = None
    """Replaces the policy of the pool (for the proof that the check below can fail)."""
    staleness: list = field(default_factory=list)
    fresh: list = field(default_factory=list)
    max_in_system: int = 0
    max_events: int = 0

    def run(self, num_steps):
        rng = random.Random(self.seed)
        policy, ledger = self.policy, Ledger()
        pool = Pool(capacity=policy.places, policy=self.select or policy)
        version = held = ordinal = events = 0
        training = None
        clock = 0.0
        queue = []
        tie = itertools.count()

        def at(delay, *event):
            heapq.heappush(queue, (clock + delay, next(tie), event))

        while version < num_steps:
            # Whatever is possible now.
            while policy.capacity(ledger, version, held) > 0:
                ledger.submit(ordinal, held)
                at(rng.lognormvariate(0.0, self.sigma), "done", ordinal)
                ordinal += 1
                self.check(ledger, pool, version)
            pool.expect(ledger.pending())
            if training is None and (training := pool.lease(policy.batch, version)) is not None:
                ids = [e.id for e in training.entries]
                ledger.take(ids)
                self.staleness += [version - e.started for e in training.entries]
                self.fresh.append(sum(e.started == version for e in training.entries))
                at(rng.lognormvariate(0.0, 0.5) * self.train_time, "trained")
                self.check(ledger, pool, version)

            assert queue, f"deadlock at version {version}: {ledger.counts}, {pool.select(policy.batch, version).reason}"
            clock, _, (what, *of) = heapq.heappop(queue)
            events += 1
            if what == "done":
                (id,) = of
                if id in ledger.partial:
                    ledger.resume(id)
                if rng.random() < self.p_pause:
                    ledger.pause(id)
                    at(rng.lognormvariate(0.0, self.sigma), "done", id)
                elif rng.random() < self.p_fail:
                    ledger.fail(id, "chaos")
                    pool.retire([id])
                elif rng.random() < self.p_filter:
                    ledger.filter(id)
                    pool.retire([id])
                else:
                    first_token = max(ledger.pending()[id], rng.choice([0, held]))
                    ledger.accept(id, first_token)
                    started = ledger.pooled[id]
                    key = priority(started, [rng.random() for _ in range(4)], id)
                    assert pool.put(Entry(id=id, key=key, started=started, payload=None))
            elif what == "trained":
                ids = [e.id for e in training.entries]
                if rng.random() < self.p_fail:  # the trainer dies; the batch goes back
                    pool.release(training.id)
                    ledger.give_back(ids)
                else:
                    pool.ack(training.id)
                    ledger.train(ids)
                    version += 1
                    self.max_events, events = max(self.max_events, events), 0
                    at(self.swap_delay * rng.random(), "swapped", version)
                training = None
            elif what == "swapped":
                held = max(held, *of)
            self.check(ledger, pool, version)
        return self

    def check(self, ledger, pool, version):
        ledger.check()
        counts, stats = ledger.counts, pool.stats()
        assert (stats["waiting"], stats["leased"]) == (counts["pooled"], counts["leased"])
        in_system = counts["running"] + counts["partial"] + len(pool)
        assert in_system <= self.policy.places and counts["running"] <= self.policy.max_running
        assert counts["dropped"] == 0 and self.policy.overdue(ledger, version) == []
        self.max_in_system = max(self.max_in_system, in_system)


simulations = st.builds(
    Simulation,
    policy=st.builds(
        lambda batch, extra, **others: StreamPolicy(batch=batch, pool_capacity=extra and batch + extra - 1, **others),
        batch=st.integers(1, 8),
        extra=st.one_of(st.just(0), st.integers(1, 12)),
        max_staleness=st.integers(0, 6),
        alpha=st.one_of(st.just(0.0), st.floats(0.0, 1.0)),
        max_running=st.integers(1, 40),
    ),
    seed=st.integers(0, 10**6),
    sigma=st.sampled_from([0.1, 1.0, 2.5]),
    train_time=st.sampled_from([0.02, 1.0, 10.0]),
    swap_delay=st.sampled_from([0.0, 0.5, 20.0]),
    p_filter=st.sampled_from([0.0, 0.3, 0.8]),
    p_fail=st.sampled_from([0.0, 0.2]),
    p_pause=st.sampled_from([0.0, 0.3]),
)


@settings(max_examples=80, deadline=None)
@given(simulations)
def test_any_run_keeps_the_bound_and_goes_on(simulation):
    simulation.run(num_steps=25)
    policy = simulation.policy
    assert max(simulation.staleness) <= policy.max_staleness
    assert min(simulation.staleness) >= 0
    assert min(simulation.fresh) >= policy.num_fresh
    # Each step takes a bounded number of events: what is in the system may end, be paused or fail a few times over.
    tries = 1 / ((1 - simulation.p_filter) * (1 - simulation.p_fail) * (1 - simulation.p_pause))
    assert simulation.max_events <= 60 + 20 * tries * policy.places


@settings(max_examples=40, deadline=None)
@given(simulations)
def test_admission_is_the_published_formula(simulation):
    policy = StreamPolicy(batch=simulation.policy.batch, max_staleness=simulation.policy.max_staleness)
    ledger, rng, version = Ledger(), random.Random(simulation.seed), 0
    for ordinal in range(60):
        accepted, running = ledger.totals["accepted"], len(ledger.running)
        formula = min(64 - running, (policy.max_staleness + version + 1) * policy.batch - (accepted + running))
        assert policy.capacity(ledger, version) == max(0, formula)
        if formula > 0:
            ledger.submit(ordinal, version)
        for id in [id for id in ledger.running if rng.random() < 0.3]:
            ledger.accept(id)
        pool = [entry(id, s) for id, s in ledger.pooled.items()]
        picks = policy(view(pool, version, policy.batch, ledger.pending())).picks
        if len(picks) == policy.batch:
            ledger.take(e.id for e in picks)
            ledger.train([e.id for e in picks])
            version += 1


def test_synchronous_when_staleness_is_zero_or_alpha_is_one():
    for policy in (StreamPolicy(batch=4, max_staleness=0), StreamPolicy(batch=4, max_staleness=3, alpha=1.0)):
        simulation = Simulation(policy=policy, seed=1, swap_delay=0.5).run(50)
        assert set(simulation.staleness) == {0}
        assert simulation.max_in_system == 4


def test_a_small_alpha_lowers_staleness():
    means = [
        np.mean(Simulation(StreamPolicy(batch=8, max_staleness=4, alpha=a), seed=5, train_time=0.5).run(200).staleness)
        for a in (0.0, 0.5)
    ]
    assert means[1] < means[0]


def test_long_answers_are_not_starved():
    """Heavy tails, no drops: every submitted group with a place below the horizon is trained in the end."""
    simulation = Simulation(StreamPolicy(batch=4, max_staleness=2), seed=3, sigma=2.5)
    simulation.run(100)
    assert len(simulation.staleness) == 400 and max(simulation.staleness) == 2


def test_without_the_rule_the_same_simulation_breaks_the_bound():
    def oldest_finished_first(v):
        return Selection(picks=sorted(v.waiting, key=lambda e: (e.started, e.id))[: v.count])

    def late(seed):
        run = Simulation(StreamPolicy(batch=4, max_staleness=2), seed=seed, sigma=2.5, select=oldest_finished_first)
        run.check = lambda *_: None
        return max(run.run(100).staleness) > 2

    def ends_badly(seed):
        try:
            return late(seed)
        except AssertionError as error:
            assert "deadlock" in str(error)
            return True

    assert any(ends_badly(seed) for seed in range(3))
