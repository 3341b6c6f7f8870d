"""Function tests: the response serves calls in one sandbox, the tests make them in another (inside/).

    candidate: response  <--- calls, values as data --->  examiner: tests, and functions that stand for the response's

The report is the examiner's, whose process never holds a line of the response. Where that ends early, its own sandbox
says why.
"""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import replace

from .case import BadReference
from .code_judge import CheckerFailed, Finding, both, finding_of, tail, utf8
from .code_languages import ENVIRONMENT, LANGUAGES
from .code_tests import FunctionTests
from .inside import program
from .sandbox import Order, Outcome, RunLimits, SandboxPool
from .sandbox.keeper import PATIENCE

PATIENCE_S = 10.0
"""How much longer the examiner may take than the response, so that what hangs is the response."""

_NOT_BUILT = ("SyntaxError", "IndentationError", "TabError")


async def examine(pool: SandboxPool, tests: FunctionTests, source: str, limits: RunLimits) -> Finding:
    """The finding on a response. Raises SandboxFailed, CheckerFailed, BadReference."""
    row = LANGUAGES["python"]
    prelude = _file(tests.prelude)
    shared = {"plain.py": (program("plain"), 0o444), "prelude.py": prelude}
    environment = {**ENVIRONMENT, **(row.environment or {})}

    def order(name: str, limits: RunLimits, text: tuple[str, str]) -> Order:
        files = {**shared, f"{name}.py": (program(name), 0o444), text[0]: _file(text[1])}
        return Order(
            argv=[pool.python, f"{name}.py", *tests.names], files=files, environment=environment, limits=limits
        )

    patient = replace(
        limits, wall_s=PATIENCE * limits.wall_s + PATIENCE_S, memory_bytes=max(limits.memory_bytes, 1 << 30)
    )
    async with pool.taken() as one, pool.taken() as other:
        with contextlib.ExitStack() as stack:
            asked, answered = os.pipe2(os.O_CLOEXEC), os.pipe2(os.O_CLOEXEC)
            serving = one.run(order("candidate", limits, ("main.py", source)), more=(asked[0], answered[1]))
            asking = other.run(order("examiner", patient, ("tests.py", tests.tests)), more=(answered[0], asked[1]))
            stack.callback(serving.close)
            stack.callback(asking.close)
            served, examined = await both(serving, asking)
    return _conclude(served, examined, finding_of(served, limits, row))


def _conclude(served: Outcome, examined: Outcome, alone: Finding) -> Finding:
    try:
        report = json.loads(examined.stdout)
        found, text = report["found"], str(report.get("text", ""))
    except (ValueError, KeyError, TypeError):
        raise CheckerFailed(
            f"the tests ended with {examined.code} {examined.stopped}: {tail(examined.stderr)}"
        ) from None
    if found == "bad tests":
        raise BadReference(f"the tests fail by themselves: {text}")
    if found == "passed":
        return replace(alone, letters="AC", note="")
    if found == "failed":
        return replace(alone, letters="WA", note=text)
    if found == "raised":
        return replace(alone, letters="MLE" if text.startswith("MemoryError") else "RE", note=text)
    if found == "not loaded":
        kind = str(report.get("type", ""))
        letters = "CE" if kind in _NOT_BUILT else "MLE" if kind == "MemoryError" else "RE"
        return replace(alone, letters=letters, note=f"{kind}: {text}")  # type: ignore[arg-type]
    if alone.letters in ("TLE", "MLE"):
        return alone
    return replace(alone, letters="RE", note=alone.note or "ended before the tests did")


def _file(text: str) -> tuple[bytes, int]:
    return utf8(text), 0o444
