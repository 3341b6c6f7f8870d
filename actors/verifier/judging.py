"""From a case to a verdict by one attempt: in this process for rules that always end, else by a pool of workers.

A response that is too much for its process (processor time, memory, a crash of its own) is incorrect, if the reference
alone is not: that is looked at in such a case only. What went wrong otherwise is an error. Of a user's function nothing
is known, so there everything is an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from ..types import Verdict
from .case import PAST_LIMITS, BadReference, Case
from .policies import build_policy
from .registry import rule as find_rule
from .worker import Report
from .workers import Limits, WorkerFailed, WorkerPool

Policies = Mapping[str, Mapping[str, Any]]


def failed(case: Case, text: str, kind: str, *, retryable: bool = False) -> Verdict:
    """An error value that names the row."""
    where = f"{case.row}: " if case.row else ""
    return Verdict(correct=False, error=_sendable(f"{where}{text}"), kind=kind, retryable=retryable)


class InProcess:
    """Judges by a rule that always ends soon. `policies` are by data set; "" is that of all others."""

    def __init__(self, name: str, policies: Policies) -> None:
        rule = find_rule(name)
        self._judge, _ = rule.load()
        self._policies: dict[str, Any] = {
            dataset: build_policy(rule.policy, values) for dataset, values in policies.items()
        }

    async def judge(self, case: Case) -> Verdict:
        try:
            return self._judge(case, self._policies.get(case.dataset, self._policies[""]))
        except BadReference as error:
            return failed(case, str(error), "bad reference")

    async def close(self) -> None:
        pass


class ByWorkers:
    """Judges in processes that may be killed: by a rule, or by a user's function."""

    def __init__(self, pool: WorkerPool, *, blames_response: bool) -> None:
        self._pool, self._blames_response = pool, blames_response

    @classmethod
    def rule(cls, name: str, policies: Policies, *, workers: int, limits: Limits) -> ByWorkers:
        arguments = {"name": name, "policies": {key: dict(values) for key, values in policies.items()}}
        return cls(WorkerPool("rule", arguments, size=workers, limits=limits, harden=True), blames_response=True)

    @classmethod
    def function(cls, path: str, options: Mapping[str, Any], *, workers: int, limits: Limits) -> ByWorkers:
        arguments = {"path": path, "options": dict(options)}
        return cls(WorkerPool("function", arguments, size=workers, limits=limits, harden=False), blames_response=False)

    async def judge(self, case: Case) -> Verdict:
        try:
            report = await self._pool.run(_request(case))
            if report.get("own_fault") and self._blames_response:
                return await self._past_limits(case, report["ended"])
        except WorkerFailed as error:
            return failed(
                case, str(error), "worker died" if error.retryable else "no worker", retryable=error.retryable
            )
        return _verdict(case, report)

    async def close(self) -> None:
        await self._pool.close()

    async def _past_limits(self, case: Case, how: str) -> Verdict:
        report = await self._pool.run(_request(case, only_reference=True))
        if report.get("reference_is_good"):
            return Verdict(correct=False, note=f"{PAST_LIMITS}{how}")
        if report.get("own_fault"):
            return failed(case, f"the reference is past the limits: {report['ended']}", "bad reference")
        return _verdict(case, report)


def _request(case: Case, *, only_reference: bool = False) -> dict[str, Any]:
    return {"case": asdict(case), "only_reference": only_reference}


def _verdict(case: Case, report: Report) -> Verdict:
    if "verdict" in report:
        verdict = Verdict(**report["verdict"])
        if verdict.error:
            return failed(case, verdict.error, verdict.kind, retryable=verdict.retryable)
        verdict.note = _sendable(verdict.note)
        return verdict
    if "bad_reference" in report:
        return failed(case, report["bad_reference"], "bad reference")
    if "timeout" in report:
        return failed(case, "the worker ran out of time and was killed", "timeout", retryable=True)
    retryable = not report["own_fault"]
    return failed(case, f"the worker ended: {report['ended']}", "worker died", retryable=retryable)


def _sendable(text: str) -> str:
    """`text` with what is no character spelled out: half a surrogate pair can't be sent on."""
    return text.encode("utf-8", "backslashreplace").decode()
