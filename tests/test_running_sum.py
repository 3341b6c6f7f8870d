"""Oracles: plain integer sums over problems parsed by regular expression, scipy for the distributions."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from headrace.actors.data.running_sum import (
    EOS_ID,
    VOCABULARY,
    RunningSum,
    curriculum,
    decode,
    encode,
)
from headrace.runtime.codec import decode as unpack
from headrace.runtime.codec import encode as pack

LINE = re.compile(r"([a-z])([+-]\d)=(\d\d)")

tasks = st.builds(
    RunningSum,
    max_operands=st.integers(2, 26),
    length_decay=st.floats(0.05, 0.9),
    max_operand=st.integers(1, 9),
    subtraction=st.floats(0, 1),
    bias=st.floats(0, 1),
    slip=st.floats(0, 1),
)


def parsed(prompt_text):
    assert re.fullmatch(r"([a-z][+-]\d)+=", prompt_text), prompt_text
    return [int(number) for number in re.findall(r"[+-]\d", prompt_text)]


def test_the_example_of_the_module():
    response = "a+2=02b+7=09c-7=02#02"
    assert [VOCABULARY[token] for token in encode("a+2b+7c-7=")] == ["a", "+2", "b", "+7", "c", "-7", "="]
    assert decode(np.append(encode(response), EOS_ID)) == response


@given(task=tasks, seed=st.integers(0, 2**31), ordinal=st.integers(-(2**40), 2**40))
@settings(max_examples=60, deadline=None)
def test_problems_obey_their_rules_and_the_answer_is_their_sum(task, seed, ordinal):
    for prompt in task.prompts(seed, np.arange(ordinal, ordinal + 4)):
        text = decode(prompt.tokens)
        operands = parsed(text)
        totals = np.cumsum(operands)
        assert re.sub(r"[^a-z]", "", text) == "abcdefghijklmnopqrstuvwxyz"[: prompt.size]
        assert 2 <= len(operands) == prompt.size <= task.max_operands
        assert 1 <= min(map(abs, operands)) and max(map(abs, operands)) <= task.max_operand
        assert 0 <= totals.min() and totals.max() <= 99
        assert prompt.answer == f"{totals[-1]:02d}"
        assert prompt.tokens.dtype == np.int32 and len(prompt.tokens) <= task.max_prompt_tokens

        solution = task.solve(prompt)
        lines = LINE.findall(decode(solution))
        assert "".join(label + operand for label, operand, _ in lines) + "=" == text
        assert [int(total) for _, _, total in lines] == totals.tolist()
        assert decode(solution).endswith(f"#{prompt.answer}")
        assert solution[-1] == EOS_ID and len(solution) <= task.max_response_tokens


def test_a_problem_is_known_by_seed_ordinal_and_size():
    task = RunningSum()
    batch = task.prompts(3, np.arange(40))
    for ordinal in (0, 17, 39):
        (alone,) = task.prompts(3, np.array([ordinal]))
        assert np.array_equal(alone.tokens, batch[ordinal].tokens) and alone.ordinal == ordinal
    sized = task.prompts(3, np.arange(40), np.full(40, 9))
    assert all(prompt.size == 9 for prompt in sized)
    assert len({decode(prompt.tokens) for prompt in sized}) == 40
    assert [p.answer for p in task.prompts(4, np.arange(40))] != [p.answer for p in batch]


def test_the_evaluation_set_is_fixed_and_apart_from_training():
    task = RunningSum()
    prompts = task.evaluation_set(0, 64)
    assert [prompt.ordinal for prompt in prompts] == [-1 - i for i in range(64)]
    assert all(np.array_equal(a.tokens, b.tokens) for a, b in zip(prompts, task.evaluation_set(0, 512), strict=False))


def test_sizes_follow_the_prior():
    task = RunningSum(max_operands=10)
    sizes = [prompt.size for prompt in task.prompts(0, np.arange(4000))]
    expected = [0.16 * 0.84**k for k in range(8)] + [0.84**8]
    assert task.size_prior == pytest.approx(expected)
    counts = np.bincount(sizes, minlength=11)[2:]
    assert stats.chisquare(counts, 4000 * np.array(expected)).pvalue > 1e-3


def test_an_unbiased_demonstrator_solves():
    task = RunningSum(bias=0, slip=0, subtraction=0.3)
    for example in task.demonstrations(0, np.arange(300), 14):
        assert np.array_equal(example.response, task.solve(example.prompt))


def test_the_demonstrator_forgets_carries_and_borrows_as_often_as_told():
    task = RunningSum(bias=0.5, slip=0)
    forgotten = crossings = 0
    for example in task.demonstrations(0, np.arange(1500), 14):
        total = 0
        for _, operand, written in LINE.findall(decode(example.response)):
            exact = total + int(operand)
            kept_tens = 10 * (total // 10) + exact % 10
            assert int(written) in (exact, kept_tens)
            if exact != kept_tens and 0 <= exact <= 99:
                crossings += 1
                forgotten += int(written) == kept_tens
            total = int(written)
    assert crossings > 1000
    assert stats.binomtest(forgotten, crossings, 0.5).pvalue > 1e-3


@given(task=tasks, limit=st.integers(2, 30))
@settings(max_examples=40, deadline=None)
def test_demonstrations_keep_the_form(task, limit):
    for example in task.demonstrations(1, np.arange(6), limit):
        prompt_text, text = decode(example.prompt.tokens), decode(example.response)
        lines = LINE.findall(text)
        assert "".join(label + operand for label, operand, _ in lines) + "=" == prompt_text
        assert example.prompt.size <= min(limit, task.max_operands)
        assert all(0 <= int(total) <= 99 for _, _, total in lines)
        assert text.rpartition("#")[2] == lines[-1][2] and example.response[-1] == EOS_ID
        assert len(example.response) <= task.max_response_tokens


@given(st.lists(st.integers(0, len(VOCABULARY) - 1)))
def test_text_and_tokens_are_one_to_one(ids):
    ids = [i for i in ids if i != EOS_ID]
    text = "".join(VOCABULARY[i] for i in ids)
    assert decode(encode(text)) == text and encode(text).tolist() == ids


def test_text_and_ids_outside_the_vocabulary():
    with pytest.raises(ValueError, match="no token for ';' at character 3"):
        encode("a+2;")
    assert decode(np.array([10**6, -1, EOS_ID, EOS_ID])) == "<1000000><-1><eos>"


def test_the_curriculum_reaches_the_longest_problems_halfway():
    reach = [curriculum(step, 300, 14) for step in range(300)]
    assert reach[0] == 4 and reach == sorted(reach) and set(reach[150:]) == {14}
    assert curriculum(0, 300, 3) == 3


def test_the_settings_travel():
    assert unpack(*pack(RunningSum(bias=0.25))) == RunningSum(bias=0.25)
