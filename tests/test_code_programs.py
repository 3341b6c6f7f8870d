"""Programs for real problems: ours for the Kattis examples, the solutions of HumanEval and MBPP, and wrong ones made of
them. Needs ../shared/data; `bin/bench verify` judges all of them, here it is some."""

import json
from pathlib import Path

import code_programs
import pytest
import sandboxed

from headrace.actors.verifier import Case, CodeVerifier
from headrace.actors.verifier.code_judge import CodeJudge
from headrace.actors.verifier.code_tests import Program, kattis_package, read_tests
from headrace.actors.verifier.court import Care
from headrace.actors.verifier.sandbox import RunLimits, SandboxPool
from headrace.actors.verifier.sandbox.bubble import Isolation

DATA = Path(__file__).parents[1].parent / "shared" / "data"
LIMITS = RunLimits(cpu_s=2.0, wall_s=60.0, memory_bytes=256 << 20)
SETS = {
    "humaneval": (DATA / "humaneval" / "HumanEval.jsonl.gz", code_programs.humaneval, 12),
    "mbpp": (DATA / "mbpp" / "mbpp.jsonl", code_programs.mbpp, 60),
}

sandboxed.needed()
pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("problem", "number"), [(name, i) for name, written in code_programs.PROGRAMS.items() for i in range(len(written))]
)
async def test_programs_for_the_kattis_examples_have_their_verdict(problem, number):
    folder = DATA / "kattis_examples" / problem
    if not folder.is_dir():
        pytest.skip(f"../shared/data/kattis_examples/{problem} is not on this machine")
    judge = Program(language="python", source=code_programs.GUESS_JUDGE) if problem == "guess" else None
    tests = kattis_package(folder, interactor=judge)
    pool = SandboxPool(Isolation(), warm=2)
    await pool.start()
    try:
        expected, language, source = code_programs.PROGRAMS[problem][number]
        found = await CodeJudge(pool, LIMITS).judge(tests, language, source)
    finally:
        await pool.close()
    letters, _, points = expected.partition(" ")
    assert found.letters == letters, found
    assert not points or found.points == float(points), found


@pytest.mark.parametrize("name", SETS)
async def test_solutions_are_accepted_and_wrong_ones_refused(name):
    path, read, step = SETS[name]
    if not path.is_file():
        pytest.skip(f"../shared/data/{name} is not on this machine")
    right, wrong = [], []
    for row, reference, program in list(read(path))[::step]:
        right.append(Case(reference=reference, response=program, row=row))
        changed = [code_programs.wrong(reference, program), code_programs.off_by_one(reference, program)]
        wrong += [Case(reference=reference, response=text, row=row) for text in changed if text]
    assert len(wrong) >= len(right) / 2
    verifier = CodeVerifier(fenced=False, limits=LIMITS, warm=4, care=Care(deadline_s=110.0))
    await verifier.start()
    try:
        verdicts = await verifier.judge_cases(right + wrong)
    finally:
        await verifier.stop(None)
    assert [c.row for c, v in zip(right, verdicts, strict=False) if not v.correct] == []
    assert [c.row for c, v in zip(wrong, verdicts[len(right) :], strict=True) if v.correct or v.error] == []


def test_wrong_programs_fail_where_they_are_run_plainly():
    """What bench and tests rely on, in this process: the right program passes its tests, those made of it don't."""
    right = "def f(n):\n    return 1 if n == 0 else n * f(n - 1)"
    tests = "assert f(0) == 1\nassert f(4) == 24"
    reference = json.dumps({"function": {"names": ["f"], "prelude": "", "tests": tests}})
    assert read_tests(reference).function is not None
    exec(f"{right}\n{tests}", {})
    for make in (code_programs.wrong, code_programs.off_by_one):
        with pytest.raises(AssertionError):
            exec(f"{make(reference, right)}\n{tests}", {})
    assert (
        code_programs.wrong(json.dumps({"function": {"names": ["f"], "prelude": "", "tests": "assert f(1)"}}), right)
        is None
    )
