"""Log-probabilities of tokens, and drawing tokens: plain torch.

    logits_NV, tokens_N --token_logprob--> logprobs_N, entropies_N      logits_NV --sample_logprob--> tokens_N, ...

N rows, V tokens of the vocabulary. Nothing depends on the other rows of a batch. Knows nothing of models or responses.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

LANES = 512
"""A row is dealt out to so many lanes, eight neighbouring tokens at a time."""
CHUNK = 8
_MASK = 0xFFFFFFFF


class TokenLogprobs(NamedTuple):
    """What softmax(logits / temperature) says of N tokens; float32, float64 of such logits."""

    logprobs_N: Tensor
    """Never above 0; differentiable."""
    entropies_N: Tensor
    """In nats; differentiable."""
    best_N: Tensor
    """int64: the likeliest token, of equals the lowest."""


class Sample(NamedTuple):
    """N drawn tokens, and the distributions that they were drawn from."""

    tokens_N: Tensor
    """int64"""
    logprobs_N: Tensor
    """float32, at the sampling temperature; at 1 where it is 0."""
    entropies_N: Tensor
    """float32, in nats, likewise."""


def token_logprob(logits_NV: Tensor, tokens_N: Tensor, *, temperature: float = 1.0) -> TokenLogprobs:
    """Log-probability of each token and entropy of its row. A logit of -inf is a token that can't be; a row with NaN or
    +inf gives NaN."""
    wide_NV = logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()
    scaled_NV = wide_NV * (1.0 / temperature)
    logprobs_NV = torch.log_softmax(scaled_NV, dim=-1)
    return TokenLogprobs(
        logprobs_NV.gather(1, tokens_N.unsqueeze(1)).squeeze(1), _entropies(logprobs_NV), _best(scaled_NV.detach())
    )


def sample_logprob(
    logits_NV: Tensor, temperatures_N: Tensor, *, seed: int, ordinals_N: Tensor, steps_N: Tensor
) -> Sample:
    """Draws a token from softmax(logits / temperature) of each row; temperature 0 takes the likeliest.

    Gumbel's maximum, twice: first of the lanes, by the log of their mass, then of the tokens of that lane, by their
    logit. The numbers come from Philox, by `seed` (64 bits), a row's ordinal (64 bits) and step (32 bits), and by lane
    or token; see kernels/cuda/sample_logprob.cu. A row with NaN or +inf, or a temperature that is negative or NaN,
    gives NaN; the token beside it means nothing.
    """
    num_rows, vocabulary = logits_NV.shape
    greedy_N = temperatures_N == 0
    inverse_N = torch.where(greedy_N, 1.0, 1.0 / temperatures_N).masked_fill(temperatures_N < 0, torch.nan)
    scaled_NV = logits_NV.float() * inverse_N.unsqueeze(1)
    padding = -vocabulary % (LANES * CHUNK)
    padded_NV = torch.nn.functional.pad(scaled_NV, (0, padding), value=-torch.inf)
    lanes_NLX = padded_NV.reshape(num_rows, -1, LANES, CHUNK).transpose(1, 2).reshape(num_rows, LANES, -1)

    counters = (steps_N, ordinals_N & _MASK, (ordinals_N >> 32) & _MASK)
    lane_noise_NL = _gumbel(seed, torch.arange(LANES // 4, device=logits_NV.device), counters)
    lane_N = _best(lanes_NLX.logsumexp(-1) + lane_noise_NL)
    in_lane_NX = lanes_NLX.gather(1, lane_N[:, None, None].expand(-1, 1, lanes_NLX.shape[2])).squeeze(1)
    within_X = torch.arange(in_lane_NX.shape[1], device=logits_NV.device)
    tokens_NX = (within_X // CHUNK * LANES + lane_N[:, None]) * CHUNK + within_X % CHUNK
    noise_NX = _gumbel(seed, LANES // 4 + tokens_NX[:, ::4] // 4, counters)
    drawn_N = tokens_NX.gather(1, _best(in_lane_NX + noise_NX)[:, None]).squeeze(1)

    logprobs_NV = torch.log_softmax(scaled_NV, dim=-1)
    tokens_N = torch.where(greedy_N, _best(scaled_NV), drawn_N).clamp_(max=vocabulary - 1)
    return Sample(tokens_N, logprobs_NV.gather(1, tokens_N.unsqueeze(1)).squeeze(1), _entropies(logprobs_NV))


def philox4x32(counter: tuple[Tensor, ...], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Philox4x32-10 (Salmon, Moraes, Dror, Shaw, SC 2011, section 3.3): four words of 32 bits for each counter of four.

    All words are int64 tensors, which hold 0 to 2**32 - 1.
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    k0, k1 = key
    for _ in range(10):
        (high0, low0), (high1, low1) = _product(0xD2511F53, c0), _product(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return c0, c1, c2, c3


def _product(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low word of a * b, in two halves, for int64 has no room for it."""
    low = a * (b & 0xFFFF)
    high = a * (b >> 16) + (low >> 16)
    return high >> 16, (high & 0xFFFF) << 16 | (low & 0xFFFF)


def _gumbel(seed: int, blocks: Tensor, counters: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Four Gumbel variates for each block [B] or [N, B] of each row: float32 [N, 4 B]."""
    step_N, low_N, high_N = (word.unsqueeze(1) for word in counters)
    words = philox4x32((blocks, step_N & _MASK, low_N, high_N), (seed & _MASK, seed >> 32 & _MASK))
    words_NX = torch.stack(words, dim=-1).flatten(1)
    uniforms_NX = (words_NX.float() * 2.0**-32 + 2.0**-33).clamp_(max=1 - 2.0**-24)
    return -(-torch.log1p(-uniforms_NX)).log()


def _best(scores: Tensor) -> Tensor:
    """Index of the largest along the last dimension, of equals the lowest."""
    return (scores == scores.amax(dim=-1, keepdim=True)).byte().argmax(dim=-1)


def _entropies(logprobs_NV: Tensor) -> Tensor:
    # A forbidden token has p = 0 and log p = -inf, and adds nothing.
    return -(logprobs_NV.exp() * logprobs_NV.masked_fill(logprobs_NV == -torch.inf, 0.0)).sum(dim=-1)
