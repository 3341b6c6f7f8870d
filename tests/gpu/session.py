"""tests/gpu/run: what it does, in order, and the table at the end.

    build all --> check on fresh data --> compute-sanitizer, if there --> time --> tune --> table

Exit code 0: every kernel is right (bars may be missed: the table says which); 1: one is wrong; 2: no CUDA here.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from case import Case, cases
from decode_session import main as decode
from exchange_session import main as exchange

from headrace.kernels.build import ARCHITECTURES, compile_source
from headrace.kernels.specs import all_specs

EPILOG = """examples:
  tests/gpu/run --json gpu.json --record timings.json    everything, and the files to commit
  tests/gpu/run --only permute --no-tune                 one kernel
  tests/gpu/run --report                                 registers, spills, shared memory of all, without a GPU
"""
REPORTED = "    regs spill shared".rjust(21)
SANITIZERS = ("memcheck", "racecheck", "synccheck", "initcheck")


def main(arguments: Sequence[str]) -> int:
    options = _options(arguments)
    if options.report:
        print(_report(options.only))
        return 0
    if not torch.cuda.is_available():
        reason = "this torch is built without CUDA" if torch.version.cuda is None else "torch finds no GPU"
        print(f"tests/gpu/run: no CUDA here ({reason}); the same kernels run on the CPU in bin/test -k kernels")
        return 2
    chosen = [case for case in cases() if options.only in case.name]
    if not chosen:
        names = ", ".join(case.name for case in cases())
        print(f"tests/gpu/run: --only {options.only} is in no name; there are: {names}")
        return 2
    if options.check_small:
        return _check(chosen, options.seed, large=False, repeats=1)
    print(f"{torch.cuda.get_device_name(0)}, seed {options.seed}")
    _build(chosen)
    code = _check(chosen, options.seed, large=True)
    if not options.no_sanitizer:
        code |= _sanitize(options)
    copy_rate = _time_and_tune(chosen, options)
    if not options.only:
        print("\nthe rollout engine beside transformers' generate")
        decode(copy_rate)
        print("\nweights between processes (tests/gpu/exchange)")
        code |= exchange([]) == 1
    return code


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "tests/gpu/run", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name has this in it")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(2**31), help="of the data (default: a new one)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    parser.add_argument("--record", type=Path, metavar="FILE", help="write the timings that bin/bench tuner replays")
    parser.add_argument("--no-tune", action="store_true", help="leave out timing every configuration")
    parser.add_argument("--no-sanitizer", action="store_true", help="leave out compute-sanitizer")
    parser.add_argument(
        "--report", action="store_true", help="only compile, and show what each kernel needs; no GPU asked"
    )
    parser.add_argument("--check-small", action="store_true", help="only check the small sizes (for compute-sanitizer)")
    return parser.parse_args(arguments)


def _report(only: str) -> str:
    """Registers, spilled bytes and static shared memory of every kernel, configuration and architecture."""
    lines = [f"{'kernel':24}{'macros':36}" + "".join(f"{name:>21}" for name in ARCHITECTURES), " " * 60 + REPORTED * 3]
    for _, spec in all_specs():
        for macros in (
            {**config, **variant} for config in spec.configs for variant in spec.variants if only in spec.name
        ):
            used = [compile_source(spec.source, macros, name).usage[spec.name] for name in ARCHITECTURES]
            cells = "".join(f"{u.registers:8}{u.spill_bytes:6}{u.shared_bytes:7}" for u in used)
            lines.append(f"{spec.name:24}{' '.join(f'{k}={v}' for k, v in macros.items()):36}{cells}")
    return "\n".join(lines)


def _build(chosen: Sequence[Case]) -> None:
    major, minor = torch.cuda.get_device_capability(0)
    wanted = {
        (spec.source, tuple(sorted({**config, **variant}.items())))
        for spec in (case.spec for case in chosen)
        if spec is not None
        for config in spec.configs
        for variant in spec.variants
    }
    begin = time.monotonic()
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda one: compile_source(one[0], dict(one[1]), f"sm_{major}{minor}"), sorted(wanted)))
    print(f"built {len(wanted)} binaries in {time.monotonic() - begin:.1f} s")


def _check(chosen: Sequence[Case], seed: int, *, large: bool, repeats: int = 100) -> int:
    from measure import wrong

    code = 0
    for case in chosen:
        message = wrong(case, seed, large=large, repeats=repeats)
        print(f"{'WRONG' if message else 'right'}  {case.name}  {message}")
        code |= bool(message)
    return code


def _sanitize(options: argparse.Namespace) -> int:
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        print("compute-sanitizer is not installed: left out")
        return 0
    code = 0
    for kind in SANITIZERS:
        own = [sys.executable, "-P", sys.argv[0], "--check-small", "--only", options.only, "--seed", str(options.seed)]
        environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # else torch's pools hide what is beside
        command = [tool, "--tool", kind, "--error-exitcode", "9", *own]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3600, check=False)
        print(f"{'right' if done.returncode == 0 else 'WRONG'}  compute-sanitizer {kind}")
        if done.returncode:
            print(done.stdout[-4000:] + done.stderr[-4000:])
            code = 1
    return code


def _time_and_tune(chosen: Sequence[Case], options: argparse.Namespace) -> float:
    """Returns the copy rate of this GPU."""
    from measure import Bench, record, timed

    from headrace.kernels.live import build_of_sources, choices_file, tuned
    from headrace.kernels.timings import Timings

    bench = Bench()
    figures = {}
    for case in chosen:
        figures[case.name] = timed(case, bench, options.seed)
        print(f"timed  {case.name}")
    versions = {"torch": torch.__version__, "cuda": str(torch.version.cuda), "python": platform.python_version()}
    if not options.no_tune:
        table = Timings(torch.cuda.get_device_name(0), measured=True, versions=versions)
        for case in chosen:
            if case.spec is not None and len(case.spec.configs) > 1:
                record(case, bench, table, [*case.small, *case.tuned, case.large], options.seed)
                print(f"tuned  {case.name}")
        if options.record:
            table.write(options.record)
        if not options.only:  # else the choices of the other kernels would be lost
            choices = choices_file(table.device)
            tuned(table, build_of_sources()).write(choices)
            print(f"choices are in {choices}; bin/tune kernels --show")
    if options.json:
        text = {
            "device": torch.cuda.get_device_name(0),
            "versions": versions,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "seed": options.seed,
            "copy_rate_bytes_per_s": bench.copy_rate,
            "figures": figures,
            "bars": [bar for case in chosen for bar in _bars(case, figures[case.name])],
        }
        options.json.write_text(json.dumps(text, indent=1) + "\n")
    print(_table(chosen, figures, bench.copy_rate))
    return bench.copy_rate


def _bars(case: Case, figures: dict[str, float | None]) -> list[dict[str, Any]]:
    return [
        {
            "name": f"{case.name}_{name}_ratio",
            "value": value,
            "limit": limit,
            "ok": value is not None and value >= limit,
        }
        for name, limit in case.bars.items()
        for value in [figures.get(name)]
    ]


def _table(chosen: Sequence[Case], figures: dict[str, dict[str, float | None]], copy_rate: float) -> str:
    lines = [f"\n{'kernel':24}{'us':>10}{'in a graph':>12}{'of copy':>9}{'x eager':>9}{'x compiled':>12}  bars missed"]
    for case in chosen:
        own = figures[case.name]
        missed = [f"{name} >= {limit}" for name, limit in case.bars.items() if (own.get(name) or 0.0) < limit]
        cells = [
            _cell(own["seconds"], 10, 1e6, ".1f"),
            _cell(own["graph_seconds"], 12, 1e6, ".1f"),
            _cell(own.get("copy"), 9, 100, ".0f", "%"),
            _cell(own.get("eager"), 9, 1, ".2f"),
            _cell(own.get("compiled"), 12, 1, ".2f"),
        ]
        lines.append(f"{case.name:24}{''.join(cells)}  {', '.join(missed) or '-'}")
    return "\n".join([*lines, f"copy rate, read + write: {copy_rate / 1e12:.2f} TB/s"])


def _cell(value: float | None, width: int, scale: float, form: str, unit: str = "") -> str:
    return ("-" if value is None else format(value * scale, form) + unit).rjust(width)
