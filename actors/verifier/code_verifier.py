"""The verifier for answers that are programs: Python and C++, against tests, in sandboxes (sandbox/).

[actors.verifier]
class = "headrace.actors.verifier:CodeVerifier"
language = "python"                               what responses are written in, where the tests don't say
tests = "data/tests"                              the folder of references that are paths

[actors.verifier.limits]
cpu_s = 10.0
memory_bytes = 536870912

A reference is the JSON text of code_tests.py. Where no sandbox can be had, the actor does not start and says why.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass, field
from typing import Annotated

from annotated_types import Ge

from ...runtime import message
from ..types import Verdict
from .case import BadReference, Case
from .code_extract import find_program
from .code_judge import CheckerFailed, CodeJudge, Finding
from .code_tests import Language, read_tests
from .court import Care
from .hearing import CourtVerifier
from .judging import failed
from .sandbox import RunLimits, SandboxFailed, SandboxPool
from .sandbox.bubble import Isolation


def _patient() -> Care:
    return Care(deadline_s=300.0)


@dataclass(kw_only=True)
class CodeVerifier(CourtVerifier):
    """Judges programs. Whatever they do costs their own sandboxes, never the actor.

    A note begins with AC, WA, TLE, MLE, RE or CE.
    """

    language: Language = "python"
    """Of the responses, where the tests name none."""
    tests: str = ""
    """The folder below which references may name files; "" = references are JSON texts only."""
    fenced: bool = True
    """Whether a response holds its program in a ``` block, or is the program."""
    places: Annotated[int, Ge(1)] = 2
    """Responses that are judged at a time."""
    warm: Annotated[int, Ge(1)] = 4
    """Sandboxes that are started ahead."""
    limits: RunLimits = field(default_factory=RunLimits)
    """What one run of a program may use; tests may say otherwise."""
    isolation: Isolation = field(default_factory=Isolation)
    """How sandboxes are made."""
    care: Care = field(default_factory=_patient)
    """Deadline, retries, cache."""

    async def start(self) -> None:
        self._pool = SandboxPool(self.isolation, warm=self.warm)
        await self._pool.start()
        self._judge = CodeJudge(self._pool, self.limits)
        self.open_court(self._attempt, places=self.places)
        self._letters: Counter[str] = Counter()

    async def stop(self, reason: BaseException | None) -> None:
        await self._pool.close()

    @message(concurrent=True)
    async def stats(self) -> dict[str, float]:
        """Counts of verdicts, of letters, of errors by kind; cache hits, retries, latency quantiles in seconds."""
        return await super().stats() | {f"letters_{name}": float(n) for name, n in self._letters.items()}

    @message(concurrent=True)
    async def isolated_by(self) -> str:
        """What holds the programs, in words."""
        return self._pool.describe()

    async def _attempt(self, case: Case) -> Verdict:
        try:
            tests = await asyncio.to_thread(read_tests, case.reference, self.tests)
            language: Language = "python" if tests.function else tests.language or self.language
            found = find_program(case.response, [language], fenced=self.fenced)
            if found is None:
                return self._verdict(Finding(letters="CE", note=f"no whole block of {language} in the response"))
            return self._verdict(await self._judge.judge(tests, *found))
        except BadReference as error:
            return failed(case, str(error), "bad reference")
        except CheckerFailed as error:
            return failed(case, str(error), "checker", retryable=True)
        except SandboxFailed as error:
            return failed(case, str(error), "sandbox", retryable=True)

    def _verdict(self, found: Finding) -> Verdict:
        self._letters[found.letters] += 1
        where = f" on test {found.test}" if found.test else ""
        used = f" ({found.cpu_s:.2f} s, {found.memory_bytes >> 20} MiB)" if found.cpu_s else ""
        note = f"{found.letters}{where}{used}{': ' if found.note else ''}{found.note}"
        return Verdict(correct=found.letters == "AC", reward=found.points, note=note[:400])
