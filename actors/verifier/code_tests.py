"""What a program is judged by: the JSON text of `Case.reference`, or a path to a file or package that holds it.

    {"tests": [{"input": "1 2\n", "output": "3\n"}, ...], "compare": "token", "tolerance": 1e-6}
    {"tests": [...], "checker": {"language": "python", "source": "..."}}        Kattis: input answer feedback < output
    {"tests": [...], "interactor": {"language": "cpp", "source": "..."}}        the same, talking with the program
    {"function": {"names": ["add"], "tests": "assert add(1, 2) == 3"}}          Python functions

Knows nothing of sandboxes and verdicts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, Gt, MinLen

from .case import BadReference
from .code_compare import Mode

Language = Literal["python", "cpp"]
MAX_REFERENCE_BYTES = 256 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Test:
    """One run of a program."""

    input: str = ""
    output: str = ""
    """What is expected; what the checker or interactor gets as its answer file."""
    group: str = ""
    """Whose points it decides about, with `groups`."""
    name: str = ""
    """For messages."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Program:
    """A program that we trust to judge, not to be harmless: it reads hostile output, so it is sandboxed, too."""

    language: Language
    source: str


@dataclass(frozen=True, kw_only=True, slots=True)
class FunctionTests:
    """Tests of Python functions: plain code that calls them, asserting."""

    names: Annotated[list[str], MinLen(1)]
    """What the response has to define, and the tests use of it."""
    tests: str
    prelude: str = ""
    """Code that runs before the response, and before the tests: imports, helpers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TestLimits:
    """Where they differ from the verifier's own."""

    cpu_s: Annotated[float, Gt(0)] | None = None
    wall_s: Annotated[float, Gt(0)] | None = None
    memory_bytes: Annotated[int, Ge(1 << 20)] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Tests:
    """All that one response is judged by."""

    language: Literal["python", "cpp", ""] = ""
    """Which languages may be answered in; "" = the verifier's."""
    tests: list[Test] = field(default_factory=list)
    compare: Mode = "token"
    tolerance: Annotated[float, Ge(0)] = 0.0
    ignore_case: bool = False
    checker: Program | None = None
    interactor: Program | None = None
    groups: dict[str, Annotated[float, Ge(0)]] = field(default_factory=dict)
    """Points for a group whose tests all pass: the verdict has a reward, its share of all points."""
    function: FunctionTests | None = None
    limits: TestLimits = TestLimits()

    def __post_init__(self) -> None:
        if bool(self.tests) == bool(self.function):
            raise ValueError("there must be tests or function, one of them")
        if self.checker and self.interactor:
            raise ValueError("there may be a checker or an interactor, not both")
        unknown = {test.group for test in self.tests} - set(self.groups) if self.groups else set()
        if unknown - {""}:
            raise ValueError(f"groups has no points for {sorted(unknown - {''})}")


def read_tests(reference: str, folder: str = "") -> Tests:
    """The tests that `reference` holds or, if it is no JSON object, that the file at this path below `folder` holds.

    Raises BadReference that says what is wrong.
    """
    if reference.lstrip().startswith("{"):
        return _parse(reference)
    root = Path(folder or ".").resolve()
    path = (root / reference).resolve()
    if not folder or root not in path.parents:
        raise BadReference(
            f"the reference is neither a JSON object nor a path below the folder of tests: {reference[:80]!r}"
        )
    try:
        if path.stat().st_size > MAX_REFERENCE_BYTES:
            raise BadReference(f"{path}: longer than {MAX_REFERENCE_BYTES} bytes")
        return _parse(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise BadReference(f"{path}: {error}") from None


@lru_cache(maxsize=256)
def _parse(text: str) -> Tests:
    from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config

    try:
        tests: Tests = TypeAdapter(with_config(ConfigDict(extra="forbid"))(Tests)).validate_json(text)
        return tests
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, problem["loc"]))
        raise BadReference(f"the tests can't be read: {where}{': ' if where else ''}{problem['msg']}") from None


def kattis_package(folder: Path, *, checker: Program | None = None, interactor: Program | None = None) -> Tests:
    """The tests of a problem package of Kattis' format: samples, then secret tests, in groups where they have points.

    Programs of the package are not looked for: `checker` and `interactor` stand in. Raises BadReference.
    """
    points: dict[str, float] = {}
    tests = []
    for path in sorted((folder / "data").rglob("*.in")):
        group = path.parent.relative_to(folder / "data").as_posix()
        settings = _flat(path.parent / "testdata.yaml")
        if group.count("/") and float(settings.get("accept_score", 0)):
            points[group] = float(settings["accept_score"])
        answer = path.with_suffix(".ans")
        try:
            found = Test(
                input=_content(path), output=_content(answer) if answer.exists() else "",
                group=group, name=f"{group}/{path.stem}",
            )  # fmt: skip
        except (OSError, UnicodeDecodeError) as error:
            raise BadReference(f"{path}: {error}") from None
        tests.append(found)
    if not tests:
        raise BadReference(f"{folder}: no tests (data/**/*.in) there")
    flags = _flat(folder / "problem.yaml").get("validator_flags", "").split()
    tolerance = [float(value) for name, value in pairwise(flags) if name == "float_tolerance"]
    return Tests(
        tests=[test if test.group in points else replace(test, group="") for test in tests],
        checker=checker, interactor=interactor, groups=points, tolerance=max(tolerance, default=0.0),
        compare="line" if "space_change_sensitive" in flags else "token", ignore_case="case_sensitive" not in flags,
    )  # fmt: skip


def _content(path: Path) -> str:
    """The text of a file, or of the one that it stands for: a checkout without links holds their targets as text."""
    text = path.read_text()
    if len(text) < 200 and text.startswith("../") and not text.split()[1:]:
        target = path.parent / text.strip()
        return target.read_text() if target.is_file() and target.suffix == path.suffix else text
    return text


def _flat(path: Path) -> Mapping[str, str]:
    """The settings of a YAML file that stand in one line at its margin."""
    if not path.exists():
        return {}
    lines = (line.partition("#")[0].partition(":") for line in path.read_text().splitlines() if line[:1].isalpha())
    return {name: value.strip() for name, _, value in lines}
