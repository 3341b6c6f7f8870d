"""Redirecting what is beyond an expert's capacity: against plain loops, and the kernels on the CPU."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from shim import KernelFault, ShimBackend, needs_shim

from headrace.kernels import capacity, launch
from headrace.kernels.build import SOURCES
from headrace.kernels.capacity import ACCEPT, capacity_redirect

SCHEDULES = (0, 1, 2)

Case = tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Few distinct scores, NaN and infinities among them; all kinds of capacity; some pairs without an expert."""
    num_tokens, num_experts = draw(st.integers(0, 24)), draw(st.integers(1, 40) | st.integers(1, 6))
    k, rounds = draw(st.integers(1, min(4, num_experts))), draw(st.integers(0, 4))
    random = np.random.default_rng(draw(st.integers(0, 2**31)))
    scores = np.round(random.normal(size=(num_tokens, num_experts)) * draw(st.sampled_from([0.5, 2, 100]))) / 2
    scores += np.linspace(0, draw(st.sampled_from([0.0, 5.0])), num_experts)
    if draw(st.booleans()):
        odd = random.random(scores.shape) < 0.2
        scores[odd] = random.choice([np.nan, np.inf, -np.inf, -0.0, 1e-45], odd.sum())
    ids = np.argsort(-np.nan_to_num(scores), axis=1, kind="stable")[:, :k].copy()
    ids[random.random(ids.shape) < draw(st.sampled_from([0.0, 0.1]))] = -1
    fair = num_tokens * k // num_experts + 1
    capacities = random.integers(0, draw(st.sampled_from([1, fair + 1, 2 * fair + 1])), num_experts, endpoint=True)
    index = draw(st.sampled_from([torch.int32, torch.int64]))
    return torch.from_numpy(ids).to(index), torch.tensor(scores, dtype=torch.float32), torch.tensor(capacities), rounds


def by_loops(ids: list[list[int]], scores: list[list[float]], capacities: list[int], rounds: int) -> list[list[int]]:
    """The definition, pair by pair."""

    def value(token: int, expert: int) -> float:
        return -np.inf if np.isnan(scores[token][expert]) else scores[token][expert]

    held = [[-1] * len(row) for row in ids]
    room = list(capacities)
    asks = {(t, c): e for t, row in enumerate(ids) for c, e in enumerate(row) if e >= 0}
    for round_ in range(rounds + 1):
        if round_:
            asks = {}
            for t, row in enumerate(ids):
                taken = set(held[t])
                for c in range(len(row)):
                    free = [e for e in range(len(room)) if room[e] > 0 and e not in taken]
                    if row[c] >= 0 and held[t][c] < 0 and free:
                        asks[t, c] = min(free, key=lambda e: (-value(t, e), e))
                        taken.add(asks[t, c])
        for expert in range(len(room)):
            mine = sorted((pair for pair in asks if asks[pair] == expert), key=lambda p: (-value(p[0], expert), p))
            for t, c in mine[: room[expert]]:
                held[t][c] = expert
            room[expert] -= min(room[expert], len(mine))
    return held


@settings(max_examples=300)
@given(cases())
def test_the_reference_is_the_rule_written_as_loops(case):
    ids, scores, capacities, rounds = case
    result = capacity_redirect(ids, scores, capacities, rounds=rounds)
    assert result.ids_TK.tolist() == by_loops(ids.tolist(), scores.tolist(), capacities.tolist(), rounds)
    kept = result.ids_TK[result.ids_TK >= 0].long()
    assert result.load_E.tolist() == torch.bincount(kept, minlength=len(capacities)).tolist()
    assert (result.load_E <= capacities).all()
    assert result.num_dropped == (ids >= 0).sum() - len(kept)
    for row in result.ids_TK.tolist():
        experts = [e for e in row if e >= 0]
        assert len(set(experts)) == len(experts)


@given(cases())
def test_nothing_moves_where_there_is_room(case):
    ids, scores, _, rounds = case
    result = capacity_redirect(ids, scores, torch.full((scores.shape[1],), ids.numel()), rounds=rounds)
    assert result.ids_TK.equal(ids) and result.num_dropped == 0


def same(case: Case, expected: capacity.Redirect, seed: int, *, races: bool = False) -> bool:
    ids, scores, capacities, rounds = case
    with launch.backend(ShimBackend(seed=seed, races=races)):
        result = capacity_redirect(ids, scores, capacities, rounds=rounds)
    return all(a.equal(b) for a, b in zip(result, expected, strict=True))


