"""The puzzle suite as its users see it: every task at every level, from the prompt to the verdict.

What each verifier accepts is held against oracles in test_puzzles_exact.py; here are determinism, unique solutions
(counted by a search of our own), near misses, the frame around an answer, hostile text and the ladder.
"""

import ast
import json
import os
import random
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.actors.verifier import puzzles
from headrace.actors.verifier.puzzles import MAX_LEVEL, TASKS, Ladder, Puzzle, corrupt, generate, solve, verify
from headrace.actors.verifier.puzzles.answers import final_answer
from headrace.actors.verifier.puzzles.expression import value_of
from headrace.runtime.codec import decode, encode

LEVELS = range(1, MAX_LEVEL + 1)


@cache
def puzzle(task, ordinal=0, level=5):
    return generate(task, seed=11, ordinal=ordinal, difficulty=level)


@pytest.mark.parametrize("task", TASKS)
def test_every_level_is_solved_and_near_misses_are_refused(task):
    for level in LEVELS:
        for ordinal in (-1, 2**40):
            made = puzzle(task, ordinal, level)
            answer = solve(made)
            assert verify(made, f"Let me think. Answer: 7.\n\nNo, wait.\n{answer}"), (made.prompt, answer)
            for number in range(3):
                wrong = corrupt(made, answer, seed=5, ordinal=number)
                assert not verify(made, wrong), (made.prompt, answer, wrong)


@pytest.mark.parametrize("task", TASKS)
def test_a_puzzle_survives_json_and_the_wire(task):
    made = puzzle(task)
    stored = Puzzle(**json.loads(json.dumps({name: getattr(made, name) for name in made.__slots__})))
    assert stored == made == decode(*encode(made))
    assert verify(stored, solve(made)) and solve(stored) == solve(made)


DIGEST = """
import json, zlib
from headrace.actors.verifier.puzzles import TASKS, generate, solve
made = [generate(task, seed=1, ordinal=o, difficulty=d) for task in TASKS for o, d in ((0, 3), (-5, 9))]
print(zlib.crc32(json.dumps([[p.prompt, p.data, solve(p)] for p in made]).encode()))
"""


def test_a_puzzle_is_the_same_in_every_process():
    found = set()
    for hash_seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": hash_seed, "PYTHONSAFEPATH": "1"}
        command = [sys.executable, "-c", DIGEST]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        found.add(done.stdout)
    assert len(found) == 1


@pytest.mark.parametrize("task", TASKS)
def test_ordinals_seeds_and_levels_give_different_puzzles(task):
    made = [generate(task, seed=seed, ordinal=o, difficulty=d) for seed in (0, 1) for o in range(5) for d in (7, 10)]
    assert len({one.prompt for one in made}) >= len(made) - 1


