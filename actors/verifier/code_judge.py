"""From a program and its tests to a finding: AC, WA, TLE, MLE, RE or CE, as programming contests have them.

    build (cached) -> each test in a sandbox of its own -> compare, or a checker in another sandbox
                   -> with an interactor in a second sandbox, the two joined by pipes
                   -> function tests: code_functions.py

Expected outputs stay in this process, or in the sandbox of a checker. What is not the program's fault raises: a
sandbox that broke, a checker that crashed. Knows nothing of actors and rewards.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from .case import BadReference
from .code_compare import BadAnswer, compare
from .code_languages import BINARY, ENVIRONMENT, LANGUAGES, LanguageRow
from .code_tests import Language, Program, Test, Tests
from .sandbox import Order, Outcome, RunLimits, SandboxFailed, SandboxPool
from .sandbox.keeper import PATIENCE

Letters = Literal["AC", "WA", "TLE", "MLE", "RE", "CE"]

ACCEPTED, REFUSED = 42, 43
"""Exit codes of checkers and interactors."""

BUILD_LIMITS = RunLimits(
    cpu_s=30.0, wall_s=90.0, memory_bytes=1 << 30, output_bytes=32 << 20, processes=24, open_files=256
)
CHECKER_LIMITS = RunLimits(cpu_s=20.0, wall_s=60.0, memory_bytes=1 << 30)
MAX_BINARIES = 64
LARGE = 1 << 16
"""Outputs from this size are compared on a thread."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What became of a program."""

    letters: Letters
    test: str = ""
    """The first test that it failed."""
    cpu_s: float = 0.0
    """Of the slowest run."""
    memory_bytes: int = 0
    note: str = ""
    points: float | None = None
    """Share of the points, where groups have some."""


class CheckerFailed(Exception):
    """A checker, interactor or the tests broke down: no verdict on the program."""


