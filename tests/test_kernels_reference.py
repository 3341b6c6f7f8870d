"""Token balancing against plain loops, and its gradients against finite differences."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headrace.kernels.reference import align, expert_load, permute, topk_gate, unpermute

choices = st.integers(1, 6).flatmap(
    lambda experts: st.tuples(
        st.just(experts),
        st.integers(1, experts).flatmap(
            lambda k: st.lists(
                st.permutations(range(experts)).map(lambda order: list(order[:k])), min_size=0, max_size=12
            ).map(lambda ids: torch.tensor(ids, dtype=torch.int64).reshape(-1, k))
        ),
    )
)


@pytest.mark.parametrize("renormalize", [True, False])
def test_gate_is_softmax_then_the_best_k(renormalize: bool) -> None:
    logits = torch.randn(50, 7, generator=torch.Generator().manual_seed(0))
    gate = topk_gate(logits, 3, renormalize=renormalize)
    for row, ids, weights in zip(logits.double().numpy(), gate.ids_TK, gate.weights_TK, strict=True):
        probs = np.exp(row) / np.exp(row).sum()
        best = sorted(range(7), key=lambda e: -row[e])[:3]
        assert ids.tolist() == best
        expected = probs[best] / (probs[best].sum() if renormalize else 1)
        np.testing.assert_allclose(weights, expected, rtol=1e-5)
    torch.testing.assert_close(gate.probs_TE, logits.softmax(-1))


def test_equal_scores_go_to_the_lower_id() -> None:
    logits = torch.tensor([[1.0, 2, 2, 2, 1, 2], [0, 0, 0, 0, 0, 0]])
    assert topk_gate(logits, 3, renormalize=True).ids_TK.tolist() == [[1, 2, 3], [0, 1, 2]]


@given(choices)
def test_rows_are_sorted_by_expert_and_stay_in_token_order(case: tuple[int, torch.Tensor]) -> None:
    num_experts, ids = case
    flat = ids.flatten().tolist()
    rows = align(ids, num_experts)
    assert rows.pairs_N.tolist() == sorted(range(len(flat)), key=lambda pair: flat[pair])
    assert rows.load_E.tolist() == expert_load(ids, num_experts).tolist() == [flat.count(e) for e in range(num_experts)]
    assert rows.ends_E.tolist() == np.cumsum(rows.load_E.numpy()).tolist()
    assert rows.ends_E.dtype == torch.int32


@given(choices, st.integers(0, 99))
def test_unpermute_of_permute_is_the_weighted_sum(case: tuple[int, torch.Tensor], seed: int) -> None:
    num_experts, ids = case
    random = torch.Generator().manual_seed(seed)
    num_tokens, k = ids.shape
    x = torch.randn(num_tokens, 3, generator=random)
    weights = torch.rand(num_tokens, k, generator=random)
    scale = torch.arange(1.0, num_experts + 1)
    rows = align(ids, num_experts)
    permuted = permute(x, rows, k)
    expert_of_row = ids.flatten()[rows.pairs_N]
    result = unpermute(permuted * scale[expert_of_row].unsqueeze(1), rows, weights)
    expected = torch.zeros_like(x)
    for token in range(num_tokens):
        for choice in range(k):
            expected[token] += weights[token, choice] * scale[ids[token, choice]] * x[token]
    torch.testing.assert_close(result, expected)


def test_gradients_are_those_of_finite_differences() -> None:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(6, 3, generator=random, dtype=torch.float64, requires_grad=True)
    logits = torch.randn(6, 4, generator=random, dtype=torch.float64, requires_grad=True)

    def mixture(x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        gate = topk_gate(logits, 2, renormalize=True)
        rows = align(gate.ids_TK, 4)
        return unpermute(permute(x, rows, 2).sin(), rows, gate.weights_TK).sum(1) + gate.probs_TE.square().sum(1)

    assert torch.autograd.gradcheck(mixture, (x, logits))


def test_the_folder_refuses_to_be_the_top_level_package_kernels() -> None:
    root = Path(__file__).parent.parent
    code = f"import sys; sys.path.insert(0, {str(root)!r}); import kernels"
    result = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 1
    assert "import `headrace.kernels`" in result.stderr
