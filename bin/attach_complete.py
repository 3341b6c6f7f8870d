"""What may follow at the prompt: names here, actors, their messages, and attributes of objects inside of an actor.

Asks the system through its inspectors, so it is answered in milliseconds, also while an actor computes. Calls nobody's
code here but `dir`.
"""

from __future__ import annotations

import builtins
import keyword
import re
from typing import Any

from .attach_link import AttachError
from .attach_names import NAMES, Exposed
from .attach_shell import Shell
from .runtime.errors import RuntimeFault

_ACTOR = re.compile(r"\b(?:find|enter|peek|stack|pause|resume|restart|kill|trace|tail)\(\s*[\"']([\w/$@-]*)$")
_PEEK = re.compile(r"\bpeek\(\s*[\"']?([\w/]+)[\"']?\s*,\s*[\"']((?:[\w.\[\]]*\.)?)(\w*)$")
_ATTRIBUTE = re.compile(r"((?:[A-Za-z_]\w*)(?:\.\w+|\[[^\[\]]*\])*)\.(\w*)$")
_WORD = re.compile(r"(\w*)$")


def complete(shell: Shell, text: str) -> list[tuple[str, int]]:
    """What may stand at the end of `text`: each with the number of characters before the cursor that it replaces."""
    try:
        found, typed = _candidates(shell, text)
    except (AttachError, RuntimeFault, LookupError):
        return []  # A prompt without suggestions is better than one with an error.
    shown = [name for name in found if name.startswith(typed) and (typed.startswith("_") or not name.startswith("_"))]
    return [(name, len(typed)) for name in dict.fromkeys(shown)]


def _candidates(shell: Shell, text: str) -> tuple[list[str], str]:
    link, helpers = shell.link, shell.helpers
    if link is not None and helpers is not None:
        if match := _ACTOR.search(text):
            return sorted(helpers.refresh()["actors"]), match[1]
        if match := _PEEK.search(text):
            return _plain(link.ask("names", actor=match[1], path=match[2].rstrip("."))), match[3]
        if shell.entered:
            if match := _ATTRIBUTE.search(text):
                return link.ask("names", actor=shell.entered, path=match[1]), match[2]
            return ["self", *(f"{name}(" for name in NAMES)], _typed(text)
    if match := _ATTRIBUTE.search(text):
        return _local(shell.names, match[1]), match[2]
    names = [name + "(" if callable(value) and name in NAMES else name for name, value in shell.names.items()]
    return sorted([*names, *keyword.kwlist, *(name for name in dir(builtins) if name[0].islower())]), _typed(text)


def _typed(text: str) -> str:
    match = _WORD.search(text)
    return match[1] if match else ""


def _local(names: dict[str, Any], path: str) -> list[str]:
    """Names of an object here, found without calling anything but plain attributes."""
    first, *rest = path.split(".")
    value = names[first]
    for name in rest:
        value = vars(value)[name] if not isinstance(value, Exposed) else getattr(value, name)
    return dir(value)


def _plain(names: list[str]) -> list[str]:
    return [name for name in names if not name.endswith("(")]
