"""CodeVerifier: AC, WA, TLE, MLE, RE, CE of programs in both languages; checkers, interactors, points, functions."""

import asyncio
import json
import re
import shutil
import textwrap
import time

import numpy as np
import pytest
import sandboxed

from headrace.actors.data.running_sum import RunningSum
from headrace.actors.types import Group, Segment, Trajectory
from headrace.actors.verifier import Case, CodeVerifier
from headrace.actors.verifier.court import Care
from headrace.actors.verifier.sandbox import RunLimits, SandboxUnavailable
from headrace.actors.verifier.sandbox.bubble import Isolation
from headrace.runtime import System
from headrace.runtime.cluster import load_cluster
from headrace.runtime.errors import ActorDied
from headrace.runtime.toml import ConfigError, parse

sandboxed.needed()

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++ on this machine")

LIMITS = RunLimits(cpu_s=1.0, wall_s=60.0, memory_bytes=128 << 20, output_bytes=1 << 20)
CARE = Care(deadline_s=100.0, pause_s=0.001)


@pytest.fixture
async def verifier():
    verifier = CodeVerifier(limits=LIMITS, care=CARE, warm=2)
    await verifier.start()
    yield verifier
    await verifier.stop(None)


def case(source: str, reference: object, language: str = "python", row: str = "row 7") -> Case:
    text = reference if isinstance(reference, str) else json.dumps(reference)
    return Case(reference=text, response=f"So:\n```{language}\n{textwrap.dedent(source)}\n```\n", row=row)


async def verdict(verifier: CodeVerifier, *arguments: object, **named: object):
    return (await verifier.judge_cases([case(*arguments, **named)]))[0]  # type: ignore[arg-type]


def letters(verdict) -> str:
    assert not verdict.error, verdict.error
    return re.match(r"[A-Z]+", verdict.note)[0]


SUM = {"tests": [{"input": "1 2\n", "output": "3\n"}, {"input": "10 -4\n", "output": "6\n", "name": "minus"}]}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("print(sum(map(int, input().split())))", "AC"),
        ("a, b = map(int, input().split())\nprint(a + abs(b))", "WA on test minus"),
        ("while True: pass", "TLE on test 1"),
        ("x = bytearray(1 << 30)", "MLE on test 1"),
        ("x = []\nwhile True: x.append('x' * 4096 + str(len(x)))", "MLE"),
        ("raise ValueError(7)", "RE on test 1"),
        ("print(3); raise SystemExit(1)", "RE"),
        ("print(3; )", "CE"),
        ("if 1:\nprint(3)", "CE"),
        ("exec('1 +')", "RE"),
    ],
)
async def test_python_programs(verifier, source, expected):
    found = await verdict(verifier, source, SUM)
    assert found.note.startswith(expected) and found.correct == (expected == "AC") and not found.error


@needs_compiler
@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("int main() { long a, b; std::cin >> a >> b; std::cout << a + b; }", "AC"),
        ("int main() { std::cout << 3; }", "WA on test minus"),
        ("int main() { for (volatile int i = 0;; i = 0); }", "TLE"),
        ("int main() { std::vector<long> v; for (;;) v.push_back(1); }", "MLE"),
        ("int main() { return *(volatile int *)8; }", "RE"),
        ("int main() { return x; }", "CE"),
    ],
)
async def test_cpp_programs(verifier, source, expected):
    found = await verdict(
        verifier, f"#include <iostream>\n#include <vector>\n{source}", SUM | {"language": "cpp"}, "cpp"
    )
    assert found.note.startswith(expected) and found.correct == (expected == "AC")


@needs_compiler
async def test_a_program_is_compiled_once(verifier):
    program = "#include <iostream>\nint main() { int a, b; std::cin >> a >> b; std::cout << a + b; }"
    for expected in ("3", "4"):
        tests = {"language": "cpp", "tests": [{"input": "1 2", "output": expected}]}
        assert letters(await verdict(verifier, program, tests, "cpp")) == ("AC" if expected == "3" else "WA")
    assert len(verifier._judge._built) == 1


