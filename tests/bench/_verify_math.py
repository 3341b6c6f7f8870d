"""Verdicts on mathematics: agreement with labels, speed, and what hostile answers can do. Serves verify.py.

agreement     share of the labels of ../shared/data/verifier_triples that the verdicts repeat; each other one is said.
speed         verdicts a second of two workers on the 1000 model solutions of gsm8k, no two alike, nothing cached.
hostile set   tests/hostile_answers.py: each must end in a verdict that is no error, and run nothing.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from headrace.actors.types import Verdict
from headrace.actors.verifier import Case
from headrace.actors.verifier.judging import ByWorkers
from headrace.actors.verifier.policies import MATH_POLICIES
from headrace.actors.verifier.workers import Limits
from headrace.benchmark import ROOT, Figures, Say

DATA = ROOT.parent / "shared" / "data"
FILES = ("math_verify_tests", "gsm8k_model_solutions_1000", "seed_report")
WORKERS = 2
SECRET = "HEADRACE_BENCH_SECRET"
HOSTILE_LIMITS = Limits(cpu_s=1.0, wall_s=60.0)

Timed = tuple[Verdict, float]


def measure_math(say: Say) -> dict[str, float | None]:
    """All figures of this part; None where the data are not on this machine."""
    figures = asyncio.run(_measure(say))
    return dict(figures)


async def _measure(say: Say) -> Figures:
    figures: dict[str, float | None] = {}
    agreed = total = 0
    for name in FILES:
        rows = _rows(f"verifier_triples/{name}.jsonl")
        good = await _agreement(name, rows, say) if rows else None
        figures[f"math_agreement_{name}_ratio"] = good / len(rows) if good is not None else None
        agreed, total = agreed + (good or 0), total + len(rows)
    figures["math_agreement_ratio"] = agreed / total if total else None
    figures["math500_self_ratio"] = await _itself(_rows("math500/test.jsonl"), say)
    figures["math_verdicts_per_s"] = await _speed(_rows(f"verifier_triples/{FILES[1]}.jsonl"), say)
    return figures | await _hostile(say)


async def _agreement(name: str, rows: Sequence[dict[str, Any]], say: Say) -> int:
    cases = [_case(row) for row in rows]
    policies = {_dataset(row): _policy(row) for row in rows}
    verdicts, _ = await _judge(cases, policies | {"": {}}, Limits())
    good = 0
    for row, (verdict, _) in zip(rows, verdicts, strict=True):
        if verdict.error or verdict.correct != bool(row["label"]):
            found = verdict.error or ("correct" if verdict.correct else f"incorrect ({verdict.note})")
            say(f"{row['id']}: label {row['label']}, {found}; {row['reference']!r}, {row['response'][-80:]!r}")
        else:
            good += 1
    say(f"{name}: {good} of {len(rows)} verdicts agree with the labels")
    return good


async def _itself(rows: Sequence[dict[str, Any]], say: Say) -> float | None:
    if not rows:
        return None
    cases = [Case(reference=r["answer"], response=f"So \\boxed{{{r['answer']}}}.", row=r["answer"]) for r in rows]
    policy = {"decimal_comma": MATH_POLICIES["math500"].decimal_comma}
    verdicts, _ = await _judge(cases, {"": policy}, Limits())
    for case, (verdict, _) in zip(cases, verdicts, strict=True):
        if not verdict.correct:
            say(f"math500: {case.reference!r} is not itself: {verdict.error or verdict.note}")
    return sum(verdict.correct for verdict, _ in verdicts) / len(cases)


async def _speed(rows: Sequence[dict[str, Any]], say: Say) -> float | None:
    if not rows:
        return None
    verdicts, seconds = await _judge([_case(row) for row in rows], {"": {}}, Limits())
    say(f"{len(verdicts)} verdicts by {WORKERS} workers in {seconds:.2f} s")
    return len(verdicts) / seconds


async def _hostile(say: Say) -> Figures:
    answers = _hostile_answers()
    with tempfile.TemporaryDirectory() as folder:
        marker = Path(folder) / "marker"
        os.environ[SECRET] = "sesame"
        texts = [text.replace(answers.MARKER, str(marker)) for text in answers.dressed()]
        cases = [Case(reference=answers.WANTED, response=text, row=text[:60]) for text in texts]
        verdicts, seconds = await _judge(cases, {"": {}}, HOSTILE_LIMITS)
        del os.environ[SECRET]
        ran = int(marker.exists()) + sum("sesame" in verdict.note + verdict.error for verdict, _ in verdicts)
    bad = [(c.row, v) for c, (v, _) in zip(cases, verdicts, strict=True) if v.error or v.correct]
    for row, verdict in bad:
        say(f"hostile {row!r}: {verdict.error or 'accepted'}")
    stopped = sum(verdict.note.startswith("past the limits") for verdict, _ in verdicts)
    say(f"{len(cases)} hostile answers in {seconds:.1f} s; {stopped} had to be stopped; {ran} ran code")
    return {
        "hostile_cases": len(cases),
        "hostile_verdict_ratio": 1 - len(bad) / len(cases),
        "hostile_stopped": stopped,
        "hostile_code_runs": ran,
        "hostile_slowest_s": max(seconds for _, seconds in verdicts),
        "hostile_total_s": seconds,
    }


async def _judge(cases: Sequence[Case], policies: dict[str, Any], limits: Limits) -> tuple[list[Timed], float]:
    """Verdicts with their seconds, and the seconds of all. The workers are up before the clock starts."""
    judging = ByWorkers.rule("math", policies, workers=WORKERS, limits=limits)
    queue = iter(range(len(cases)))
    timed: dict[int, Timed] = {}

    async def work() -> None:
        for i in queue:
            started = time.perf_counter()
            verdict = await judging.judge(cases[i])
            timed[i] = verdict, time.perf_counter() - started

    try:
        await asyncio.gather(*(judging.judge(Case(reference="1/2", response="$0.5$")) for _ in range(WORKERS)))
        started = time.perf_counter()
        await asyncio.gather(*(work() for _ in range(WORKERS)))
        seconds = time.perf_counter() - started
    finally:
        await judging.close()
    return [timed[i] for i in range(len(cases))], seconds


def _case(row: dict[str, Any]) -> Case:
    return Case(reference=row["reference"], response=row["response"], dataset=_dataset(row), row=row["id"])


def _dataset(row: dict[str, Any]) -> str:
    """Rows that ask for settings of their own are data sets of their own."""
    return json.dumps(row["meta"]) if _policy(row) else ""


def _policy(row: dict[str, Any]) -> dict[str, Any]:
    names = {"precision": "decimals", "strict": "same_variables", "allow_set_relation_comp": "relations_as_sets"}
    return {names[key]: value for key, value in row["meta"].items() if key in names}


def _rows(name: str) -> list[dict[str, Any]]:
    path = DATA / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def _hostile_answers() -> ModuleType:
    spec = importlib.util.spec_from_file_location("hostile_answers", Path(__file__).parents[1] / "hostile_answers.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
