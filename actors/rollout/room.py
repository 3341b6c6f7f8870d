"""How many pages an engine needs. Knows nothing of what is in them."""

from __future__ import annotations

from ..model.config import ModelConfig
from .runner import Runner
from .scheduler import NUM_AHEAD, RESERVE_SHARE


def enough_pages(num_slots: int, max_prompt_tokens: int, max_new_tokens: int, page_tokens: int) -> int:
    """Pages with which no response ever waits for one or gives way: all slots at their longest, and what comes next."""
    live = num_slots * -(-(max_prompt_tokens + max_new_tokens) // page_tokens)
    return live + NUM_AHEAD * -(-max_prompt_tokens // page_tokens) + int(num_slots * RESERVE_SHARE) + 1


def num_pages_of(
    num_slots: int, max_prompt_tokens: int, max_new_tokens: int, *, page_tokens: int, kv_tokens: int = 0
) -> int:
    """As `enough_pages`, or those that `kv_tokens` have room in, if that is less; 0 sets no bound."""
    enough = enough_pages(num_slots, max_prompt_tokens, max_new_tokens, page_tokens)
    return min(enough, kv_tokens // page_tokens) if kv_tokens else enough


def check_room(config: ModelConfig, runner: Runner, max_len: int, max_pages: int) -> None:
    """Raises ValueError if sequences of `max_len` tokens, in `max_pages` pages, are more than model or memory take."""
    if max_len > config.max_positions:
        raise ValueError(
            f"sequences of {max_len} tokens are longer than the model's max_positions {config.max_positions}; "
            "raise model.max_positions or shorten prompts or answers"
        )
    if runner.num_pages < max_pages + 1:
        raise ValueError(
            f"a response may need {max_pages} pages of {runner.page_tokens} tokens, and one is always left over, but "
            f"the KV memory has {runner.num_pages}; raise kv_tokens to {(max_pages + 1) * runner.page_tokens} or more"
        )
