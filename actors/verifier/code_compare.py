"""Whether an output is the expected one, by the modes of programming contests. Linear in the length of both; numbers
are read by grammars of ours, so NaN, infinity, underscores and hexadecimal are none.

    exact     every byte
    line      the lines, without white space at their ends and empty lines at the end (testlib's fcmp)
    words     the lines, each as its words (lcmp)
    token     the words; with a tolerance, those that are decimal fractions in the answer as numbers (wcmp; Kattis)
    integer   the words, all 64-bit integers (ncmp)
    float     the words, all numbers, within the tolerance, absolute or relative (rcmp)
    yes_no    one word, yes or no in any case (yesno)

Knows nothing of programs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Literal, get_args

Mode = Literal["exact", "line", "words", "token", "integer", "float", "yes_no"]
MODES: tuple[str, ...] = get_args(Mode)

_INTEGER = re.compile(rb"[+-]?[0-9]{1,20}")
_NUMBER = re.compile(rb"[+-]?(?:[0-9]{1,400}\.?[0-9]{0,400}|\.[0-9]{1,400})(?:[eE][+-]?[0-9]{1,5})?")
_FRACTION = re.compile(rb"[+-]?[0-9]{0,400}\.[0-9]{0,400}(?:[eE][+-]?[0-9]{1,5})?|[+-]?[0-9]{1,400}[eE][+-]?[0-9]{1,5}")


class BadAnswer(ValueError):
    """The expected output is none that this mode can compare with."""


def compare(output: bytes, answer: bytes, mode: Mode, *, tolerance: float = 0.0, ignore_case: bool = False) -> str:
    """ "" if `output` is as good as `answer`, or how they differ. Raises BadAnswer."""
    if ignore_case:
        output, answer = output.lower(), answer.lower()
    if mode == "exact":
        return "" if output == answer else "not the same bytes"
    if mode in ("line", "words"):
        return _lines(output, answer, by_words=mode == "words")
    words, wanted = output.split(), answer.split()
    if mode == "yes_no":
        return _yes_no(words, wanted)
    if mode == "integer":
        return _each(words, wanted, _as_integers)
    if mode == "float":
        return _each(words, wanted, lambda word, want: _as_numbers(word, want, tolerance))
    return _each(words, wanted, lambda word, want: _as_tokens(word, want, tolerance))


def _each(words: Sequence[bytes], wanted: Sequence[bytes], differ: Callable[[bytes, bytes], bool]) -> str:
    for position, (word, want) in enumerate(zip(words, wanted, strict=False), 1):
        if differ(word, want):
            return f"word {position} differs"
    return "" if len(words) == len(wanted) else f"{len(words)} words, {len(wanted)} expected"


def _as_integers(word: bytes, want: bytes) -> bool:
    right = _integer(want)
    if right is None:
        raise BadAnswer(f"{want[:40]!r} is no 64-bit integer")
    return _integer(word) != right


def _as_numbers(word: bytes, want: bytes, tolerance: float) -> bool:
    if not _NUMBER.fullmatch(want):
        raise BadAnswer(f"{want[:40]!r} is no number")
    return not _NUMBER.fullmatch(word) or not _close(float(word), float(want), tolerance)


def _as_tokens(word: bytes, want: bytes, tolerance: float) -> bool:
    if word == want:
        return False
    if not tolerance or not _FRACTION.fullmatch(want) or not _NUMBER.fullmatch(want) or not _NUMBER.fullmatch(word):
        return True
    return not _close(float(word), float(want), tolerance)


def _close(number: float, right: float, tolerance: float) -> bool:
    if math.isinf(number) or math.isinf(right):
        return number == right
    return abs(number - right) <= max(tolerance, tolerance * abs(right))


def _integer(word: bytes) -> int | None:
    if not _INTEGER.fullmatch(word):
        return None
    value = int(word)
    return value if -(1 << 63) <= value < 1 << 63 else None


def _lines(output: bytes, answer: bytes, *, by_words: bool) -> str:
    found, wanted = _split(output), _split(answer)
    for number, (line, want) in enumerate(zip(found, wanted, strict=False), 1):
        if line.split() != want.split() if by_words else line != want:
            return f"line {number} differs"
    return "" if len(found) == len(wanted) else f"{len(found)} lines, {len(wanted)} expected"


def _split(text: bytes) -> list[bytes]:
    lines = [line.rstrip() for line in text.split(b"\n")]
    while lines and not lines[-1]:
        lines.pop()
    return lines


def _yes_no(words: Sequence[bytes], wanted: Sequence[bytes]) -> str:
    if len(wanted) != 1 or wanted[0].lower() not in (b"yes", b"no"):
        raise BadAnswer("the expected output is neither yes nor no")
    if len(words) != 1 or words[0].lower() not in (b"yes", b"no"):
        return "neither yes nor no"
    return "" if words[0].lower() == wanted[0].lower() else "the other one"