@needs_shim
@pytest.mark.slow
@settings(max_examples=1000, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(cases())
def test_the_kernels_give_the_same_integers_under_every_schedule(case):
    ids, scores, capacities, rounds = case
    expected = capacity_redirect(ids, scores, capacities, rounds=rounds)
    with launch.picking(lambda spec, situation: {**spec.configs[0], "BLOCK": 32}):  # Fewer threads take less time.
        assert all(same(case, expected, seed) for seed in SCHEDULES)


def large(seed: int) -> Case:
    """More rows than threads for every expert; few distinct scores."""
    random = torch.Generator().manual_seed(seed)
    scores = (torch.randn(700, 5, generator=random) * 40).round() / 8
    return scores.topk(3).indices, scores, torch.tensor([420, 300, 0, 500, 407]), 3


@needs_shim
@pytest.mark.parametrize("block", [256, 128, 1024])
def test_every_configuration_with_more_rows_than_threads(block):
    case = large(block)
    expected = capacity_redirect(*case[:3], rounds=case[3])
    with launch.picking(lambda spec, _: {"BLOCK": block} if spec.source == ACCEPT.source else spec.configs[0]):
        assert same(case, expected, seed=block)


@needs_shim
@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("count[i] = 0;\n      __syncthreads();", "count[i] = 0;"),
        ("above = passed;\n      }\n      __syncthreads();", "above = passed;\n      }"),
        ("atomicAdd(&count[number >> shift & 255], 1)", "count[number >> shift & 255] += 1"),
        ("seen + place <= left", "place <= left"),
        ("score + 0.0f", "score"),
        ("left -= above", "above = 0"),
    ],
)
def test_a_planted_fault_is_seen(right, wrong, tmp_path, monkeypatch):
    source = (SOURCES / ACCEPT.source).read_text()
    assert right in source
    (tmp_path / ACCEPT.source).write_text(source.replace(right, wrong))
    case = large(0)
    case[1][:, 1] = torch.where(torch.arange(700) % 3 == 0, -0.0, 0.0)
    expected = capacity_redirect(*case[:3], rounds=case[3])
    monkeypatch.setattr(capacity, "ACCEPT", replace(ACCEPT, source=str(tmp_path / ACCEPT.source)))
    seen = 0
    for seed in range(1, 3):
        try:
            seen += not same(case, expected, seed, races=True)
        except KernelFault:
            seen += 1
    assert seen


@needs_shim
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_offsets_of_more_than_2_to_the_31_scores(index):
    num_tokens, num_experts = 2**31 // 4096 + 8, 4096
    scores = torch.empty(num_tokens, num_experts)  # Of its 8 GiB only the last rows are ever touched.
    scores[-8:] = torch.arange(8 * num_experts).reshape(8, -1) % 1000
    wanted = torch.zeros(num_tokens, 1, dtype=index)
    capacities, load = torch.ones(num_experts, dtype=torch.int64), torch.zeros(num_experts, dtype=torch.int64)
    with launch.backend(ShimBackend(seed=1, only_blocks=lambda blocks: [blocks - 1])):
        asked = capacity._propose(wanted, torch.full_like(wanted, -1), scores, capacities, load)
        assert asked[-8:, 0].tolist() == scores[-8:].argmax(1).tolist()
        ids = torch.full_like(wanted, -1)
        pairs, ends = torch.arange(num_tokens - 8, num_tokens, dtype=index), torch.zeros(num_experts, dtype=torch.int32)
        ends[-1] = 8
        scores[-8:, -1] = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6])
        args = (scores, pairs, ends, capacities * 3, load, ids, num_experts, 1)
        launch.launch(ACCEPT, num_experts, 256, args, device_of=ids, variant={"INDEX": capacity.INDEX[index]})
    assert torch.nonzero(ids[:, 0] == num_experts - 1)[:, 0].tolist() == [
        num_tokens - 4,
        num_tokens - 3,
        num_tokens - 1,
    ]
    assert load[-1] == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": torch.zeros(4, 2)}, "ids_TK must be int32 or int64, not float32"),
        ({"scores": torch.zeros(4, 3, dtype=torch.float64)}, "scores_TE must be float32, not float64"),
        ({"scores": torch.zeros(3, 4).t()}, "scores_TE must be contiguous; shape (4, 3) has strides (1, 4)"),
        ({"capacities": torch.ones(2, dtype=torch.int64)}, "capacity_E must have the shape [3], not [2]"),
        ({"ids": torch.zeros(4, 5, dtype=torch.int64)}, "k must be from 1 to 3, not 5"),
        ({"rounds": -1}, "rounds must be from 0 to 64, not -1"),
    ],
)
def test_wrong_input_is_one_clear_error(change, message):
    case = {
        "ids": torch.zeros(4, 2, dtype=torch.int64), "scores": torch.zeros(4, 3),
        "capacities": torch.ones(3, dtype=torch.int64), "rounds": 2,
    } | change  # fmt: skip
    with pytest.raises(ValueError, match=re.escape(f"capacity_redirect: {message}")):
        capacity_redirect(case["ids"], case["scores"], case["capacities"], rounds=case["rounds"])
