"""Suite and second opinion agree: on solutions, on corrupted ones, and on answers that were changed at random."""

from pathlib import Path

import puzzle_oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.actors.verifier.puzzles import MAX_LEVEL, TASKS, corrupt, generate, solve, verify

MARK = "Answer:\n"


def test_it_has_an_opinion_on_every_task_and_knows_nothing_of_the_suite():
    assert set(puzzle_oracle._RULES) == set(TASKS)
    assert "headrace" not in Path(puzzle_oracle.__file__).read_text()


@pytest.mark.parametrize("task", TASKS)
def test_solutions_are_right_and_corrupted_ones_wrong(task):
    for ordinal in range(3 * MAX_LEVEL):
        puzzle = generate(task, seed=9, ordinal=ordinal, difficulty=1 + ordinal % MAX_LEVEL)
        text = solve(puzzle)
        spoilt = corrupt(puzzle, text, seed=9, ordinal=ordinal)
        assert puzzle_oracle.right(task, puzzle.data, text.removeprefix(MARK)), (puzzle.data, text)
        assert not puzzle_oracle.right(task, puzzle.data, spoilt.removeprefix(MARK)), (puzzle.data, spoilt)


@pytest.mark.parametrize("task", TASKS)
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_both_say_the_same_of_changed_answers(task, data):
    """Symbols change places or become others of the answer's own, so that many keep its form and some are right."""
    puzzle = generate(task, seed=4, ordinal=data.draw(st.integers(0, 50)), difficulty=data.draw(st.integers(1, 3)))
    symbols = list(solve(puzzle).removeprefix(MARK))
    spots = st.sampled_from([i for i, symbol in enumerate(symbols) if not symbol.isspace()])
    for _ in range(data.draw(st.integers(0, 3))):
        i, j = data.draw(spots), data.draw(spots)
        if data.draw(st.booleans()):
            symbols[i], symbols[j] = symbols[j], symbols[i]
        else:
            symbols[i] = symbols[j]
    answer = "".join(symbols)
    assert verify(puzzle, MARK + answer) == puzzle_oracle.right(task, puzzle.data, answer), (puzzle.data, answer)
