"""Splitting and dispatching pairs over replicas: against linear programming, plain loops; the kernels on the CPU."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from shim import KernelFault, ShimBackend, needs_shim

from headrace.kernels import launch, replicas
from headrace.kernels.build import SOURCES
from headrace.kernels.leveling import NO_SLOT, SWEEPS, even_split, level_split, pour, rank_load
from headrace.kernels.placement import Placement
from headrace.kernels.replicas import MOST_REPLICAS, SPLIT, replica_dispatch, replica_split
from headrace.kernels.routing import align

Ints = NDArray[np.int64]

SCHEDULES = (0, 1, 2)


@st.composite
def placements(draw: st.DrawFn, most_ranks: int = 6) -> Placement:
    """Any at all: replicas may share a rank, an expert may fill all of it."""
    num_experts, num_ranks = draw(st.integers(1, 12)), draw(st.integers(1, most_ranks))
    slots_per_rank = draw(st.integers(-(-num_experts // num_ranks), -(-num_experts // num_ranks) + 3))
    extra = num_ranks * slots_per_rank - num_experts
    hot = st.integers(0, num_experts - 1) if draw(st.booleans()) else st.just(0)
    experts = [*range(num_experts), *draw(st.lists(hot, min_size=extra, max_size=extra))]
    return Placement(np.array(draw(st.permutations(experts))), num_experts, num_ranks)


def counts_for(placement: Placement) -> st.SearchStrategy[Ints]:
    some = st.integers(0, 9) | st.integers(0, 2000) | st.just(0) | st.integers(2**33, 2**34)
    size = placement.num_experts
    return st.lists(some, min_size=size, max_size=size).map(lambda counts: np.array(counts, np.int64))


def shape(placement: Placement) -> dict[str, int]:
    return {"num_ranks": placement.num_ranks, "slots_per_rank": placement.slots_per_rank}


def optimum(placement: Placement, counts: Ints) -> float:
    """The lowest possible highest load, pairs divisible, by linear programming."""
    expert, slot = placement.experts_P, np.arange(len(placement.experts_P))
    num = len(slot)
    on_rank = np.equal.outer(np.arange(placement.num_ranks), slot // placement.slots_per_rank).astype(float)
    of_expert = np.equal.outer(np.arange(placement.num_experts), expert).astype(float)
    found = scipy.optimize.linprog(
        np.append(np.zeros(num), 1.0),
        A_ub=np.hstack((on_rank, -np.ones((len(on_rank), 1)))), b_ub=np.zeros(len(on_rank)),
        A_eq=np.hstack((of_expert, np.zeros((len(of_expert), 1)))), b_eq=counts,
    )  # fmt: skip
    return float(found.fun)


# The split -------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 30), min_size=1, max_size=5), st.integers(0, 60))
def test_pouring_fills_the_lowest_first(base, amount):
    heights = list(base)
    for _ in range(amount):
        heights[heights.index(min(heights))] += 1
    raised = pour(amount, np.array(base))
    assert raised.sum() == amount and (raised >= 0).all()
    assert sorted(base + raised) == sorted(heights)


@given(st.data())
def test_a_split_gives_away_every_pair_and_is_never_worse_than_the_even_one(data):
    placement = data.draw(placements())
    counts = data.draw(counts_for(placement))
    slots = placement.slots_ER
    even, quota = even_split(counts, slots), level_split(counts, slots, **shape(placement))
    for split in (even, quota):
        np.testing.assert_array_equal(split.sum(1), counts)
        assert (split >= 0).all() and not split[slots == NO_SLOT].any()
    assert rank_load(quota, slots, **shape(placement)).max() <= rank_load(even, slots, **shape(placement)).max()
    highest = [int(placement.level_load(counts, sweeps=sweeps).max()) for sweeps in range(6)]
    assert highest == sorted(highest, reverse=True)


@settings(max_examples=60)
@given(st.data())
def test_many_sweeps_come_to_the_optimum(data):
    placement = data.draw(placements())
    counts = data.draw(counts_for(placement))
    highest = placement.level_load(counts, sweeps=1000).max()
    best = optimum(placement, counts)
    # Whole pairs: a rank may be left with one more for each expert that it shares.
    assert best - 1e-6 * best - 1e-6 <= highest <= best * (1 + 1e-6) + placement.slots_per_rank


def test_the_definition_by_hand():
    # Expert 0 has 10 pairs and replicas on ranks 0 and 1; ranks 0 and 1 have 6 and 1 pairs of experts 1 and 2.
    placement = Placement(np.array([0, 1, 0, 2]), 3, 2)
    counts = np.array([10, 6, 1])
    assert level_split(counts, placement.slots_ER, **shape(placement)).tolist() == [[2, 8], [6, 0], [1, 0]]
    assert placement.level_load(counts).tolist() == [8, 9]
    assert placement.even_load(counts).tolist() == [11, 6]


# The kernels -----------------------------------------------------------------------------------------------------


@needs_shim
@pytest.mark.slow
@settings(max_examples=1000, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.data())
def test_the_split_kernel_gives_the_same_integers_under_every_schedule(data):
    placement = data.draw(
        placements(most_ranks=9).filter(lambda placement: placement.slots_ER.shape[1] <= MOST_REPLICAS)
    )
    layers = data.draw(st.lists(counts_for(placement), min_size=1, max_size=3))
    slots = torch.from_numpy(placement.slots_ER).expand(len(layers), -1, -1).contiguous()
    counts = torch.from_numpy(np.array(layers))
    sweeps = data.draw(st.integers(0, SWEEPS))
    expected = replica_split(counts, slots, **shape(placement), sweeps=sweeps)
    for seed in SCHEDULES:
        with launch.backend(ShimBackend(seed=seed)):
            assert replica_split(counts, slots, **shape(placement), sweeps=sweeps).equal(expected)


def dispatch_case(draw: st.DataObject) -> tuple[torch.Tensor, int, torch.Tensor, torch.Tensor]:
    placement = draw.draw(placements())
    num_tokens, k = draw.draw(st.integers(0, 40)), draw.draw(st.integers(1, min(4, placement.num_experts)))
    seed, skew = draw.draw(st.integers(0, 2**31)), draw.draw(st.sampled_from([0.0, 1.0, 50.0]))
    random = np.random.default_rng(seed)
    favour = skew * np.arange(placement.num_experts)
    ids = np.argsort(favour + random.gumbel(size=(num_tokens, placement.num_experts)))[:, ::-1][:, :k]
    counts = np.bincount(ids.reshape(-1), minlength=placement.num_experts)
    slots = placement.slots_ER
    quota = level_split(counts, slots, **shape(placement))
    return torch.from_numpy(ids.copy()), placement.num_experts, torch.from_numpy(slots), torch.from_numpy(quota)


@given(st.data())
def test_pairs_fill_the_replicas_in_token_order(data):
    ids, num_experts, slots, quota = dispatch_case(data)
    given_to = replica_dispatch(ids, align(ids, num_experts), slots, quota)
    left = quota.clone()
    for pair, expert in enumerate(ids.flatten().tolist()):
        replica = int((left[expert] > 0).int().argmax())
        left[expert, replica] -= 1
        assert given_to.flatten()[pair] == slots[expert, replica]
    assert not left.any()


@needs_shim
@pytest.mark.slow
@settings(max_examples=1000, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.data())
def test_the_dispatch_kernel_gives_the_same_slots_under_every_schedule(data):
    ids, num_experts, slots, quota = dispatch_case(data)
    if data.draw(st.booleans()):
        quota = quota // 2  # of another batch: the rest goes to the last replica
    ids = ids.to(data.draw(st.sampled_from([torch.int32, torch.int64])))
    if data.draw(st.booleans()):
        ids[::3] = -1
    rows = align(ids, num_experts)
    expected = replica_dispatch(ids, rows, slots, quota)
    for seed in SCHEDULES:
        with launch.backend(ShimBackend(seed=seed)):
            result = replica_dispatch(ids, rows, slots, quota)
        assert result.dtype == ids.dtype and result.equal(expected)


@needs_shim
@pytest.mark.parametrize("block", [config["BLOCK"] for config in SPLIT.configs])
def test_every_configuration_and_a_full_warp_of_replicas(block):
    random = np.random.default_rng(block)
    placement = Placement(np.append(np.arange(40), np.repeat([0, 1, 2, 3], 30)), 40, 32)
    counts = torch.from_numpy(random.integers(0, 5000, (2, 40)))
    slots = torch.from_numpy(placement.slots_ER).expand(2, -1, -1).contiguous()
    expected = replica_split(counts, slots, **shape(placement))
    with launch.backend(ShimBackend(seed=5)), launch.picking(lambda spec, situation: {"BLOCK": block}):
        assert replica_split(counts, slots, **shape(placement)).equal(expected)


@needs_shim
@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("load[g] = 0;\n  __syncthreads();", "load[g] = 0;"),
        ("__match_any_sync(FULL_MASK, rank)", "__match_any_sync(0xffffu, rank)"),
        ("i <= lane", "i < lane"),
        ("(place <= filled - level * num_wet)", "0"),
        ("long long below = 0", "int below = 0"),
        ("slots_per_rank, load);\n  __syncthreads();", "slots_per_rank, load);"),
        ("atomicAdd(&load[rank], (unsigned long long)mine)", "load[rank] = load[rank] + mine"),
    ],
)
def test_a_planted_fault_is_seen(right, wrong, tmp_path, monkeypatch):
    source = (SOURCES / SPLIT.source).read_text()
    assert right in source
    (tmp_path / SPLIT.source).write_text(source.replace(right, wrong))
    experts = np.append(np.arange(140), np.repeat([0, 1, 2, 3], 5))
    placement = Placement(np.random.default_rng(0).permutation(experts), 140, 8)
    counts = (140 - torch.arange(140)).unsqueeze(0) ** 6 + 1
    slots = torch.from_numpy(placement.slots_ER).unsqueeze(0)
    expected = replica_split(counts, slots, **shape(placement))
    monkeypatch.setattr(replicas, "SPLIT", replace(SPLIT, source=str(tmp_path / SPLIT.source)))
    seen = 0
    for seed in range(1, 4):
        with launch.backend(ShimBackend(seed=seed, races=True)):
            try:
                seen += not replica_split(counts, slots, **shape(placement)).equal(expected)
            except KernelFault:
                seen += 1
    assert seen


# Wrong input -----------------------------------------------------------------------------------------------------


SLOTS = torch.tensor([[[0, 2], [1, -1], [3, -1]]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"counts": torch.tensor([[1, 2, 3]], dtype=torch.int32)}, "counts_LE must be int64, not int32"),
        ({"counts": torch.tensor([[1, 2]])}, r"slots_LER must have the shape \[1, 2, any\], not \[1, 3, 2\]"),
        ({"counts": torch.tensor([1, 2, 3])}, r"counts_LE must have the shape"),
        ({"counts": torch.zeros(3, 1, dtype=torch.int64).expand(3, 3)[:1, ::2], "slots": SLOTS[:, :2]}, "contiguous"),
        ({"num_ranks": 0}, "num_ranks must be from 1 to 1024, not 0"),
        ({"slots": SLOTS.repeat(1, 1, 17)}, "the number of replicas must be from 1 to 32, not 34"),
        (
            {"slots": SLOTS.repeat(1, 2000, 1), "counts": torch.zeros(1, 6000, dtype=torch.int64)},
            "experts must be from",
        ),
    ],
)
def test_wrong_input_of_the_split_is_one_clear_error(change, message):
    given_ = {"counts": torch.tensor([[1, 2, 3]]), "slots": SLOTS, "num_ranks": 2} | change
    with pytest.raises(ValueError, match=f"^replica_split: .*{message}"):
        replica_split(given_["counts"], given_["slots"], num_ranks=given_["num_ranks"], slots_per_rank=2)


def test_wrong_input_of_the_dispatch_is_one_clear_error():
    ids, quota = torch.tensor([[0], [1]]), torch.ones(3, 2, dtype=torch.int64)
    rows = align(ids, 3)
    with pytest.raises(ValueError, match="ids_TK must be int32 or int64, not float32"):
        replica_dispatch(ids.float(), rows, SLOTS[0], quota)
    with pytest.raises(ValueError, match=re.escape("quota_ER must have the shape [3, 2], not [2, 2]")):
        replica_dispatch(ids, rows, SLOTS[0], quota[:2])
    with pytest.raises(ValueError, match=re.escape("rows.pairs_N must have the shape [1], not [2]")):
        replica_dispatch(ids[:1], rows, SLOTS[0], quota)