class CodeJudge:
    """Builds and runs programs in the sandboxes of `pool`."""

    def __init__(self, pool: SandboxPool, limits: RunLimits) -> None:
        self._pool, self._limits = pool, limits
        self._built: OrderedDict[bytes, bytes | Finding] = OrderedDict()

    async def judge(self, tests: Tests, language: Language, source: str) -> Finding:
        """The finding. Raises SandboxFailed, CheckerFailed, BadReference."""
        limits = self._limits_of(tests)
        if tests.function:
            from .code_functions import examine

            return await examine(self._pool, tests.function, source, limits)
        program = await self._prepare(language, source)
        if isinstance(program, Finding):
            return program
        trusted = tests.checker or tests.interactor
        judge = await self._trusted(trusted) if trusted else None
        return await _run_all(tests, lambda test: self._one(tests, test, program, judge, limits))

    async def _one(
        self, tests: Tests, test: Test, program: _Runnable, judge: _Runnable | None, limits: RunLimits
    ) -> Finding:
        if tests.interactor and judge:
            return await self._interact(test, program, judge, limits)
        async with self._pool.taken() as box:
            order = program.order(self._pool.python, limits)
            outcome = await box.run(order, stdin=utf8(test.input))
        found = finding_of(outcome, limits, program.row)
        if found.letters != "AC":
            return found
        if judge:
            differs = await self._check(test, outcome.stdout, judge)
        else:
            differs = await _compare(tests, test, outcome.stdout)
        return replace(found, letters="WA", note=differs) if differs else found

    async def _check(self, test: Test, output: bytes, judge: _Runnable) -> str:
        order = judge.order(self._pool.python, CHECKER_LIMITS, ["input", "answer", "feedback"], _files(test))
        async with self._pool.taken() as box:
            outcome = await box.run(order, stdin=output)
        return _judgement(outcome, "checker")

    async def _interact(self, test: Test, program: _Runnable, judge: _Runnable, limits: RunLimits) -> Finding:
        async with self._pool.taken() as one, self._pool.taken() as other:
            with contextlib.ExitStack() as stack:
                to_judge, to_program = _pipe(stack), _pipe(stack)
                python, patient = self._pool.python, replace(CHECKER_LIMITS, wall_s=PATIENCE * limits.wall_s + 10)
                talk = other.run(
                    judge.order(python, patient, ["input", "answer", "feedback"], _files(test)),
                    stdin=to_judge.take(0), stdout=to_program.take(1),
                )  # fmt: skip
                run = one.run(program.order(python, limits), stdin=to_program.take(0), stdout=to_judge.take(1))
                outcome, judged = await both(run, talk)
        found = finding_of(outcome, limits, program.row)
        if found.letters in ("TLE", "MLE") or (found.letters == "RE" and judged.code not in (ACCEPTED, REFUSED)):
            return found
        if differs := _judgement(judged, "interactor"):
            return replace(found, letters="WA", note=differs)
        return found

    async def _prepare(self, language: Language, source: str) -> _Runnable | Finding:
        row = LANGUAGES[language]
        if row.build is None:
            return _Runnable(row, row.source, utf8(source), 0o444)
        key = hashlib.blake2b(f"{language}\0{source}".encode("utf-8", "surrogatepass"), digest_size=16).digest()
        built = self._built.get(key)
        if built is None:
            built = self._built[key] = await self._build(row, row.build, source)
            while len(self._built) > MAX_BINARIES:
                self._built.popitem(last=False)
        self._built.move_to_end(key)
        return built if isinstance(built, Finding) else _Runnable(row, BINARY, built, 0o555)

    async def _build(self, row: LanguageRow, command: Callable[[], Sequence[str]], source: str) -> bytes | Finding:
        try:
            argv = command()
        except LookupError as error:
            raise CheckerFailed(str(error)) from None
        outcome = await self._pool.run_cold(
            Order(
                argv=argv,
                files={row.source: (utf8(source), 0o444)},
                environment=ENVIRONMENT,
                limits=BUILD_LIMITS,
                collect=BINARY,
            )
        )
        if outcome.code == 0 and outcome.collected:
            return outcome.collected
        if outcome.stopped == "wall":
            raise SandboxFailed(f"the compiler was not done within {outcome.wall_s:.0f} s; is the machine too busy?")
        why = f"the compiler was stopped: {outcome.stopped}" if outcome.stopped else tail(outcome.stderr, 400)
        return Finding(letters="CE", note=why, cpu_s=outcome.cpu_s, memory_bytes=outcome.memory_bytes)

    async def _trusted(self, program: Program) -> _Runnable:
        ready = await self._prepare(program.language, program.source)
        if isinstance(ready, Finding):
            raise BadReference(f"the checker can't be compiled: {ready.note}")
        return ready

    def _limits_of(self, tests: Tests) -> RunLimits:
        own = tests.limits
        given = {"cpu_s": own.cpu_s, "wall_s": own.wall_s, "memory_bytes": own.memory_bytes}
        if own.cpu_s and not own.wall_s:
            given["wall_s"] = max(self._limits.wall_s, 3 * own.cpu_s)
        return replace(self._limits, **{name: value for name, value in given.items() if value})  # type: ignore[arg-type]


@dataclass(frozen=True)
class _Runnable:
    """A program that is ready to be run, as often as there are tests."""

    row: LanguageRow
    name: str
    content: bytes
    mode: int

    def order(
        self,
        python: str,
        limits: RunLimits,
        arguments: Sequence[str] = (),
        files: Mapping[str, tuple[bytes, int]] | None = None,
    ) -> Order:
        return Order(
            argv=[*self.row.run(python), *arguments],
            files={**(files or {}), self.name: (self.content, self.mode)},
            environment={**ENVIRONMENT, **(self.row.environment or {})},
            limits=limits,
        )


