"""A short run of the fuzzer; `python -P tests/fuzz_frames.py` does a million."""

import os

import pytest
from fuzz_frames import fuzz


@pytest.mark.parametrize("seed", range(2))
async def test_broken_messages_are_counted_and_harm_nobody(seed):
    messages = int(os.environ.get("HEADRACE_FUZZ_MESSAGES", "20000"))
    counts = await fuzz(messages, seed)
    assert counts["malformed"] > messages / 5
