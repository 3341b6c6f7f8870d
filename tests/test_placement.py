"""Placing experts and their replicas: against exhaustive search, against EPLB's method and its published example."""

from __future__ import annotations

import sys
from itertools import combinations, combinations_with_replacement, pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.kernels.leveling import NO_SLOT
from headrace.kernels.placement import KEEP_SLACK, Placement, place_experts
from headrace.kernels.slot_search import room

sys.path.append(str(Path(__file__).parent / "bench"))
from _eplb import eplb
from _loads import FIXTURES, drifting

# Loads are counts or averages of counts: half of the smallest float of all is none.
loads = st.lists(st.integers(0, 50) | st.floats(0, 1e6, allow_subnormal=False), min_size=1, max_size=12).map(np.array)


@st.composite
def jobs(draw: st.DrawFn) -> tuple[np.ndarray, int, int]:
    load, num_ranks = draw(loads), draw(st.integers(1, 5))
    slots_per_rank = draw(st.integers(-(-len(load) // num_ranks), -(-len(load) // num_ranks) + 3))
    return load, num_ranks * slots_per_rank, num_ranks


@given(jobs())
def test_a_placement_has_every_expert_and_is_the_same_each_time(job):
    load, num_slots, num_ranks = job
    placement = place_experts(load, num_slots, num_ranks)
    assert set(placement.experts_P.tolist()) == set(range(len(load)))
    np.testing.assert_array_equal(placement.experts_P, place_experts(load, num_slots, num_ranks).experts_P)
    slots = placement.slots_ER
    for expert, row in enumerate(slots.tolist()):
        held = [slot for slot in row if slot != NO_SLOT]
        assert row == sorted(held) + [NO_SLOT] * (len(row) - len(held))
        assert held == np.flatnonzero(placement.experts_P == expert).tolist()
    np.testing.assert_allclose(placement.even_load(load).sum(), load.sum())


@given(jobs())
def test_with_pairs_divided_the_highest_load_is_at_most_that_of_eplb(job):
    load, num_slots, num_ranks = job
    theirs = Placement(eplb(load, num_slots, num_ranks), len(load), num_ranks)
    ours = place_experts(load, num_slots, num_ranks)
    counts = np.rint(load * (1e9 / max(load.max(), 1e-9))).astype(np.int64)
    assert ours.level_load(counts).max() <= theirs.even_load(counts).max() * (1 + 1e-3) + 1


@settings(max_examples=400)
@given(st.lists(st.integers(1, 30), min_size=2, max_size=4))
def test_two_ranks_are_about_as_even_as_any_placement_makes_them(load):
    num_slots = len(load) + len(load) % 2
    slots = range(num_slots)
    best = np.inf
    for extra in combinations_with_replacement(range(len(load)), num_slots - len(load)):
        experts = np.array([*range(len(load)), *extra])
        for first in combinations(slots, num_slots // 2):
            order = [*first, *(slot for slot in slots if slot not in first)]
            best = min(best, Placement(experts[order], len(load), 2).even_load(np.array(load)).max())
    ours = place_experts(np.array(load), num_slots, 2).even_load(np.array(load)).max()
    assert best - 1e-9 <= ours <= best * 7 / 6 + 1e-9  # Graham's bound for the longest first: 4/3 - 1/3m


@given(jobs(), st.integers(0, 2**31))
def test_keeping_moves_little_and_is_about_as_good(job, seed):
    load, num_slots, num_ranks = job
    old = place_experts(load, num_slots, num_ranks)
    later = load * np.exp(0.3 * np.random.default_rng(seed).normal(size=len(load)))
    new, kept = place_experts(later, num_slots, num_ranks), place_experts(later, num_slots, num_ranks, keep=old)
    limit = new.even_load(later).max() * (1 + KEEP_SLACK)
    assert kept.even_load(later).max() <= limit * (1 + 1e-9)
    moves = kept.moves_from(old)
    assert len(moves) <= num_slots
    slots = old.experts_P.copy()
    for move in moves:
        assert old.experts_P[move.source] == move.expert
        slots[move.slot] = move.expert
    np.testing.assert_array_equal(slots, kept.experts_P)
    if old.even_load(later).max() <= limit and room(old.experts_P, later, num_ranks) >= room(
        new.experts_P, later, num_ranks
    ):
        assert not moves


@pytest.mark.parametrize(("name", "load", "num_slots", "num_ranks"), FIXTURES, ids=[case[0] for case in FIXTURES])
def test_fixture(name, load, num_slots, num_ranks):
    theirs = Placement(eplb(load, num_slots, num_ranks), len(load), num_ranks).even_load(load).max()
    assert place_experts(load, num_slots, num_ranks).even_load(load).max() <= theirs * (1 + 1e-6)


def test_our_eplb_reproduces_its_published_example():
    # github.com/deepseek-ai/EPLB, README: 12 experts in 4 groups, 16 slots, 2 nodes, 8 ranks.
    load = [
        [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
        [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
    ]
    assert [eplb(np.array(layer), 16, 8, groups=4, nodes=2).tolist() for layer in load] == [
        [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
        [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
    ]


def brute_room(placement: Placement, load: np.ndarray) -> float:
    """The definition, set by set."""
    ranks = [
        set(np.flatnonzero(row) // placement.slots_per_rank)
        for row in np.equal.outer(range(len(load)), placement.experts_P)
    ]
    found = [np.inf]
    for size in range(1, placement.num_ranks):
        for members in combinations(range(placement.num_ranks), size):
            inside = load[[expert for expert in range(len(load)) if ranks[expert] <= set(members)]]
            if inside.any():
                found.append((load.sum() * size / placement.num_ranks - inside.sum()) / np.sqrt((inside**2).sum()))
    return min(found)


@given(jobs())
def test_room_is_what_the_tightest_set_of_ranks_has(job):
    load, num_slots, num_ranks = job
    load = load.round(2)
    placement = place_experts(load, num_slots, num_ranks)
    np.testing.assert_allclose(room(placement.experts_P, load, num_ranks), brute_room(placement, load), atol=1e-6)


def test_replicas_keep_ranks_even_while_loads_drift():
    batches = list(drifting(experts=128, pairs=32_768, drift=0.15, sigma=1.0, batches=12, seed=5))
    for before, now in pairwise(batches):
        placement = place_experts(before, 144, 8)
        assert placement.level_load(now).max() * 8 <= 1.02 * now.sum()


@pytest.mark.parametrize(
    ("load", "num_slots", "num_ranks", "message"),
    [
        ([1.0, -1], 2, 1, "loads must be finite and >= 0, got -1.0 to 1.0"),
        ([1.0, np.nan], 2, 1, "loads must be finite"),
        ([1.0, 2, 3], 2, 1, "2 slots must be a multiple of the 1 ranks and at least the 3 experts"),
        ([1.0, 2, 3], 4, 3, "4 slots must be a multiple of the 3 ranks"),
        ([1.0, 2, 3], 4, 0, "the 0 ranks"),
    ],
)
def test_wrong_input_is_one_clear_error(load, num_slots, num_ranks, message):
    with pytest.raises(ValueError, match=message):
        place_experts(np.array(load), num_slots, num_ranks)


def test_a_placement_that_can_not_be_is_refused():
    with pytest.raises(ValueError, match=r"every expert of 0\.\.2 needs a slot"):
        Placement(np.array([0, 1, 1]), 3, 1)
    with pytest.raises(ValueError, match="3 slots do not divide into 2 ranks"):
        Placement(np.array([0, 1, 2]), 3, 2)
    old = Placement.contiguous(4, 2)
    with pytest.raises(ValueError, match="the placement to keep is of other experts"):
        place_experts(np.ones(4), 6, 2, keep=old)
