"""Verdicts on programs: right ones, wrong ones, attacks, and what a sandbox costs. Serves verify.py.

right and wrong   programs of ours for the Kattis examples, each with its verdict; the solutions of HumanEval and MBPP;
                  and of both, programs that are wrong by construction (tests/code_programs.py)
start overhead    a program in a warm sandbox against the same as a plain process, in turns; difference of the medians
attacks           tests/code_attacks.py, and what the host has more of afterwards
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import re
import secrets
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from headrace.actors.types import Verdict
from headrace.actors.verifier import Case, CodeVerifier
from headrace.actors.verifier.code_judge import CodeJudge
from headrace.actors.verifier.code_tests import Program, Tests, kattis_package
from headrace.actors.verifier.court import Care
from headrace.actors.verifier.sandbox import Order, RunLimits, SandboxPool, SandboxUnavailable
from headrace.actors.verifier.sandbox.bubble import Isolation, user
from headrace.benchmark import ROOT, Bar, Figures, Say

DATA = ROOT.parent / "shared" / "data"
CARE = Care(deadline_s=300.0, cache_size=0)
PLACES, WARM = 2, 6
KATTIS_LIMITS = RunLimits(cpu_s=2.0, wall_s=60.0, memory_bytes=256 << 20)
ATTACK_LIMITS = RunLimits(cpu_s=1.0, wall_s=8.0, memory_bytes=128 << 20, output_bytes=1 << 20)
TURNS = 60
PROGRAM = b"print(sum(map(int, input().split())))"
SETTLE_S = 30.0
"""The kernel takes down namespaces and their memory in its own time: harm is what is still there after this."""
MEMORY_SLACK = 512 << 20
"""Others use this machine, too: less than this is no sign of harm."""

BARS = [
    Bar("code_kattis_programs", ">=", 20),
    Bar("code_kattis_right_ratio", ">=", 1.0),
    Bar("code_humaneval_accepted_ratio", ">=", 1.0),
    Bar("code_mbpp_accepted_ratio", ">=", 1.0),
    Bar("code_wrong_programs", ">=", 1000),
    Bar("code_wrong_accepted", "<=", 0),
    Bar("code_start_overhead_s", "<=", 0.030),
    Bar("code_attacks", ">=", 40),
    Bar("code_attacks_right_ratio", ">=", 1.0),
    Bar("code_host_harm", "<=", 0),
]


def measure_code(say: Say) -> Figures:
    """All figures of this part; None where the data, or sandboxes, are not on this machine."""
    try:
        return asyncio.run(_measure(say))
    except SandboxUnavailable as error:
        say(f"code: {error}")
        return {bar.name: None for bar in BARS}


async def _measure(say: Say) -> Figures:
    figures = await _overhead(say)
    figures |= await _kattis(say)
    figures |= await _functions(say)
    return figures | await _attacks(say)


async def _overhead(say: Say) -> dict[str, float | None]:
    pool = SandboxPool(Isolation(), warm=WARM)
    await pool.start()
    say(f"code: {pool.describe()}")
    order = Order(argv=[pool.python, "main.py"], files={"main.py": (PROGRAM, 0o444)})
    plain, boxed = [], []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "main.py"
        path.write_bytes(PROGRAM)
        try:
            for _ in range(TURNS):
                await asyncio.sleep(0.1)  # The sandbox that was used is replaced meanwhile: a warm start is measured.
                began = time.perf_counter()
                done = await asyncio.to_thread(
                    subprocess.run, [pool.python, str(path)], input=b"20 22", capture_output=True, env={}
                )
                plain.append(time.perf_counter() - began)
                began = time.perf_counter()
                outcome = await pool.run(order, stdin=b"20 22")
                boxed.append(time.perf_counter() - began)
                assert outcome.stdout == done.stdout == b"42\n"
            began = time.perf_counter()
            await asyncio.gather(*(pool.run(order, stdin=b"1 2") for _ in range(200)))
            per_s = 200 / (time.perf_counter() - began)
        finally:
            await pool.close()
    figures: dict[str, float | None] = {
        "code_plain_run_s": statistics.median(plain),
        "code_sandboxed_run_s": statistics.median(boxed),
        "code_start_overhead_s": statistics.median(boxed) - statistics.median(plain),
        "code_runs_per_s": per_s,
    }
    say(f"a run: {statistics.median(boxed):.4f} s in a warm sandbox, {statistics.median(plain):.4f} s plain")
    return figures


async def _kattis(say: Say) -> dict[str, float | None]:
    programs = _tests_module("code_programs")
    if not (DATA / "kattis_examples").is_dir():
        return dict.fromkeys(("code_kattis_programs", "code_kattis_right_ratio"))
    pool = SandboxPool(Isolation(), warm=WARM)
    await pool.start()
    judge = CodeJudge(pool, KATTIS_LIMITS)
    right = total = 0
    try:
        for problem, written in programs.PROGRAMS.items():
            tests = _kattis_tests(problem, programs)
            for expected, language, source in written:
                found = await judge.judge(tests, language, source)
                shown = found.letters if found.points is None else f"{found.letters} {found.points:g}"
                good = shown == expected or (expected == "AC" and found.letters == "AC")
                right, total = right + good, total + 1
                if not good:
                    say(f"{problem}, {language}: {shown} {found.note}, expected {expected}: {source[:60]!r}")
    finally:
        await pool.close()
    say(f"Kattis: {right} of {total} programs have their verdict")
    return {"code_kattis_programs": total, "code_kattis_right_ratio": right / total}


def _kattis_tests(problem: str, programs: ModuleType) -> Tests:
    folder = DATA / "kattis_examples" / problem
    interactor = Program(language="python", source=programs.GUESS_JUDGE) if problem == "guess" else None
    return kattis_package(folder, interactor=interactor)


async def _functions(say: Say) -> dict[str, float | None]:
    programs = _tests_module("code_programs")
    figures: dict[str, float | None] = {}
    wrong: list[Case] = []
    sets: list[tuple[str, Path, Callable[[Path], Iterator[tuple[str, str, str]]]]] = [
        ("humaneval", DATA / "humaneval" / "HumanEval.jsonl.gz", programs.humaneval),
        ("mbpp", DATA / "mbpp" / "mbpp.jsonl", programs.mbpp),
    ]
    for name, path, read in sets:
        rows = list(read(path)) if path.is_file() else []
        right = [Case(reference=reference, response=program, row=row) for row, reference, program in rows]
        for row, reference, program in rows:
            changed = [programs.wrong(reference, program), programs.off_by_one(reference, program)]
            wrong += [Case(reference=reference, response=text, row=row) for text in changed if text]
        verdicts, seconds = await _judge(right, RunLimits(cpu_s=10.0, wall_s=60.0))
        for case, verdict in zip(right, verdicts, strict=True):
            if not verdict.correct:
                say(f"{case.row}: {verdict.error or verdict.note}")
        good = sum(verdict.correct for verdict in verdicts)
        figures[f"code_{name}_accepted_ratio"] = good / len(right) if right else None
        if right:
            say(f"{name}: {good} of {len(right)} right programs accepted, {len(right) / seconds:.1f} verdicts/s")
            figures[f"code_{name}_verdicts_per_s"] = len(right) / seconds
    verdicts, _ = await _judge(wrong, RunLimits(cpu_s=10.0, wall_s=60.0))
    for case, verdict in zip(wrong, verdicts, strict=True):
        if verdict.correct or verdict.error:
            say(f"wrong program for {case.row}: {verdict.error or 'accepted'}")
    figures["code_wrong_programs"] = len(wrong) or None
    figures["code_wrong_accepted"] = sum(v.correct or bool(v.error) for v in verdicts) if wrong else None
    return figures


async def _attacks(say: Say) -> dict[str, float | None]:
    attacks = _tests_module("code_attacks")
    before = _host()
    with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0)) as listener:
        os.chmod(folder, 0o755)
        secret = Path(folder) / "secret"
        secret.write_text("host")
        listener.setblocking(False)
        cases = [_attack(attack, listener.getsockname()[1], secret) for attack in attacks.ATTACKS]
        verdicts, seconds = await _judge(cases, ATTACK_LIMITS)
        harm = [f"a file: {name}" for name in os.listdir(folder) if name != "secret"]
        try:
            listener.accept()
            harm.append("a connection")
        except BlockingIOError:
            pass
    right = 0
    for attack, verdict in zip(attacks.ATTACKS, verdicts, strict=True):
        letters = re.match("[A-Z]*", verdict.note)
        good = not verdict.error and letters is not None and letters[0] in attack.right
        right += good
        if not good:
            say(f"attack {attack.name!r}: {verdict.error or verdict.note}, right is {', '.join(sorted(attack.right))}")
    until = time.monotonic() + SETTLE_S
    while (more := _more(before, _host())) and time.monotonic() < until:  # noqa: ASYNC110 (nobody tells)
        await asyncio.sleep(0.5)
    harm += more
    for what in harm:
        say(f"harm to the host: {what}")
    say(f"{right} of {len(cases)} attacks have their verdict, in {seconds:.0f} s; {len(harm)} signs of harm")
    return {
        "code_attacks": len(cases),
        "code_attacks_right_ratio": right / len(cases),
        "code_host_harm": len(harm),
    }


def _attack(attack: Any, port: int, secret: Path) -> Case:
    source = attack.source.replace("HOST_PORT", str(port)).replace("HOST_PID", str(os.getpid()))
    function = {"names": ["f"], "tests": "assert f(3) == 10\nassert all(f(n) == n * n + 1 for n in range(4, 9))"}
    tests = [{"input": "7\n", "output": secrets.token_hex(8)}]
    reference: dict[str, Any] = (
        {"function": function} if attack.function else {"language": attack.language, "tests": tests}
    )
    return Case(reference=json.dumps(reference), response=source.replace("HOST_FILE", str(secret)), row=attack.name)


async def _judge(cases: Sequence[Case], limits: RunLimits) -> tuple[list[Verdict], float]:
    verifier = CodeVerifier(fenced=False, limits=limits, warm=WARM, places=PLACES, care=CARE)
    await verifier.start()
    try:
        began = time.perf_counter()
        return await verifier.judge_cases(list(cases)), time.perf_counter() - began
    finally:
        await verifier.stop(None)


def _host() -> dict[str, set[str] | int]:
    """What attacks could leave behind or use up: sandboxed processes, shared files of their user, memory."""
    available = re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())
    return {
        "processes": {pid for pid in os.listdir("/proc") if pid.isdigit() and _boxed(pid)},
        "files": {
            str(path) for folder in ("/", "/tmp", "/dev/shm") for path in Path(folder).glob("*") if _sandboxed(path)
        },
        "memory": int(available[1]) * 1024 if available else 0,
    }


def _sandboxed(path: Path) -> bool:
    """Whether it belongs to whom sandboxes run as."""
    try:
        return path.lstat().st_uid == (user() or os.getuid())
    except OSError:
        return False


def _boxed(pid: str) -> bool:
    try:
        return (
            _sandboxed(Path(f"/proc/{pid}"))
            and Path(f"/proc/{pid}/ns/pid").readlink() != Path("/proc/self/ns/pid").readlink()
        )
    except OSError:
        return False


def _more(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    found = [f"a process: {pid}" for pid in after["processes"] - before["processes"]]
    found += [f"a file: {name}" for name in after["files"] - before["files"]]
    lost = before["memory"] - after["memory"]
    return found + ([f"{lost >> 20} MiB of memory"] if lost > MEMORY_SLACK else [])


def _tests_module(name: str) -> ModuleType:
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[1] / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
