"""`python -m headrace COMMAND ...`, and the installed command `headrace`: the doors of bin/, without their set-up."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from .interrupts import uninterrupted

COMMANDS = {
    "launch": ("headrace.cli", "launch_main", "run a cluster file"),
    "attach": ("headrace.attach", "attach_main", "look into a running job"),
    "bench": ("headrace.benchmark", "bench_main", "measure, and compare with the bars"),
    "test": ("headrace.testing", "test_main", "run the tests (in a checkout)"),
}
"""Command -> module and function that take its arguments and return an exit code; what it does."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Hands the arguments after the command to its function; 2 if there is no such command."""
    command, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if command in ("-h", "--help"):
        print("usage: headrace COMMAND ...\n")
        for name, (_, _, purpose) in COMMANDS.items():
            print(f"  {name:8} {purpose}")
        print("\nexample: headrace launch cluster.toml --check")
        return 0
    if command not in COMMANDS:
        print(f"headrace: no command {command!r}; there are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    module, function, _ = COMMANDS[command]
    try:
        with uninterrupted():
            door = getattr(importlib.import_module(module), function)
        return int(door(rest))
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