@pytest.mark.parametrize("task", TASKS)
def test_higher_levels_have_longer_prompts_or_more_moves(task):
    def effort(level):
        made = [puzzle(task, ordinal, level) for ordinal in range(8)]
        return sum(len(json.dumps(one.data)) + len(solve(one)) for one in made)

    assert effort(1) < effort(10)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("sudokus", 5), "no puzzle task 'sudokus'; did you mean 'sudoku'"),
        (("chess", 5), "no puzzle task 'chess'; there are: twenty_four, "),
        (("maze", 0), r"difficulty of a puzzle is one of 1\.\.10, got 0"),
        (("maze", 11), r"difficulty of a puzzle is one of 1\.\.10, got 11"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        generate(arguments[0], seed=0, ordinal=0, difficulty=arguments[1])


def count_sudokus(grid, most=2):
    """Solutions of a sudoku, at most `most`, by sets."""
    size = len(grid)
    height, width = {4: (2, 2), 6: (2, 3), 9: (3, 3)}[size]
    best = None
    for r in range(size):
        for c in range(size):
            if grid[r][c] == 0:
                box = {
                    grid[y][x]
                    for y in range(size)
                    for x in range(size)
                    if (y // height, x // width) == (r // height, c // width)
                }
                free = set(range(1, size + 1)) - {*grid[r], *(row[c] for row in grid), *box}
                if best is None or len(free) < len(best[2]):
                    best = r, c, free
    if best is None:
        return 1
    r, c, free = best
    found = 0
    for digit in free:
        found += count_sudokus(
            [[*row[:c], digit, *row[c + 1 :]] if y == r else row for y, row in enumerate(grid)], most
        )
        if found >= most:
            break
    return found


@pytest.mark.parametrize("level", [1, 3, 4, 6, 10])
def test_a_sudoku_has_one_solution(level):
    assert count_sudokus(puzzle("sudoku", level, level).data["grid"]) == 1


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Answer: 7", "7"),
        (r"so \boxed{7}", "7"),
        (r"so $\boxed{7}$, and not \boxed{8}.", "8"),
        ("Answer: 7\n\n\\boxed{8}", "8"),
        ("\\boxed{8}\nAnswer: 7", "7"),
        ("Answer:\n\n1 2\n3 4\n\nHope this helps!", "1 2\n3 4"),
        ("**Answer:** 7", "7"),
        ("**Answer**: **RRD**", "RRD"),
        ("### Final answer:\n7", "7"),
        ("answer :\n```\n*.\n.*\n```", "*.\n.*"),
        (r"Answer: \boxed{1 2 \\ 3 4}", "1 2 \n 3 4"),
        (r"\boxed{\{1\}}", r"\{1\}"),
        ("Answer: 3 × 8 − 0 ÷ 1", "3 * 8 - 0 / 1"),  # noqa: RUF001
        ("Answer:\r\n**.\r\n.**", "**.\n.**"),
        ("The answer is 7", None),
        ("My answer: 7", None),
        (r"\boxed{7", None),
        (r"\boxed{}", None),
        ("Answer:", None),
        ("Answer:\n\n\n", None),
        ("", None),
        ("Answer: ٣", None),
        ("Answer: 7\u200b", None),
        ("Answer: 7" + " " * (1 << 17), None),
        ("Answer: " + "7" * 5000, None),
        (r"\boxed{7}" + "x" * 60_000, "7"),
    ],
)
def test_the_last_mark_holds_the_answer(text, answer):
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2+3*4", 14),
        ("(2+3)*4", 20),
        ("8-3-2", 3),
        ("8/(3-8/3)", 24),
        ("((((7))))", 7),
        ("", None),
        ("1/0", None),
        ("1/(2-2)", None),
        ("-1", None),
        ("1 2", 12),
        ("2**3", None),
        ("2^3", None),
        ("2(3)", None),
        ("1.5", None),
        ("1e3", None),
        ("(1", None),
        ("1)", None),
        ("99999", None),
        ("٣+1", None),
        ("(" * 17 + "1" + ")" * 17, None),
        ("1+" * 120 + "1", None),
        ("abs(1)", None),
    ],
)
def test_expressions(text, value):
    found = value_of(text)
    assert (found and found[0]) == value


MARKER = "the_verifier_ran_this"
PAYLOADS = [
    f"__import__('os').system('touch {MARKER}')",
    f"().__class__.__base__.__subclasses__() or open('{MARKER}', 'w')",
    f"{{open('{MARKER}','w')}}",
    f"$(touch {MARKER})",
    "9**9**9**9**9",
    "9" * 4000,
    "(" * 4000,
    "[" * 2000 + "]" * 2000,
    "1e999",
    "10^(10^(10^10))",
    "0x41 0b1 1_000 +1 -1",
    "١ ٢ ٣ ٤",  # noqa: RUF001
    "１ ２ ３ ４",  # noqa: RUF001
    "\u202e4 3 2 1",
    "\0\0\0",
    "nan inf -inf",
    "None",
    "A=1=2, =, ==, A=",
    "A=" + "9" * 3000,
    "\n".join("#" * 60 for _ in range(60)),
    "UDLR" * 1000,
    "AC, " * 1000,
    "T" * 4000,
    " ".join(["1"] * 2000),
    "%s%n{0}{x!r:>999999999}",
    "\\" * 4000,
]
FLOODS = [
    "a" * (1 << 20),
    "(" * (1 << 20),
    "Answer:" * (1 << 17),
    "Answer:\n" * (1 << 17),
    "\\boxed{" * (1 << 17),
    "\\boxed{" + "{" * (1 << 20),
    "Answer: " + "1 " * (1 << 19),
    "Answer:" + "\n \t" * (1 << 18),
    "*" * (1 << 20) + "Answer:",
    " " * (1 << 20) + "answer" + " " * (1 << 16),
    "\U0001f600" * (1 << 18),
]


