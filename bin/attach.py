"""`bin/attach [RUN] [-c CODE]`: a live prompt into the actors of a running job.

Exit codes: 0; 1 the code raised, or the run ended meanwhile; 2 there is no such run; 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from .attach_link import FILE, AttachError, Link

_EXAMPLE = """examples:
  bin/attach                                  the run that is running
  bin/attach default                          the run in runs/default; a path will do, too
  bin/attach -c 'print(tree()); await trainer.position()'
"""


def attach_main(arguments: Sequence[str]) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="bin/attach", description="Looks into a running job, calls its actors, evaluates code inside of them.",
        epilog=_EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("run", nargs="?", default="", metavar="RUN", help="name or folder (default: the one that runs)")
    parser.add_argument("-c", dest="code", metavar="CODE", help="run this, print the values of its expressions, go")
    parser.add_argument("--runs", type=Path, default=Path("runs"), metavar="DIR", help="where runs are (default: runs)")
    options = parser.parse_args(arguments)
    try:
        run = find_run(options.run, options.runs)
    except AttachError as error:
        print(error, file=sys.stderr)
        return 2
    try:
        return _attach(run, options.code)
    except AttachError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # What is left goes nowhere.
        return 1


def find_run(name: str, runs: Path) -> Path:
    """The directory of a run: by name in `runs`, by path, or without a name the only one that runs. Raises
    AttachError, with the runs that there are."""
    if "://" in name:
        raise AttachError(f"{name}: there is no way in by network; run bin/attach on the host of bin/launch, by ssh")
    if name:
        for path in (Path(name), runs / name):
            if (path / "events.jsonl").exists() or (path / FILE).exists():
                return path
        raise AttachError(f"{name}: there is no such run{_listed(runs)}")
    living = [path.parent for path in sorted(runs.glob(f"*/{FILE}")) if is_living(path.parent)]
    if not living:
        raise AttachError(f"{runs}: nothing runs there{_listed(runs)}")
    if len(living) > 1:
        names = ", ".join(path.name for path in living)
        raise AttachError(f"{len(living)} runs are running: {names}; name one: bin/attach {living[0].name}")
    return living[0]


def is_living(run: Path) -> bool:
    """Whether a process listens at the socket of attach.json: a run that was killed leaves that file behind."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(json.loads((run / FILE).read_text())["socket"])
        except PermissionError:
            return True
        except (OSError, ValueError, KeyError):
            return False
    return True


def _attach(run: Path, code: str | None) -> int:
    gc.disable()  # Nothing of what is imported here is garbage, and looking for it takes a tenth of the time.
    from .attach_shell import Shell

    if is_living(run):
        link = Link(run)
        shell = Shell(link)
        greeting = f"attached to {run}, process {link.hello['pid']}: {len(link.hello['actors'])} actors; help() lists"
        greeting += " what there is, Ctrl-D leaves"
    else:
        from .attach_files import offline_names

        shell = Shell(None, offline_names(run))
        greeting = f"{run} does not run any more; its files can be read: help() lists how, Ctrl-D leaves"
    try:
        if code is not None:
            return 0 if shell.run(code) else 1
        if not sys.stdin.isatty():
            return 0 if shell.run(sys.stdin.read()) else 1
        from .attach_console import converse

        gc.freeze()
        gc.enable()
        converse(shell, greeting)
        return 0
    finally:
        shell.close()


def _listed(runs: Path) -> str:
    known = [path.parent for path in sorted(runs.glob("*/events.jsonl"))]
    if not known:
        return f"; {runs} has none; start one with bin/launch cluster.toml, or say where with --runs DIR"
    names = [f"{path.name}{' (running)' if is_living(path) else ''}" for path in known]
    return f"; in {runs} there is {', '.join(names[:10])}"
