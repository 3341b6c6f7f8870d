"""`bin/tune kernels --show`: the configurations that the kernels go by, bucket by bucket.

Exit codes: 0 shown; 1 there is no table yet; 2 wrong input.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

_EXAMPLE = """example:
  bin/tune kernels --show
  bin/tune kernels --show --table choices-NVIDIA-H200.json
"""


def tune_main(arguments: Sequence[str]) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="bin/tune", description="Shows what the kernel tuner has chosen.", epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("what", choices=["kernels"], help="what was tuned")
    parser.add_argument("--show", action="store_true", required=True, help="print the table of choices")
    parser.add_argument("--table", type=Path, metavar="FILE", help="the table (default: all of the kernel cache)")
    options = parser.parse_args(arguments)
    tables = [options.table] if options.table else _tables()
    if not tables:
        print(
            "nothing was tuned on this machine: tests/gpu/run does, on one with a CUDA device, and so does a run there",
            file=sys.stderr,
        )
        return 1
    try:
        for table in tables:
            _show(table)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _tables() -> list[Path]:
    from .kernels.build import cache_folder

    return sorted(cache_folder().glob("choices-*.json"))


def _show(path: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    from .kernels.buckets import SKEWS, STEPS
    from .kernels.tuner import Tuner

    tuner = Tuner.read(path)
    table = Table(box=None, padding=(0, 3, 0, 0), pad_edge=False, header_style="dim")
    for column in ("kernel", "tokens from", "max/mean load", "experts up to", "configuration", "calls", "switches"):
        table.add_column(column, no_wrap=True, justify="left" if column in ("kernel", "configuration") else "right")
    bounds = ("1", *map(str, SKEWS), "")
    for name, bucket, choice in tuner.rows():
        skew = f"{bounds[bucket.skew]} - {bounds[bucket.skew + 1]}"
        tokens, experts = round(2 ** (bucket.tokens / STEPS)), 2**bucket.active
        table.add_row(name, f"{tokens:,}", skew, str(experts), choice.config, f"{choice.calls:,}", str(choice.switches))
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)
    console.print(f"{tuner.device}, build {tuner.build}")
    console.print(table)
