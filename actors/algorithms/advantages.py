"""What a response, or each of its tokens, is worth. Pure numpy; knows nothing of models or losses.

A response is an array with a number per token. Many of them are lists of such arrays, of different lengths.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from .batch import Batch, Tokens

_MIN_STD = 1e-6
_CHUNK_CELLS = 1 << 22
"""Cells of the padded table that `gae` works on at a time."""


def standard_scores(rewards: np.ndarray) -> np.ndarray:
    """(R_i - mean(R)) / std(R) over the responses of one group: float32 [n] -> float32 [n].

    DAPO (arXiv 2503.14476) eq. 9. The deviation is that of the group itself (divided by n). Equal rewards give zeros.
    """
    centred = rewards - rewards.mean(dtype=np.float64)
    std = rewards.std(dtype=np.float64)
    return np.asarray(centred / std if std > _MIN_STD else np.zeros(len(rewards)), np.float32)


def group_advantages(batch: Batch) -> np.ndarray:
    """Standard scores of the rewards within each group: float32 [R].

    Raises ValueError if no group of the batch has two different rewards, so that nothing could be learned from it.
    """
    groups = np.split(batch.rewards, np.cumsum(batch.group_sizes)[:-1])
    scores = np.concatenate([standard_scores(group) for group in groups if len(group)])
    if not scores.any():
        raise ValueError(
            f"all rewards are equal in each of {len(groups)} groups (from {batch.name(0)} to "
            f"{batch.name(len(batch) - 1)}): an update would learn nothing; look at the verifier, or filter such "
            "groups with dynamic sampling"
        )
    return scores


def adaptive_lambda(lengths: np.ndarray, alpha: float) -> np.ndarray:
    """1 - 1 / (alpha * l) for responses of l tokens, at least 0: float64 [R].

    VAPO (arXiv 2504.05118) eq. 5: the weights of the temporal differences add up to alpha * l. Up to l = 1 / alpha the
    formula is negative or zero; 0 stands for all of those.
    """
    return np.asarray(np.maximum(0.0, 1.0 - 1.0 / (alpha * np.asarray(lengths, np.float64))))


def gae(
    rewards: Sequence[np.ndarray],
    values: Sequence[np.ndarray],
    lambdas: float | np.ndarray,
    *,
    gamma: float = 1.0,
    masks: Sequence[np.ndarray] | None = None,
) -> Tokens:
    """Generalized advantage estimation (arXiv 1506.02438) over R responses.

        delta_t = r_t + gamma V_{t+1} - V_t,   A_t = delta_t + gamma lambda A_{t+1};   after the last token both are 0

    `rewards` and `values` are R arrays [n]; `values[t]` is that of the state before token t. `lambdas` is one number or
    [R]. Where a mask [n] is 0, a token is not the policy's (an observation): the value and the running sum of what
    comes after pass through it unchanged. Returns R float32 arrays [n], computed in float64.
    """
    decay = gamma * np.broadcast_to(np.asarray(lambdas, np.float64), (len(rewards),))
    own = [np.arange(len(row)) for row in rewards] if masks is None else [np.flatnonzero(mask) for mask in masks]
    result: Tokens = [np.zeros(len(row), np.float32) for row in rewards]
    for chunk in _chunks([len(at) for at in own]):
        table: np.ndarray = np.zeros((len(own[chunk[0]]), len(chunk)))
        for column, i in enumerate(chunk):
            r, v = (np.asarray(rows[i], np.float64)[own[i]] for rows in (rewards, values))
            table[: len(r), column] = r - v
            table[: len(v[1:]), column] += gamma * v[1:]
        decays = decay[chunk]
        for t in range(len(table) - 2, -1, -1):
            table[t] += decays * table[t + 1]
        for column, i in enumerate(chunk):
            following = np.searchsorted(own[i], np.arange(len(rewards[i])))
            result[i][:] = np.append(table[: len(own[i]), column], 0.0)[following]
    return result


def returns_to_go(rewards: Sequence[np.ndarray], *, gamma: float = 1.0) -> Tokens:
    """Monte-Carlo returns: what each token and those after it earn. R arrays [n] -> R float32 arrays [n]."""
    return gae(rewards, [np.zeros(len(row)) for row in rewards], 1.0, gamma=gamma)


def whiten(advantages: Sequence[np.ndarray]) -> Tokens:
    """Shifted and scaled to mean 0 and deviation 1 over all tokens together; all the same becomes all zero."""
    flat = np.concatenate(list(advantages)).astype(np.float64)
    mean, std = flat.mean(), flat.std()
    scale = 1 / std if std > _MIN_STD else 0.0
    return [np.asarray((row - mean) * scale, np.float32) for row in advantages]


def _chunks(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Indices of responses of like length, longest first, so many that their padded table is small."""
    chunk: list[int] = []
    for i in np.argsort(-np.asarray(lengths), kind="stable").tolist():
        if chunk and lengths[chunk[0]] * (len(chunk) + 1) > _CHUNK_CELLS:
            yield chunk
            chunk = []
        chunk.append(i)
    if chunk:
        yield chunk
