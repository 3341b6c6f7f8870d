"""The balancer: what it saves and what it moves on loads that are known; in a run, and when it fails there."""

from __future__ import annotations

import numpy as np
import pytest
from tiny_job import check_rows, launch

from headrace.actors.balancer import Balancer
from headrace.actors.balancer.fleet import Fleet, Terms, in_order
from headrace.actors.balancer.monitor import LoadMonitor
from headrace.actors.model.config import ModelConfig

BALANCED = {
    "nodes.aside.threads": 1, "groups.aside.restart": "temporary", "groups.aside.max_restarts": 2,
    "actors.balancer.node": "aside",
    "actors.balancer.virtual_ranks": 2, "actors.balancer.slots_per_rank": 3,
}  # fmt: skip


def fleet(*, slots_per_rank: int = 3, horizon_steps: int = 20, move_pairs: float = 100.0) -> Fleet:
    terms = Terms(
        num_ranks=4, slots_per_rank=slots_per_rank, decay=0.5, horizon_steps=horizon_steps, move_pairs=move_pairs
    )
    return Fleet(terms)


def test_the_monitor_expects_a_mean_that_forgets():
    monitor = LoadMonitor(0.5)
    for load in (8, 4, 2):
        monitor.observe(np.array([[load]]))
    assert monitor.expected == pytest.approx((2 + 4 / 2 + 8 / 4) / (1 + 1 / 2 + 1 / 4))


def test_experts_in_order_are_shared_out_as_evenly_as_they_divide():
    assert in_order(np.array([1, 2, 4, 8, 16, 32]), 3).tolist() == [3, 12, 48]
    assert in_order(np.array([1, 2, 4, 8, 16]), 2).tolist() == [7, 24]


def test_a_lasting_load_is_placed_once_and_then_even():
    load = np.array([[1000, 10, 10, 10, 400, 10, 10, 350], [10, 10, 900, 10, 10, 900, 10, 10]])
    balanced = fleet()
    first = balanced.observe(load)
    assert first.moves > 0
    second = balanced.observe(load)
    assert second.before == first.before == (1010 + 910) / (1800 + 1860) * 4
    assert second.after < 1.03 < first.after
    assert second.moves == 0


@pytest.mark.parametrize("terms", [{"move_pairs": 1e6}, {"horizon_steps": 1, "move_pairs": 2000.0}])
def test_what_does_not_pay_is_left(terms):
    load = np.array([[1000, 10, 10, 10, 400, 10, 10, 350]])
    balanced = fleet(**terms)
    outcomes = [balanced.observe(load) for _ in range(3)]
    assert [outcome.moves for outcome in outcomes] == [0, 0, 0]
    assert outcomes[0] == outcomes[2]


def test_without_replicas_it_swaps():
    load = np.array([[900, 800, 10, 10, 10, 10, 10, 10]])
    balanced = fleet(slots_per_rank=2)
    balanced.placements = [balanced._place(np.ones(8))]
    before = max(balanced.placements[0].level_load(load[0]))
    moves = [balanced.observe(load).moves for _ in range(2)]
    after = max(balanced.placements[0].level_load(load[0]))
    assert after == 910 and (before == 910 or moves[0] >= 2) and moves[1] == 0


def test_a_step_without_any_pair_is_even():
    assert fleet().observe(np.zeros((2, 8), np.int64)) == (0, 0, 0)


def test_slots_must_hold_all_experts():
    with pytest.raises(ValueError, match=r"must be at least \[model\] num_experts \(9\), got 8; every expert needs"):
        Balancer(model=ModelConfig(num_experts=9), virtual_ranks=4, slots_per_rank=2)


async def test_a_new_incarnation_goes_on_with_the_placements_of_the_last():
    load = np.array([[1000, 10, 10, 10, 400, 10, 10, 350]])
    first, second = (Balancer(model=ModelConfig(num_experts=8), move_pairs=100.0) for _ in range(2))
    await first.start()
    await second.start()
    first.observe(load)
    second.restore(first.snapshot())
    assert second.observe(load)["rank_load_after"] < 1.03


@pytest.mark.slow
def test_a_run_reports_what_balancing_saves_and_outlives_the_balancer(tmp_path):
    with launch(tmp_path, {**BALANCED, "rl.steps": 30}) as job:
        job.wait_for_step(2)
        for incarnation in (
            1,
            2,
            3,
        ):  # More often than its group may be restarted: it stays down, and nothing else does.
            job.wait_for_event("actor_up", actor="balancer", incarnation=incarnation)
            job.kill("aside")
        assert job.finish() == 0, job.output + job.errors
        check_rows(job, 30)
        assert job.summary["restarts"] == {"balancer": 2}
        told = [row for row in job.rows() if "rank_load_after" in row]
        assert told and told[0]["step"] == 1
        for row in told:
            assert 1 <= row["rank_load_after"] <= row["rank_load_before"] <= 2
            assert row["expert_moves"] >= 0
        assert job.left_behind() == []
