"""Runs a submission as a module, then serves calls of what it defines. Nothing here is believed: it is the submission's
own process, which may have changed all of it.

Descriptors 3 and 4 lead to and from the examiner; argv: the names that are asked for.
"""

import os
import sys
import types

import plain  # type: ignore[import-not-found]


def main() -> None:
    """Loads, says whether that went well, serves."""
    peer = plain.Peer(3, 4, open_to=("call", "get", "set"))
    module = types.ModuleType("submission")
    sys.modules["submission"] = module
    try:
        for name in ("prelude.py", "main.py"):
            with open(name, encoding="utf-8") as file:
                text = file.read()
            exec(compile(text, name, "exec"), module.__dict__)
        missing = [name for name in sys.argv[1:] if name not in module.__dict__]
        if missing:
            raise NameError(f"{', '.join(missing)} not defined")
    except BaseException as error:  # noqa: BLE001  # The examiner is told.
        peer.send(["failed", type(error).__name__, plain.text_of(error)])
        os._exit(1)
    peer.offer_all([module.__dict__[name] for name in sys.argv[1:]])
    peer.send(["loaded"])
    try:
        peer.serve()
    except plain.Gone:
        os._exit(0)


main()