CHECKER = """
import sys
wanted = int(open(sys.argv[1]).read())
try:
    a, b = map(int, sys.stdin.read().split())
except ValueError:
    sys.exit(43)
if open(sys.argv[2]).read() == "crash":
    raise RuntimeError("broken checker")
sys.exit(42 if a + b == wanted and a != b else 43)
"""


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("n = int(input()); print(n + 1, -1)", "AC"),
        ("print(n := int(input()), n)", "WA"),
        ("print('x')", "WA"),
        ("1/0", "RE"),
    ],
)
async def test_a_checker_program_decides(verifier, source, expected):
    tests = {"tests": [{"input": "8", "output": "unused"}], "checker": {"language": "python", "source": CHECKER}}
    assert letters(await verdict(verifier, source, tests)) == expected


@needs_compiler
async def test_a_checker_may_be_cpp(verifier):
    source = "#include <iostream>\nint main() { int x; return std::cin >> x && x % 2 ? 42 : 43; }"
    tests = {"tests": [{"input": ""}], "checker": {"language": "cpp", "source": source}}
    found = await verifier.judge_cases([case("print(3)", tests), case("print(4)", tests)])
    assert [letters(verdict) for verdict in found] == ["AC", "WA"]


@pytest.mark.parametrize("trouble", [{"output": "crash"}, {"input": "not a number"}])
async def test_a_checker_that_breaks_is_an_error_that_may_be_tried_again(verifier, trouble):
    tests = {"tests": [{"input": "8", "output": ""} | trouble], "checker": {"language": "python", "source": CHECKER}}
    found = await verdict(verifier, "print(7, 1)", tests)
    assert (found.kind, found.retryable, found.correct) == ("checker", True, False) and "row 7" in found.error
    assert (await verifier.stats())["retries"] == CARE.attempts - 1


INTERACTOR = """
import sys
secret, left = int(open(sys.argv[1]).read()), 10
while left:
    left -= 1
    guess = int(sys.stdin.readline())
    print("lower" if guess > secret else "higher" if guess < secret else "correct", flush=True)
    if guess == secret:
        sys.exit(42)
sys.exit(43)
"""
GUESSER = """
low, high = 1, 1000
while True:
    middle = (low + high) // 2
    print(middle, flush=True)
    word = input()
    if word == "correct":
        break
    low, high = (middle + 1, high) if word == "higher" else (low, middle - 1)
"""


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (GUESSER, "AC"),
        ("while True:\n    print(5, flush=True)\n    input()", "WA"),
        ("1/0", "RE"),
        ("while True: pass", "TLE"),
    ],
)
async def test_an_interactor_talks_with_the_program(verifier, source, expected):
    tests = {"tests": [{"input": "987"}, {"input": "1"}], "interactor": {"language": "python", "source": INTERACTOR}}
    assert letters(await verdict(verifier, source, tests)) == expected


async def test_groups_have_points(verifier):
    tests = {
        "groups": {"small": 30, "large": 70},
        "tests": [
            {"input": "1", "output": "2", "group": "small"},
            {"input": "2", "output": "4", "group": "small"},
            {"input": "100", "output": "200", "group": "large"},
        ],
    }
    all_right, small_only, none = await verifier.judge_cases(
        [
            case("print(2 * int(input()))", tests),
            case("n = int(input()); print(2 * n if n < 50 else 0)", tests),
            case("print(2)", tests),
        ]
    )
    assert (all_right.correct, all_right.reward) == (True, 1.0)
    assert (small_only.correct, small_only.reward) == (False, 0.3) and small_only.note.startswith("WA on test 3")
    assert (none.correct, none.reward) == (False, 0.0)


# Function tests


def functions(tests: str, *names: str, prelude: str = "") -> dict[str, object]:
    return {"function": {"names": names or ["f"], "tests": textwrap.dedent(tests), "prelude": prelude}}


CLASS = "class f:\n    def __init__(self, v): self.v = v\n    def up(self): return self.v + 1"
NUMBERS = "a, b, c, d = f()\nassert a != a and str(b) == '-0.0' and c == 1e-320 and d == 3j"