class _pipe:
    """A pipe; an end that nobody took is closed with the block."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self._ends: list[int | None] = list(os.pipe2(os.O_CLOEXEC))
        stack.callback(self._close)

    def take(self, end: int) -> int:
        fd, self._ends[end] = self._ends[end], None
        assert fd is not None
        return fd

    def _close(self) -> None:
        for fd in self._ends:
            if fd is not None:
                os.close(fd)


def finding_of(outcome: Outcome, limits: RunLimits, row: LanguageRow) -> Finding:
    """What a run says by itself: AC if there is nothing against it."""
    memory = row.out_of_memory.search(outcome.stderr[-4096:])
    letters: Letters
    if outcome.stopped in ("cpu", "wall") or outcome.cpu_s > limits.cpu_s:
        letters, note = "TLE", outcome.stopped or "cpu"
    elif outcome.stopped == "memory" or outcome.memory_bytes > limits.memory_bytes or (outcome.code and memory):
        letters, note = "MLE", ""
    elif outcome.stopped:
        letters, note = "RE", f"too many {outcome.stopped}"
    elif outcome.code and row.syntax_error and row.syntax_error.match(outcome.stderr):
        letters, note = "CE", tail(outcome.stderr)
    elif outcome.code or len(outcome.stdout) >= limits.output_bytes:
        letters, note = "RE", tail(outcome.stderr) or f"exit code {outcome.code}"
    else:
        letters, note = "AC", ""
    return Finding(letters=letters, cpu_s=outcome.cpu_s, memory_bytes=outcome.memory_bytes, note=note)


def utf8(text: str) -> bytes:
    """As a file; half a surrogate pair becomes a question mark."""
    return text.encode("utf-8", "replace")


def tail(text: bytes, chars: int = 200) -> str:
    """The last of it that can be printed in a line."""
    return " ".join(text[-8 * chars :].decode(errors="replace").split())[-chars:]


async def both(
    first: Coroutine[None, None, Outcome], second: Coroutine[None, None, Outcome]
) -> tuple[Outcome, Outcome]:
    """Runs two at the same time; if one fails, the other is given up. Raises SandboxFailed."""
    try:
        async with asyncio.TaskGroup() as tasks:
            one, other = tasks.create_task(first), tasks.create_task(second)
    except* SandboxFailed as failures:
        raise failures.exceptions[0] from None
    return one.result(), other.result()


async def _run_all(tests: Tests, run: Callable[[Test], Awaitable[Finding]]) -> Finding:
    """One test after the other. The first failure ends it, or where groups have points, ends its group."""
    first: Finding | None = None
    failed: set[str] = set()
    cpu_s, memory = 0.0, 0
    for number, test in enumerate(tests.tests, 1):
        if test.group and test.group in failed:
            continue
        found = await run(test)
        cpu_s, memory = max(cpu_s, found.cpu_s), max(memory, found.memory_bytes)
        if found.letters != "AC":
            failed.add(test.group)
            first = first or replace(found, test=test.name or str(number))
            if not tests.groups:
                break
    points = None
    if total := sum(tests.groups.values()):
        points = sum(worth for group, worth in tests.groups.items() if group not in failed) / total
    return replace(first or Finding(letters="AC"), cpu_s=cpu_s, memory_bytes=memory, points=points)


async def _compare(tests: Tests, test: Test, output: bytes) -> str:
    def work() -> str:
        return compare(
            output, utf8(test.output), tests.compare, tolerance=tests.tolerance, ignore_case=tests.ignore_case
        )

    try:
        return await asyncio.to_thread(work) if len(output) + len(test.output) > LARGE else work()
    except BadAnswer as error:
        raise BadReference(f"test {test.name}: {error}") from None


def _judgement(outcome: Outcome, who: str) -> str:
    """ "" where a checker or interactor accepts, its reason where it refuses. Raises CheckerFailed where it breaks."""
    if outcome.stopped or outcome.code not in (ACCEPTED, REFUSED):
        how = f"stopped: {outcome.stopped}" if outcome.stopped else f"ended with {outcome.code}"
        raise CheckerFailed(f"the {who} {how}, not with 42 or 43: {tail(outcome.stderr)}")
    return "" if outcome.code == ACCEPTED else tail(outcome.stderr) or f"the {who} says so"


def _files(test: Test) -> dict[str, tuple[bytes, int]]:
    return {"input": (utf8(test.input), 0o444), "answer": (utf8(test.output), 0o444)}
