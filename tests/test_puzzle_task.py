"""Puzzles as a task: how they are written, drawn and adapted. Oracles: the suite's verifier, simulated solvers."""

from __future__ import annotations

import json
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from scipy import stats

from headrace.actors.data import TASKS as KINDS
from headrace.actors.data import Puzzles, RunningSum, Task
from headrace.actors.data.puzzle_text import brief, vocabulary
from headrace.actors.data.puzzles import PuzzleQuestions
from headrace.actors.types import Group, Prompt, Segment, Trajectory, Verdict
from headrace.actors.verifier.puzzles import TASKS, Puzzle, generate, solve, verify
from headrace.runtime.codec import decode, encode

SMALL = Puzzles(puzzles={"maze": 1.0, "countdown": 2.0, "sudoku": 1.0}, max_level=3, demonstrated_level=2)


def as_puzzle(prompt: Prompt) -> Puzzle:
    return Puzzle(task=prompt.dataset, prompt="", data=json.loads(prompt.answer), difficulty=prompt.size)


def answered(prompt: Prompt, right: list[bool]) -> Group:
    """Judged responses, without their tokens."""
    none = [Segment(version=0, tokens=np.zeros(0, np.int32), logprobs=np.zeros(0, np.float32))]
    trajectories = [
        Trajectory(member=m, segments=none, finish="stop", verdict=Verdict(correct=r)) for m, r in enumerate(right)
    ]
    return Group(prompt=prompt, trajectories=trajectories)


def test_both_tasks_fulfil_the_protocol() -> None:
    for kind, cls in KINDS.items():
        task = cls()
        assert isinstance(task, Task) and task.kind == kind
        assert decode(*encode(task)) == task


# Text


@pytest.mark.parametrize("name", TASKS)
def test_every_prompt_and_solution_can_be_spelled_and_read_again(name: str) -> None:
    words = vocabulary()
    for level in range(1, 11):
        puzzle = generate(name, seed=3, ordinal=level, difficulty=level)
        for text in (brief(puzzle), f"{puzzle.prompt}\n", solve(puzzle)):
            tokens = words.encode(text)
            assert tokens.dtype == np.int32 and 0 < tokens.min() and tokens.max() < len(words)
            assert words.decode(np.append(tokens, 0)) == text


@pytest.mark.parametrize("name", TASKS)
def test_the_brief_form_of_another_instance_is_another_one(name: str) -> None:
    texts: dict[str, str] = {}
    for level in range(1, 11):
        for ordinal in range(40 if level < 8 else 5):
            puzzle = generate(name, seed=5, ordinal=ordinal, difficulty=level)
            data = json.dumps(puzzle.data)
            assert texts.setdefault(brief(puzzle), data) == data


def test_ids_that_are_no_tokens_can_be_read() -> None:
    assert vocabulary().decode(np.array([119, 2, 500, -3])).endswith("<500><-3>")


# Problems


