"""What is added to a verdict before it becomes a reward. Plain functions; knows nothing of models or actors."""

from __future__ import annotations


def soft_overlong_punishment(num_tokens: int, *, max_tokens: int, cache_tokens: int) -> float:
    """Punishes a response that comes near its token budget, linearly down to -1; add it to the reward.

        0 ............ up to max_tokens - cache_tokens
        0 -> -1 ...... over the last cache_tokens
        -1 ........... beyond max_tokens

    DAPO, arXiv 2503.14476, eq. 13 (L_max = max_tokens, L_cache = cache_tokens). cache_tokens = 0 punishes only what is
    beyond max_tokens. Raises ValueError if cache_tokens is not in 0..max_tokens.
    """
    if not 0 <= cache_tokens <= max_tokens:
        raise ValueError(
            f"cache_tokens is part of the budget and must be 0..{max_tokens} (max_tokens), got {cache_tokens}"
        )
    if num_tokens > max_tokens:
        return -1.0
    return min(0.0, (max_tokens - cache_tokens - num_tokens) / cache_tokens) if cache_tokens else 0.0