@pytest.mark.parametrize("task", TASKS)
def test_hostile_text_is_wrong_and_nothing_else(task, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = puzzle(task)
    began = time.process_time()
    for payload in PAYLOADS:
        assert not verify(made, f"Answer: {payload}")
        assert not verify(made, f"\\boxed{{{payload}}}")
        assert not TASKS[task].accepts(made.data, payload)
        assert not verify(made, f"{solve(made)}\n{payload}\\boxed{{{payload}}}")
    for flood in FLOODS:
        assert not verify(made, flood)
        assert not verify(made, f"{solve(made)}{flood}")
    assert time.process_time() - began < 20
    assert list(tmp_path.iterdir()) == []


def test_nothing_in_the_suite_can_run_text():
    for path in Path(puzzles.__file__).parent.glob("*.py"):
        names = {node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)}
        assert not names & {"eval", "exec", "compile", "__import__", "getattr", "literal_eval", "open"}, path


NASTY = st.text(alphabet="0123456789UDLRTFABCSE#.*=,:+-/() \n\\{}٣é\0", max_size=80)


@given(task=st.sampled_from(list(TASKS)), text=st.one_of(st.text(max_size=200), NASTY))
def test_no_text_makes_a_verifier_raise(task, text):
    made = puzzle(task, 0, 2)
    assert verify(made, f"Answer: {text}") in (True, False)
    assert TASKS[task].accepts(made.data, text) in (True, False)


@given(task=st.sampled_from(list(TASKS)), seed=st.integers(0, 999))
def test_a_cut_or_patched_answer_is_read_without_harm(task, seed):
    dice = random.Random(seed)
    made = puzzle(task, 1, 2)
    answer = list(solve(made))
    for _ in range(dice.randint(1, 4)):
        spot = dice.randrange(len(answer))
        answer[spot : spot + dice.randint(0, 2)] = dice.choice("019UDLRTFABC#.*=, \n(){}é")
    assert verify(made, "".join(answer)) in (True, False)


def climb(skill, ladder, answers=4000, seed=0):
    """The levels of a policy that passes with a chance that halves, about, with each level above its skill."""
    dice, levels = random.Random(seed), []
    for _ in range(answers):
        level = ladder.level
        levels.append(level)
        ladder.observe(level, passed=dice.random() < 1 / (1 + 2.0 ** (level - skill)))
    return levels


@pytest.mark.parametrize("skill", [2, 4.5, 6, 8])
@pytest.mark.parametrize("start", [1, 10])
def test_the_ladder_finds_the_level_of_a_policy(skill, start):
    late = climb(skill, Ladder(level=start))[2000:]
    assert abs(sum(late) / len(late) - skill) < 1.3


def test_the_ladder_ends_at_its_ends():
    top, bottom = Ladder(level=5), Ladder(level=5)
    for _ in range(1000):
        top.observe(top.level, passed=True)
        bottom.observe(bottom.level, passed=False)
    assert (top.level, bottom.level) == (10, 1)
    narrow = Ladder(level=3, lowest=2, highest=4)
    levels = climb(9, narrow) + climb(0, narrow)
    assert (min(levels), max(levels)) == (2, 4)


def test_the_ladder_waits_and_ignores_answers_of_other_levels():
    ladder = Ladder(level=4, patience=3)
    for level in (4, 4, 3, 5, 3, 3):
        ladder.observe(level, passed=True)
    assert ladder.level == 4
    ladder.observe(4, passed=True)
    assert ladder.level == 5 and ladder.state() == {"level": 5, "num_seen": 0, "num_passed": 0}


def test_a_restored_ladder_goes_on_the_same():
    first, second = Ladder(), Ladder()
    climb(5, first, answers=77)
    second.load_state(decode(*encode(first.state())))
    assert climb(5, first, seed=1) == climb(5, second, seed=1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"low": 0.7, "high": 0.3}, "low and high"),
        ({"high": 1.5}, "low and high"),
        ({"level": 11}, r"one of 1\.\.10"),
        ({"patience": 0}, "at least 1"),
        ({"lowest": 4, "highest": 3, "level": 4}, "1 <= lowest <= highest <= 10, got 4 and 3"),
        ({"lowest": 2}, r"one of 2\.\.10, got 1"),
    ],
)
def test_a_ladder_that_makes_no_sense_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Ladder(**settings)
