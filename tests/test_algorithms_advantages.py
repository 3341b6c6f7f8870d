"""Advantages against golden vectors, a brute force from the definitions, and what must hold of any of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from algorithm_batches import group
from hypothesis import given
from hypothesis import strategies as st

from headrace.actors.algorithms import (
    Batch,
    adaptive_lambda,
    advantages,
    gae,
    group_advantages,
    returns_to_go,
    whiten,
)

CASES = Path(__file__).parents[1].parent / "shared" / "data" / "gae_golden" / "cases.json"

floats = st.floats(-3, 3, width=32)


def golden() -> list[dict[str, Any]]:
    if not CASES.exists():
        pytest.skip("../shared/data/gae_golden is not on this machine")
    cases: list[dict[str, Any]] = json.loads(CASES.read_text())
    for case in cases:  # The longest leaves out its rewards: zero but for the last.
        case["rewards"] = case["rewards"] or [0.0] * (case["L"] - 1) + [case["reward_last"]]
    return cases


def test_the_golden_vectors() -> None:
    cases = golden()
    assert {case["L"] for case in cases} >= {1, 5, 20, 21, 40, 100, 1000}
    for case in cases:
        rewards, values = [np.array(case["rewards"])], [np.array(case["values"])]
        lambdas = adaptive_lambda(np.array([case["L"]]), case["alpha"])
        assert lambdas[0] == pytest.approx(case["lambda_policy"], abs=1e-12)
        (advantage,) = gae(rewards, values, lambdas, gamma=case["gamma"])
        np.testing.assert_allclose(advantage, case["adv_policy"], atol=1e-5)
        (target,) = gae(rewards, values, 1.0, gamma=case["gamma"])
        np.testing.assert_allclose(target + values[0], case["value_target"], atol=1e-5)
        np.testing.assert_allclose(returns_to_go(rewards)[0], case["value_target"], atol=1e-6)


def test_the_golden_vectors_all_at_once() -> None:
    cases = golden()
    rewards, values = ([np.array(case[key]) for case in cases] for key in ("rewards", "values"))
    together = gae(rewards, values, adaptive_lambda(np.array([case["L"] for case in cases]), 0.05))
    for case, advantage in zip(cases, together, strict=True):
        np.testing.assert_allclose(advantage, case["adv_policy"], atol=1e-5)


def by_definition(rewards: np.ndarray, values: np.ndarray, own: np.ndarray, lambda_: float, gamma: float) -> np.ndarray:
    """A_t = sum over k of (gamma lambda)^k delta_{t+k}, over the policy's own tokens alone; the others have what the
    next own token has."""
    at = np.flatnonzero(own)
    v = np.append(values[at], 0.0)
    delta = rewards[at] + gamma * v[1:] - v[:-1]
    sums = [sum((gamma * lambda_) ** k * d for k, d in enumerate(delta[i:])) for i in range(len(at))]
    result = np.zeros(len(rewards))
    for t in range(len(rewards)):
        later = np.flatnonzero(at >= t)
        result[t] = sums[later[0]] if len(later) else 0.0
    return result


@given(st.lists(st.integers(1, 12), min_size=1, max_size=6), st.floats(0, 1), st.floats(0.5, 1), st.data())
def test_gae_is_its_definition(lengths: list[int], lambda_: float, gamma: float, data: st.DataObject) -> None:
    random = np.random.default_rng(data.draw(st.integers(0, 1000)))
    rewards, values = ([random.normal(size=n) for n in lengths] for _ in range(2))
    masks = [random.random(n) < 0.7 for n in lengths]
    lambdas = np.linspace(0, lambda_, len(lengths))
    whole = [np.ones(n, bool) for n in lengths]
    for own, result in (
        (whole, gae(rewards, values, lambdas, gamma=gamma)),
        (masks, gae(rewards, values, lambdas, gamma=gamma, masks=masks)),
    ):
        for r, v, m, lam, advantage in zip(rewards, values, own, lambdas, result, strict=True):
            np.testing.assert_allclose(advantage, by_definition(r, v, m, lam, gamma), atol=1e-5)
            assert advantage.dtype == np.float32 and len(advantage) == len(r)


def test_gae_does_not_depend_on_what_else_is_in_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    lengths = random.integers(1, 60, 40)
    rewards, values = ([random.normal(size=n) for n in lengths] for _ in range(2))
    together = gae(rewards, values, 0.9)
    monkeypatch.setattr(advantages, "_CHUNK_CELLS", 70)
    for one, chunked, r, v in zip(together, gae(rewards, values, 0.9), rewards, values, strict=True):
        np.testing.assert_array_equal(one, chunked)
        np.testing.assert_array_equal(one, gae([r], [v], 0.9)[0])


@pytest.mark.parametrize(
    ("length", "expected"),
    [(1, 0), (5, 0), (20, 0), (21, 1 / 21), (40, 0.5), (100, 0.8), (400, 0.95), (1000, 0.98), (20480, 0.9990234375)],
)
def test_lambda_grows_with_the_length_and_is_never_negative(length: int, expected: float) -> None:
    assert adaptive_lambda(np.array([length]), 0.05)[0] == pytest.approx(expected, abs=1e-9)


def test_the_weights_of_the_adaptive_lambda_add_up_to_a_share_of_the_length() -> None:
    for length in (100, 2000):
        lambda_ = adaptive_lambda(np.array([length]), 0.05)[0]
        assert sum(lambda_**k for k in range(100 * length)) == pytest.approx(0.05 * length, rel=1e-6)


@given(st.lists(st.lists(floats, min_size=1, max_size=8), min_size=1, max_size=5))
def test_whitened_numbers_have_mean_zero_and_deviation_one(rows: list[list[float]]) -> None:
    arrays = [np.array(row, np.float32) for row in rows]
    flat = np.concatenate(whiten(arrays))
    if np.concatenate(arrays).astype(np.float64).std() > 1e-3:
        assert flat.mean() == pytest.approx(0, abs=1e-3) and flat.std() == pytest.approx(1, abs=1e-3)
    assert np.isfinite(flat).all() and [len(row) for row in whiten(arrays)] == [len(row) for row in rows]


def test_group_advantages_are_of_each_group_alone() -> None:
    batch = Batch([group([1, -1, -1, -1], ordinal=0), group([1, 1], ordinal=1), group([0.5, -0.5, 0.0], ordinal=2)])
    third = 3**-0.5
    np.testing.assert_allclose(
        group_advantages(batch), [3 * third, -third, -third, -third, 0, 0, 1.5**0.5, -(1.5**0.5), 0], atol=1e-6
    )


def test_a_batch_of_equal_rewards_is_refused_and_names_its_samples() -> None:
    batch = Batch([group([1, 1], ordinal=7), group([-1, -1], ordinal=9)])
    with pytest.raises(ValueError, match=r"all rewards are equal .* \(from prompt 7, member 0 to prompt 9, member 1\)"):
        group_advantages(batch)
