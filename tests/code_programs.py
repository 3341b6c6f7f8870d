"""Programs for the problems of ../shared/data/kattis_examples, ours, each with the verdict that is right; and the function
tests of HumanEval and MBPP as references, with wrong programs made of the right ones.

A wrong one is made by changing what the function returns, and is used only where that makes a difference to its tests by
construction: they compare the result with a constant, which the changed result is not.
"""

# ruff: noqa: E501  # Programs in a line each.

import ast
import gzip
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

GUESS_JUDGE = """
import random, sys
kind, *rest = open(sys.argv[1]).read().split()
secret = int(rest[0]) if kind == "fixed" else random.Random(int(rest[0]) if rest else 0).randint(1, 1000)
def refuse(why):
    sys.stderr.write(why)
    sys.exit(43)
for _ in range(10):
    line = sys.stdin.readline()
    if not line.strip().isdigit() or not line.strip().isascii() or not 1 <= int(line[:9]) <= 1000:
        refuse(f"no guess: {line[:20]!r}")
    word = "correct" if int(line) == secret else "lower" if int(line) > secret else "higher"
    try:
        print(word, flush=True)
    except BrokenPipeError:
        refuse("it went away")
    if word == "correct":
        sys.exit(42 if not sys.stdin.read().strip() else 43)
refuse("ten guesses, all wrong")
"""

_GUESS = """
low, high = 1, 1000
while True:
    middle = (low + high) // 2
    print(middle, flush=True)
    word = input()
    if word == "correct": break
    if word == "lower": high = middle - 1
    else: low = middle + 1
"""

PROGRAMS: dict[str, list[tuple[str, str, str]]] = {
    "different": [
        ("AC", "python", "import sys\nfor line in sys.stdin:\n    a, b = map(int, line.split())\n    print(abs(a - b))"),
        ("AC", "cpp", "#include <cstdio>\n#include <cstdlib>\nint main() { long long a, b; while (scanf(\"%lld %lld\", &a, &b) == 2) printf(\"%lld\\n\", llabs(a - b)); }"),
        ("WA", "python", "import sys\nfor line in sys.stdin:\n    a, b = map(int, line.split())\n    print(a - b)"),
        ("WA", "cpp", "#include <cstdio>\n#include <cstdlib>\nint main() { int a, b; while (scanf(\"%d %d\", &a, &b) == 2) printf(\"%d\\n\", abs(a - b)); }"),
        ("TLE", "python", "import sys\nfor line in sys.stdin:\n    a, b = sorted(map(int, line.split()))\n    while a + 1 < b + 2: a += 1 if b < 10 ** 14 else 0"),
        ("RE", "python", "while True:\n    a, b = map(int, input().split())\n    print(abs(a - b))"),
        ("CE", "cpp", "int main() { print(); }"),
        ("MLE", "cpp", "#include <vector>\nint main() { std::vector<long> v; for (;;) v.push_back(1); }"),
    ],
    "hello": [
        ("AC", "python", "print('Hello World!')"),
        ("AC", "cpp", "#include <iostream>\nint main() { std::cout << \"Hello World!\\n\"; }"),
        ("WA", "python", "print('Hello, World!')"),
        ("WA", "cpp", "int main() { return 0; }"),
        ("TLE", "cpp", "int main() { for (volatile int i = 0;; i = 1); }"),
        ("RE", "cpp", "#include <cstdlib>\nint main() { abort(); }"),
        ("MLE", "python", "x = []\nwhile True: x.append('Hello World!' * 10000 + str(len(x)))"),
        ("CE", "python", "print('Hello World!'"),
    ],
    "guess": [
        ("AC", "python", _GUESS),
        ("AC", "cpp", "#include <iostream>\n#include <string>\nint main() { int l = 1, h = 1000; std::string w; while (true) { int m = (l + h) / 2; std::cout << m << std::endl; std::cin >> w; if (w == \"correct\") return 0; if (w == \"lower\") h = m - 1; else l = m + 1; } }"),
        ("WA", "python", "for i in range(1, 1001):\n    print(i, flush=True)\n    if input() == 'correct': break"),
        ("WA", "python", "print('a number', flush=True)"),
        ("TLE", "python", "print(1, flush=True)\nwhile True: pass"),
        ("RE", "python", _GUESS.replace('if word == "correct": break', 'assert word != "correct"')),
        ("CE", "cpp", "int main() { guess(); }"),
    ],
    "oddecho": [
        ("AC", "python", "n = int(input())\nwords = [input() for _ in range(n)]\nprint(*words[::2], sep='\\n')"),
        ("AC", "cpp", "#include <iostream>\n#include <string>\nint main() { int n; std::cin >> n; std::string w; for (int i = 0; i < n; i++) { std::cin >> w; if (i % 2 == 0) std::cout << w << '\\n'; } }"),
        ("WA 0.5", "python", "n = int(input())\nwords = [input() for _ in range(n)][:5]\nprint(*words[::2], sep='\\n')"),
        ("WA 0", "python", "n = int(input())\nwords = [input() for _ in range(n)]\nprint(*words, sep='\\n')"),
        ("RE 0", "python", "print(input().upper() + 1)"),
        ("TLE 0", "cpp", "int main() { for (volatile int i = 0;; i = 1); }"),
    ],
}  # fmt: skip
"""(letters and points, language, program) by problem."""


