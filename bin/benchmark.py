"""`bin/bench NAME`: measures, compares with the bars, prints a table, and with --json writes the numbers.

A benchmark is a file tests/bench/NAME.py of the checkout with

    its docstring                          its first line is shown by `bin/bench`, all of it by --help
    EXAMPLE                                a command that runs as it stands
    BARS                                   [Bar(figure, ">=" or "<=", limit), ...]
    add_arguments(parser)                  its own options
    measure(options, say) -> {figure: value}

Names of figures end in their unit (`_s`, `_bytes`, `_ratio`, `_per_s`); None is a figure that could not be taken, and
misses its bar. `say` prints a line of progress. Files that begin with "_" serve the others, which import them by name.
Knows nothing of what is measured.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import operator
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import orjson

from .runtime.rundir import write_atomically
from .runtime.toml import ConfigError, nearest

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "tests" / "bench"
COMMAND = "bin/bench"

PACKAGES = ("headrace", "torch", "numpy", "pyzmq", "msgpack", "uvloop", "orjson", "safetensors", "cupy-cuda13x")
"""Those whose versions are written beside the figures, if they are installed."""

BUSY = 0.5
"""Load average per core from which figures are not to be trusted."""

Figures = Mapping[str, float | None]
Say = Callable[[str], None]

_RULES = {">=": operator.ge, "<=": operator.le}


class BenchmarkError(Exception):
    """It could not be measured. The text says why, and what to do."""


@dataclass(frozen=True)
class Bar:
    """What the figure `name` must reach."""

    name: str
    rule: Literal[">=", "<="]
    limit: float

    def met(self, value: float | None) -> bool:
        """False for a figure that could not be taken, and for NaN."""
        return value is not None and bool(_RULES[self.rule](value, self.limit))


def bench_main(arguments: Sequence[str], folder: Path = FOLDER) -> int:
    """The command. Returns 0 if it measured, whatever the bars say; 1 if it could not; 2 for wrong input."""
    name, *rest = arguments or ["--help"]
    try:
        if name in ("-h", "--help"):
            _list(folder)
            return 0
        benchmark = load(name, folder)
        options = _parse(name, benchmark, rest)
        began, machine = time.monotonic(), describe_machine()
        figures = dict(benchmark.measure(options, lambda text: _say(began, text)))
        result = report(figures, benchmark.BARS, machine=machine, seconds=time.monotonic() - began)
        _print_table(name, result)
        if options.json is not None:
            write_atomically(options.json, orjson.dumps(result, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    except BenchmarkError as error:
        print(f"{COMMAND} {name}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def names(folder: Path) -> list[str]:
    """The benchmarks there are."""
    return sorted(path.stem for path in folder.glob("*.py") if not path.stem.startswith("_"))


def load(name: str, folder: Path) -> ModuleType:
    """Imports a benchmark. Raises ConfigError if there is none of this name."""
    if name not in names(folder):
        if not folder.is_dir():
            raise ConfigError(f"{folder}: no benchmarks there; they come with the source tree, not with the wheel")
        hint = nearest(name, names(folder), otherwise=f"; there are: {', '.join(names(folder))}")
        raise ConfigError(f"{COMMAND}: no benchmark {name!r}{hint}")
    spec = importlib.util.spec_from_file_location(f"headrace_bench_{name}", folder / f"{name}.py")
    assert spec is not None and spec.loader is not None
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def report(figures: Figures, bars: Sequence[Bar], *, machine: dict[str, Any], seconds: float) -> dict[str, Any]:
    """What --json writes. `rule` of a bar is ">=" or "<=": value and limit compared that way must hold."""
    unknown = [bar.name for bar in bars if bar.name not in figures]
    assert not unknown, f"bars without a figure: {unknown}"
    return {
        "figures": dict(figures),
        "bars": [
            {"name": b.name, "value": figures[b.name], "rule": b.rule, "limit": b.limit, "ok": b.met(figures[b.name])}
            for b in bars
        ],
        "machine": machine,
        "versions": describe_versions(),
        "commit": describe_commit(ROOT),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
    }  # fmt: skip


def describe_machine() -> dict[str, Any]:
    """What the figures depend on: processor, cores that we may use, memory, GPUs, and how busy it is now."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpu": _output("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"),
        "system": platform.platform(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
    }


def describe_versions() -> dict[str, str]:
    """Python and the packages that matter."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def describe_commit(root: Path) -> str:
    """Hash of the checkout, with "-dirty" if tracked files have changed; "unknown" outside git."""
    found = _output("git", "-C", str(root), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*")
    return found or "unknown"


def shown(name: str, value: float | None) -> str:
    """A figure for people, by the unit that its name ends in."""
    if value is None:
        return "-"
    if name.endswith("_per_s"):
        return f"{value:,.0f} /s"
    if name.endswith("_bytes"):
        return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.1f} MiB"
    if name.endswith("_s"):
        return f"{value:.2f} s" if value < 10 else f"{value:.1f} s"
    if name.endswith("_us"):
        return f"{value:.1f} us"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.3f}"


def _parse(name: str, benchmark: ModuleType, arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=f"{COMMAND} {name}", description=benchmark.__doc__, epilog=f"example: {benchmark.EXAMPLE}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="write figures, bars, machine and versions to FILE")
    benchmark.add_arguments(parser)
    options = parser.parse_args(arguments)
    if options.json is not None and (options.json.is_dir() or not os.access(options.json.parent, os.W_OK)):
        raise ConfigError(f"--json {options.json}: can't be written; name a file in a folder that is there")
    return options


def _list(folder: Path) -> None:
    print(f"usage: {COMMAND} NAME [--json FILE] [options]\n\nMeasures, and compares with the bars. NAME is one of\n")
    for name in names(folder):
        print(f"  {name:8} {(load(name, folder).__doc__ or '').strip().splitlines()[0]}")
    print(f"\nexample: {COMMAND} job --seeds 1 --json job.json")


def _say(began: float, text: str) -> None:
    print(f"{time.monotonic() - began:6.0f} s  {text}", file=sys.stderr, flush=True)


def _print_table(name: str, result: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    bars = {bar["name"]: bar for bar in result["bars"]}
    table = Table(box=None, padding=(0, 3, 0, 0), pad_edge=False, header_style="dim")
    table.add_column("figure", no_wrap=True)
    for column in ("measured", "bar"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("")
    for figure, value in result["figures"].items():
        bar = bars.get(figure)
        verdict = "" if bar is None else "[green]ok" if bar["ok"] else "[bold red]missed"
        limit = "" if bar is None else f"{bar['rule']} {shown(figure, bar['limit'])}"
        table.add_row(figure, shown(figure, value), limit, verdict)
    machine, missed = result["machine"], sum(not bar["ok"] for bar in result["bars"])
    console = Console(highlight=False)
    console.print()
    console.print(table)
    console.print(
        f"\n{name}: {len(bars) - missed} of {len(bars)} bars in {result['seconds']:.0f} s\n"
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_bytes'] / 2**30:.0f} GiB"
        f"{', ' + machine['gpu'] if machine['gpu'] else ''}; commit {result['commit'][:12]}, {result['date']}",
        soft_wrap=True,
    )
    if machine["load_average"][0] > machine["cores"] * BUSY:
        console.print(
            f"others kept it busy before the start (load average {machine['load_average'][0]}): measure again"
        )


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor() or platform.machine())


def _output(*command: str) -> str:
    """What a command prints, stripped; "" if there is no such command, or it fails."""
    if shutil.which(command[0]) is None:
        return ""
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