@given(
    seed=st.integers(0, 2**31), ordinal=st.integers(-(2**30), 2**30), name=st.sampled_from(list(SMALL.puzzles)),
    level=st.integers(1, 3),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_a_problem_is_always_the_same_and_its_solution_is_right(seed: int, ordinal: int, name: str, level: int) -> None:
    prompt, again = (SMALL.problem(seed, ordinal, name, level) for _ in range(2))
    assert encode(prompt) == encode(again)
    assert (prompt.ordinal, prompt.dataset, prompt.size) == (ordinal, name, level)
    assert len(prompt.tokens) <= SMALL.max_prompt_tokens
    assert brief(as_puzzle(prompt)) == SMALL.decode(prompt.tokens)
    solution = SMALL.solve(prompt)
    assert solution[-1] == SMALL.eos_id and verify(as_puzzle(prompt), SMALL.decode(solution))


def test_training_never_sees_an_instance_of_evaluation() -> None:
    questions = SMALL.questions(0)
    asked = {SMALL.decode(questions.prompt(ordinal).tokens) for ordinal in range(2000)}
    shown = {SMALL.decode(d.prompt.tokens) for d in SMALL.demonstrations(0, np.arange(2000), 3)}
    evaluated = {SMALL.decode(prompt.tokens) for seed in (0, 7) for prompt in SMALL.evaluation_set(seed, 400)}
    assert len(asked) > 100 and len(shown) > 100 and len(evaluated) > 100
    assert not (asked | shown) & evaluated


def test_a_level_with_one_instance_shares_it() -> None:
    task = Puzzles(puzzles={"graph_colouring": 1.0}, max_level=1, demonstrated_level=1)
    assert SMALL.max_prompt_tokens >= len(task.evaluation_set(0, 1)[0].tokens)
    assert len(task.demonstrations(0, np.arange(3), 1)) == 3


def test_evaluation_has_puzzles_by_weight_and_all_levels_equally() -> None:
    prompts = SMALL.evaluation_set(4, 1200)
    assert [prompt.ordinal for prompt in prompts] == list(range(-1, -1201, -1))
    names = Counter(prompt.dataset for prompt in prompts)
    levels = Counter(prompt.size for prompt in prompts)
    expected = {"maze": 300, "countdown": 600, "sudoku": 300}
    assert stats.chisquare([names[n] for n in expected], list(expected.values())).pvalue > 1e-3
    assert stats.chisquare([levels[level] for level in (1, 2, 3)]).pvalue > 1e-3


def test_demonstrations_grow_harder_and_are_right() -> None:
    assert [SMALL.largest_size(step, 100) for step in (0, 24, 26, 50, 99)] == [1, 1, 2, 2, 2]
    examples = SMALL.demonstrations(0, np.arange(200), 2)
    assert {e.prompt.size for e in examples} == {1, 2}
    assert all(verify(as_puzzle(e.prompt), SMALL.decode(e.response)) for e in examples)
    assert {e.prompt.size for e in SMALL.demonstrations(0, np.arange(50), 1)} == {1}


def test_prose_has_the_rules() -> None:
    task = Puzzles(puzzles={"maze": 1.0}, style="prose", max_prompt_tokens=400, max_level=2)
    (prompt,) = task.evaluation_set(0, 1)
    assert "never onto a wall" in task.decode(prompt.tokens)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"puzzles": {"maize": 1.0}}, "puzzles: there is no 'maize'; did you mean \"maze\"?"),
        ({"puzzles": {"maze": 0.0}}, "the weight of maze must be above 0, got 0.0"),
        ({"puzzles": {"maze": math.inf}}, "the weight of maze must be above 0, got inf"),
        ({"puzzles": {}}, "puzzles must name at least one; known are twenty_four"),
        ({"min_level": 3, "demonstrated_level": 2}, "demonstrated_level must be between min_level and max_level"),
        ({"low": 0.8}, "low must be below high, got 0.8 and 0.7"),
    ],
)
def test_each_mistake_is_named(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message.split("'")[0].replace("?", ".")) as caught:
        Puzzles(**values)
    assert message in str(caught.value)


def test_what_does_not_fit_is_said_before_anything_starts() -> None:
    SMALL.check(96)
    with pytest.raises(ValueError, match=r"max_prompt_tokens: no maze of level 6 fits 160 tokens, the shortest has 2"):
        Puzzles(puzzles={"maze": 1.0}, min_level=6, demonstrated_level=6, max_level=6).check(96)
    with pytest.raises(ValueError, match=r"max_level: a solution of sudoku at level 3 has 73 tokens, and .* is 40"):
        Puzzles(puzzles={"sudoku": 1.0}, max_level=3).check(40)


# Which are asked


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def run(
    questions: PuzzleQuestions, skill: dict[str, float], groups: int, first: int = 0, seed: int = 0
) -> list[Prompt]:
    """Groups of eight answers by a solver that passes level k of a puzzle with sigmoid(1.5 (skill - k))."""
    random = np.random.default_rng([seed, first])
    asked = []
    for ordinal in range(first, first + groups):
        prompt = questions.prompt(ordinal)
        asked.append(prompt)
        right = [bool(r) for r in random.random(8) < sigmoid(1.5 * (skill[prompt.dataset] - prompt.size))]
        questions.observe(answered(prompt, right), mixed=len(set(right)) > 1)
    return asked


