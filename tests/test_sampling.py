"""Oracles: scipy's softmax and chi-square, and a walk along the distribution token by token."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special, stats

from headrace.actors.philox import Stream, uniforms
from headrace.actors.rollout.sampling import sample


def drawn(logits, temperature, u):
    logits = torch.tensor(logits, dtype=torch.float32).reshape(len(u), -1)
    tokens, logprobs = sample(logits, torch.full((len(u),), float(temperature)), torch.tensor(u, dtype=torch.float64))
    assert tokens.dtype == torch.int64 and logprobs.dtype == torch.float32
    return tokens.numpy(), logprobs.numpy()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_follow_the_distribution(temperature):
    logits = np.random.default_rng(0).normal(size=12) * 1.5
    u = uniforms(1, Stream.SAMPLING, np.arange(20_000), 0, 1)[:, 0]
    tokens, logprobs = drawn(np.tile(logits, (len(u), 1)), temperature, u)
    expected = special.softmax(logits / temperature)
    assert stats.chisquare(np.bincount(tokens, minlength=12), len(u) * expected).pvalue > 1e-3
    assert logprobs == pytest.approx(np.log(expected)[tokens], abs=1e-5)


logit_rows = st.lists(st.floats(-30, 30) | st.just(-math.inf), min_size=1, max_size=9).filter(lambda x: max(x) > -30)


@given(logit_rows, st.floats(0.1, 3), st.floats(1e-9, 1 - 1e-9))
@settings(deadline=None)
def test_the_token_is_where_the_cumulative_distribution_passes_the_number(logits, temperature, u):
    (token,), (logprob,) = drawn([logits], temperature, [u])
    probabilities = special.softmax(np.array(logits) / temperature)
    below, upto = probabilities[:token].sum(), probabilities[: token + 1].sum()
    assert below - 1e-6 <= u <= upto + 1e-6
    assert logits[token] > -math.inf
    assert logprob == pytest.approx(math.log(max(probabilities[token], 1e-45)), abs=1e-3)


@pytest.mark.parametrize("u", [2.0**-33, 1 - 2.0**-33])
def test_the_extreme_numbers_never_pick_the_impossible(u):
    (token,), _ = drawn([[-math.inf, 0.0, -1.0, -math.inf]], 1, [u])
    assert token == (1 if u < 0.5 else 2)


def test_greedy_rows_beside_sampled_ones():
    logits = np.random.default_rng(1).normal(size=(6, 20)).astype(np.float32)
    temperatures = torch.tensor([0.0, 1.0, 0.0, 0.7, 0.0, 1.0])
    u = torch.full((6,), 0.3, dtype=torch.float64)
    tokens, logprobs = sample(torch.tensor(logits), temperatures, u)
    for row in range(6):
        temperature = float(temperatures[row])
        alone = drawn(logits[row : row + 1], temperature, [0.3])
        assert tokens[row] == alone[0] and logprobs[row] == pytest.approx(alone[1][0], abs=1e-6)
        if temperature == 0:
            assert tokens[row] == logits[row].argmax()
            assert logprobs[row] == pytest.approx(special.log_softmax(logits[row])[tokens[row]], abs=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_logits_show_in_the_log_probabilities(bad):
    _, logprobs = drawn([[0.0, bad, 1.0], [0.0, 1.0, 2.0]], 1, [0.5, 0.5])
    assert np.isnan(logprobs[0]) and np.isfinite(logprobs[1])
