"""Oracles: verdicts known by construction, and a second parser for arbitrary output."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.actors.data.running_sum import EOS_ID, VOCABULARY, RunningSum, encode
from headrace.actors.verifier.rules import judge_running_sum


def judged(text, answer, *, ended=True):
    tokens = encode(text)
    return judge_running_sum(np.append(tokens, EOS_ID) if ended else tokens, answer).correct


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("a+2=02b+7=09c-7=02#02", True),
        ("#02", True),
        ("a+2=09#03#02", True),
        ("a+2=02b+7=09c-7=02#03", False),
        ("a+2=02b+7=09c-7=02", False),
        ("02", False),
        ("#", False),
        ("", False),
        ("#2", False),
        ("#+2", False),
        ("#02=", False),
        ("#02#", False),
        ("#002", False),
    ],
)
def test_the_text_after_the_last_mark_counts(text, right):
    assert judged(text, "02") is right


def test_an_answer_that_did_not_end_is_wrong():
    assert not judged("a+2=02b+7=09c-7=02#02", "02", ended=False)
    assert not judge_running_sum(np.zeros(0, np.int32), "02").correct


@given(
    st.lists(st.integers(-5, 200) | st.integers(-(2**31), 2**31 - 1), max_size=60), st.sampled_from(["00", "07", "42"])
)
def test_any_output_gets_a_verdict(ids, answer):
    verdict = judge_running_sum(np.array(ids, np.int32), answer)
    assert not verdict.error
    right = False
    if ids and ids[-1] == EOS_ID:
        words = [VOCABULARY[i] if 0 <= i < len(VOCABULARY) else "?" for i in ids[:-1]]
        if "#" in words:
            right = words[len(words) - words[::-1].index("#") :] == list(answer)
    assert verdict.correct is right


def test_the_demonstrated_share_of_right_answers():
    task = RunningSum()
    examples = task.demonstrations(0, np.arange(1000), task.max_operands)
    right = [judge_running_sum(example.response, example.prompt.answer).correct for example in examples]
    assert all(judge_running_sum(task.solve(e.prompt), e.prompt.answer).correct for e in examples)
    assert 0.3 < np.mean(right) < 0.6