@pytest.mark.parametrize(
    ("source", "tests", "expected"),
    [
        ("def f(x): return x + 1", "assert f(1) == 2", "AC"),
        ("def f(x): return x", "assert f(1) == 2", "WA"),
        ("def f(x): return 1 / 0", "assert f(1) == 2", "RE"),
        ("def f(x): return 1 / 0", "try:\n    f(1)\nexcept ZeroDivisionError:\n    pass\nelse:\n    assert 0", "AC"),
        ("def g(x): pass", "assert f(1) == 2", "RE"),
        ("def f(x: return", "assert f(1) == 2", "CE"),
        ("def f(x):\n    while True: pass", "assert f(1) == 2", "TLE"),
        ("def f(x): return bytearray(1 << 30)", "assert f(1) == 2", "MLE"),
        ("def f(x):\n    x.sort(); x.append(9)", "a = [3, 1]\nassert f(a) is None and a == [1, 3, 9]", "AC"),
        ("def f(*a, key): return [a, key]", "assert f(1, {2: (3,)}, key=b'x') == [(1, {2: (3,)}), b'x']", "AC"),
        ("def f(n):\n    yield from range(n)", "assert list(f(3)) == [0, 1, 2]\nassert f(3) != [0, 1, 2]", "AC"),
        ("def f(g, x): return g(g(x))", "assert f(lambda x: x + 1, 3) == 5", "AC"),
        (CLASS, "x = f(2)\nx.v = 6\nassert x.up() == 7", "AC"),
        ("def f(n): return 10 ** n", "assert f(5000) == 10 ** 5000", "AC"),
        ("def f(): return float('nan'), -0.0, 1e-320, 3j", NUMBERS, "AC"),
        ("def f(): return chr(0xd800) + '\\u20ac'", "assert f() == chr(0xd800) + '\\u20ac'", "AC"),
        ("def f(t): return t(3.7)", "assert f(int) == 3", "AC"),
        ("print('noise')\ndef f(x):\n    print('more')\n    return x", "print('x')\nassert f(1) == 1", "AC"),
        ("def f(x): return H(x)", "assert f(1) == H(1) == 11", "AC"),
    ],
)  # fmt: skip
async def test_function_tests(verifier, source, tests, expected):
    found = await verdict(verifier, source, functions(tests, prelude="def H(x): return x + 10"))
    assert found.note.startswith(expected), found


@pytest.mark.parametrize("tests", ["assert undefined", "def (", "raise SystemExit"])
async def test_function_tests_that_fail_by_themselves_are_an_error_that_names_the_row(verifier, tests):
    found = await verdict(verifier, "def f(): return 1", functions(tests))
    assert found.kind == "bad reference" and found.error.startswith("row 7") and not found.retryable


# Bad input


@pytest.mark.parametrize(
    ("response", "why"),
    [
        ("", "no whole block"),
        ("no code here", "no whole block"),
        ("```python\nprint(3)", "no whole block"),
        ("```java\nprint(3)\n```", "no whole block"),
        ("<think>```python\nprint(3)\n```", "no whole block"),
        ("```python\n\n```", "no whole block"),
        ("```python\nprint(3)\n```\nor rather\n```python\nprint(", "no whole block"),
    ],
)
async def test_a_response_without_a_program_is_incorrect(verifier, response, why):
    found = (await verifier.judge_cases([Case(reference=json.dumps(SUM), response=response)]))[0]
    assert found.note.startswith("CE") and why in found.note and not found.correct and not found.error


@pytest.mark.parametrize(
    "response",
    [
        "```python\nprint(0)\n```\nNo:\n```python\nprint(sum(map(int, input().split())))\n```",
        "<think>```python\nprint(0)\n```</think>```py\nprint(sum(map(int, input().split())))\n```",
        "```\nprint(sum(map(int, input().split())))\n```",
        "```python\nprint(sum(map(int, input().split())))\n```\n```\n3\n```",
        "````python\nx = '''\n```\n'''\nprint(sum(map(int, input().split())))\n````",
        "```python\nprint(sum(map(int, input().split())))  # \udcff\n```",
    ],
)
async def test_the_last_whole_block_of_the_language_is_the_program(verifier, response):
    found = (await verifier.judge_cases([Case(reference=json.dumps(SUM), response=response)]))[0]
    assert letters(found) == "AC", found


@pytest.mark.parametrize(
    ("reference", "why"),
    [
        ("", "neither a JSON object"),
        ("{", "Invalid JSON"),
        ("{}", "tests or function"),
        ('{"tests": [{"in": "1"}]}', "tests.0.in"),
        ('{"tests": [{}], "compare": "tokens"}', "compare"),
        ('{"tests": [{"group": "a"}], "groups": {"b": 1}}', "no points for ['a']"),
        ('{"tests": [{"output": "x"}], "compare": "integer"}', "no 64-bit integer"),
        ('{"tests": [{}], "checker": {"language": "python"}}', "checker.source"),
        ("../outside.json", "neither a JSON object nor a path below"),
        ("/etc/passwd", "neither a JSON object nor a path below"),
        ("missing.json", "No such file"),
    ],
)
async def test_a_reference_that_cannot_be_used_is_an_error_that_names_the_row(tmp_path, reference, why):
    verifier = CodeVerifier(limits=LIMITS, care=CARE, warm=1, tests=str(tmp_path))
    await verifier.start()
    found = await verdict(verifier, "print(3)", reference)
    await verifier.stop(None)
    assert found.kind == "bad reference" and found.error.startswith("row 7") and why in found.error
    assert not found.correct and not found.retryable