def humaneval(path: Path) -> Iterator[tuple[str, str, str]]:
    """(row, reference, right program) of each problem."""
    with gzip.open(path, "rt") as file:
        for line in file:
            row = json.loads(line)
            name = row["entry_point"]
            function = {"names": [name], "prelude": row["prompt"], "tests": f"{row['test']}\ncheck({name})"}
            yield row["task_id"], json.dumps({"function": function}), row["prompt"] + row["canonical_solution"]


def mbpp(path: Path) -> Iterator[tuple[str, str, str]]:
    """The same. What the tests use of a program is what they name and it defines; what it imports, they may use, too."""
    for line in path.read_text().splitlines():
        row = json.loads(line)
        code = row["code"].replace("\r", "")
        tests = "\n".join([row["test_setup_code"].replace("\r", ""), *row["test_list"]])
        with warnings.catch_warnings(action="ignore"):
            tree = ast.parse(code)
        used = {node.id for node in ast.walk(ast.parse(tests)) if isinstance(node, ast.Name)}
        imports = [ast.unparse(node) for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        function = {"names": sorted(_defined(tree) & used), "prelude": "\n".join(imports), "tests": tests}
        yield f"MBPP/{row['task_id']}", json.dumps({"function": function}), code


def _defined(tree: ast.Module) -> set[str]:
    names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    assigned = (target for node in tree.body if isinstance(node, ast.Assign) for target in node.targets)
    return names | {target.id for target in assigned if isinstance(target, ast.Name)}


def wrong(reference: str, program: str) -> str | None:
    """A program that fails by construction: each result becomes a list of it and more, which is no constant of the tests.

    None where the tests don't compare what a function returns by == with a constant.
    """
    return _changed(reference, program, "[_right(*a, **k), 'wrong']", number=False)


def off_by_one(reference: str, program: str) -> str | None:
    """The same, and nearer: a result that the tests compare with a whole number becomes the next one."""
    return _changed(reference, program, "_right(*a, **k) + 1", number=True)


def _changed(reference: str, program: str, result: str, *, number: bool) -> str | None:
    """The right program runs in a space of its own: one that calls itself finds itself, unchanged."""
    function = json.loads(reference)["function"]
    name = _compared(function["tests"], function["names"], number=number)
    if name is None:
        return None
    right = f"_space = {{'__name__': 'right'}}\nexec({function['prelude'] + chr(10) + program!r}, _space)\n"
    return f"{right}globals().update(_space)\n_right = _space[{name!r}]\ndef {name}(*a, **k):\n    return {result}\n"


def _compared(tests: str, names: list[str], *, number: bool) -> str | None:
    """The function whose result the tests assert to be a constant, by the first such assertion."""
    for node in ast.walk(ast.parse(tests)):
        if not (isinstance(node, ast.Assert) and isinstance(node.test, ast.Compare)):
            continue
        left, operators, right = node.test.left, node.test.ops, node.test.comparators
        if not (isinstance(left, ast.Call) and isinstance(left.func, ast.Name) and isinstance(operators[0], ast.Eq)):
            continue
        value = _constant(right[0])
        called = names[0] if left.func.id == "candidate" else left.func.id
        if value is not None and called in names and (not number or type(value) is int):
            return called
    return None


def _constant(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:
        return None