LADDERS = Puzzles(
    puzzles={"twenty_four": 1.0, "countdown": 1.0, "cryptarithm": 3.0}, max_level=10, max_prompt_tokens=64
)


@pytest.mark.slow
@given(skills=st.tuples(*[st.floats(0.0, 11.0)] * 3), seed=st.integers(0, 99))
@settings(max_examples=12, deadline=None, phases=(Phase.explicit, Phase.generate))
@example(skills=(0.0, 10.54, 8.0), seed=63)
def test_levels_come_to_where_the_pass_rate_is_in_the_band(skills: tuple[float, ...], seed: int) -> None:
    skill = dict(zip(LADDERS.puzzles, skills, strict=True))
    questions = LADDERS.questions(seed)
    run(questions, skill, 1200, seed=seed)
    late = run(questions, skill, 600, first=1200, seed=seed)
    for name in LADDERS.puzzles:
        levels = [prompt.size for prompt in late if prompt.dataset == name]
        assert abs(np.mean(levels) - min(max(skill[name], 1), 10)) <= 1.0, (name, skill[name], Counter(levels))


@given(skills=st.tuples(*[st.floats(0.0, 11.0)] * 3), cut=st.integers(1, 60), seed=st.integers(0, 99))
@settings(max_examples=12, deadline=None)
def test_a_restored_state_asks_the_same(skills: tuple[float, ...], cut: int, seed: int) -> None:
    skill = dict(zip(LADDERS.puzzles, skills, strict=True))
    whole, first, second = (LADDERS.questions(seed) for _ in range(3))
    run(whole, skill, cut)
    run(first, skill, cut)
    second.load_state(decode(*encode(first.state())))
    rest = [run(questions, skill, 60, first=cut) for questions in (whole, second)]
    assert [encode(prompt) for prompt in rest[0]] == [encode(prompt) for prompt in rest[1]]
    assert whole.state() == second.state()


def test_puzzles_are_drawn_by_weight_and_share_of_mixed_groups() -> None:
    task = Puzzles(puzzles={"maze": 1.0, "countdown": 4.0}, max_level=1, demonstrated_level=1)
    questions = task.questions(0)
    fresh = Counter(questions.prompt(ordinal).dataset for ordinal in range(3000))
    assert stats.chisquare([fresh["maze"], fresh["countdown"]], [600, 2400]).pvalue > 1e-3
    for ordinal in range(300):
        mixed = questions.prompt(ordinal).dataset == "maze"
        questions.observe(answered(questions.prompt(ordinal), [True, not mixed]), mixed=mixed)
    later = Counter(questions.prompt(ordinal).dataset for ordinal in range(3000))
    assert later["maze"] > 2000 and later["countdown"] > 100


def test_errors_say_nothing_of_the_level_and_metrics_are_since_the_last_call() -> None:
    questions = Puzzles(puzzles={"maze": 1.0}, patience=4).questions(0)
    prompt = questions.prompt(0)
    group = answered(prompt, [True] * 8)
    for trajectory in group.trajectories:
        trajectory.verdict = Verdict(correct=False, error="gone")
    questions.observe(group, mixed=False)
    assert questions.metrics() == {"puzzle_level/maze": 1.0}
    questions.observe(answered(prompt, [True, True, True, False]), mixed=True)
    assert questions.metrics() == {"puzzle_level/maze": 2.0, "puzzle_pass_ratio/maze": 0.75}
    assert questions.metrics() == {"puzzle_level/maze": 2.0}


def test_the_state_of_another_task_is_refused() -> None:
    state = SMALL.questions(0).state()
    with pytest.raises(ValueError, match=r"with the puzzles \['maze', 'countdown', 'sudoku'\], the task has"):
        LADDERS.questions(0).load_state(state)
    with pytest.raises(ValueError, match="of a run with the puzzles None"):
        SMALL.questions(0).load_state(RunningSum().questions(0).state())
