"""Holds tests, and runs them on functions that another process serves. The report, a JSON line, goes to stdout; what
the tests print doesn't.

Descriptors 3 and 4 lead to and from the candidate; argv: the names that the tests use of it.
"""

import json
import os
import sys
import traceback
from typing import Any

import plain  # type: ignore[import-not-found]


def main() -> None:
    """Runs the tests and says how they went."""
    report = os.dup(1)
    os.dup2(2, 1)
    peer = plain.Peer(3, 4, open_to=("call",))
    os.write(report, json.dumps(_examine(peer, sys.argv[1:])).encode() + b"\n")


def _examine(peer: plain.Peer, names: list[str]) -> dict[str, str]:
    try:
        first = peer.receive()
    except (plain.Gone, plain.TooMuch):
        return {"found": "gone"}
    if first[0] != "loaded":
        return {"found": "not loaded", "type": str(first[1:2])[2:-2], "text": str(first[2:3])[2:-2][:300]}
    space: dict[str, Any] = {"__name__": "tests"}
    try:
        for name in ("prelude.py", "tests.py"):
            with open(name, encoding="utf-8") as file:
                code = compile(file.read(), name, "exec")
            space.update({name: plain.Remote(peer, number) for number, name in enumerate(names)})
            exec(code, space)
    except plain.Gone:
        return {"found": "gone"}
    except plain.TooMuch as error:
        return {"found": "failed", "text": f"the answer of the function: {error}"}
    except AssertionError as error:
        return {"found": "failed", "text": f"line {_line(error)}: {plain.text_of(error)}"[:300]}
    except BaseException as error:  # noqa: BLE001  # It is the report.
        if hasattr(error, "remote"):
            return {"found": "raised", "text": error.remote}
        kind = "failed" if peer.calls else "bad tests"
        return {"found": kind, "text": f"line {_line(error)}: {type(error).__name__}: {plain.text_of(error)}"[:300]}
    return {"found": "passed"}


def _line(error: BaseException) -> int:
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == "tests.py"]
    return (frames[-1].lineno or 0) if frames else 0


main()