async def test_a_reference_may_be_a_file_below_the_folder_of_tests(tmp_path):
    (tmp_path / "sum").mkdir()
    (tmp_path / "sum" / "tests.json").write_text(json.dumps(SUM))
    verifier = CodeVerifier(limits=LIMITS, care=CARE, warm=1, tests=str(tmp_path))
    await verifier.start()
    assert letters(await verdict(verifier, "print(sum(map(int, input().split())))", "sum/tests.json")) == "AC"
    await verifier.stop(None)


@needs_compiler
async def test_a_checker_that_cannot_be_compiled_is_a_bad_reference(verifier):
    tests = {"tests": [{}], "checker": {"language": "cpp", "source": "int main( {"}}
    found = await verdict(verifier, "print(3)", tests)
    assert found.kind == "bad reference" and "can't be compiled" in found.error


# The actor


SETTINGS = """
[run]
name = "x"
[actors.verifier]
class = "headrace.actors.verifier:CodeVerifier"
"""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('language = "cobol"', "language"),
        ("places = 0", "places: must be greater than or equal to 1"),
        ("limits = {cpu_s = 0}", "cpu_s: must be greater than 0"),
        ("limits = {cpus = 1}", "unknown key"),
        ("isolation = {unsafe = 1}", "unsafe"),
    ],
)
def test_a_wrong_setting_is_one_clear_error(text, expected):
    with pytest.raises(ConfigError, match=expected):
        load_cluster(parse(SETTINGS + text, "c.toml"), {})


def test_settings_are_those_of_cluster_toml():
    text = 'language = "cpp"\nlimits = {cpu_s = 2.5}\nisolation = {disk_bytes = 1048576}\ncare = {attempts = 1}'
    cluster, _ = load_cluster(parse(SETTINGS + text, "c.toml"), {})
    verifier = cluster.actors["verifier"].instance
    assert (verifier.language, verifier.limits.cpu_s, verifier.isolation.disk_bytes) == ("cpp", 2.5, 1 << 20)


async def test_verdicts_are_cached_and_counted(verifier):
    for _ in range(2):
        assert (await verdict(verifier, "print(3)", SUM)).correct is False
    stats = await verifier.stats()
    assert (stats["cache_hits"], stats["incorrect"], stats["letters_WA"]) == (1, 1, 1)


async def test_without_bubblewrap_the_actor_does_not_start():
    verifier = CodeVerifier(isolation=Isolation(bwrap="no-such-bwrap"))
    with pytest.raises(SandboxUnavailable, match="install bubblewrap"):
        await verifier.start()


async def test_groups_are_judged_in_a_node_and_closing_is_bounded(tmp_path):
    task = RunningSum()
    prompt = task.prompts(0, np.arange(1), np.full(1, 3))[0]
    none = np.zeros(0, np.float32)
    made = [
        Trajectory(member=m, segments=[Segment(version=1, tokens=task.solve(prompt), logprobs=none)], finish=finish)
        for m, finish in enumerate(("length", "", "stop"))
    ]
    async with System(tmp_path / "run") as system:
        verifier = CodeVerifier(limits=LIMITS, care=CARE, warm=1)
        ref = await system.spawn(verifier, name="verifier", node="verifier")
        cut, unfinished, plain = await ref.judge(Group(prompt=prompt, trajectories=made))
        endless = case("while True: pass", SUM | {"limits": {"cpu_s": 50.0}})
        judging = asyncio.create_task(ref.judge_cases([endless, case("print(3)", SUM)]))
        await asyncio.sleep(0.5)
        began = time.monotonic()
    assert time.monotonic() - began < 30
    assert not cut.correct and unfinished.kind == "unfinished" and plain.kind == "bad reference"
    with pytest.raises((ActorDied, asyncio.CancelledError)):
        await judging
