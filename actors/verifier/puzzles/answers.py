r"""Reads answers out of what a model wrote. Text is compared and counted, never evaluated.

    ...so the second cell is a 4.              1. the last mark wins: \boxed{...} or "Answer:"
    Answer:                                    2. up to the closing brace, or up to the next empty line
    1 4 2 3                                    3. into cells, numbers, words or pairs, or None
    ...

Every reader takes the answer and the shape that it must have, and returns None for all else. Work is bounded: only
the last 64 Ki characters of a text are looked at, an answer has at most 4096, a number at most six digits, and all
is ASCII after the look-alikes of + - * / are replaced. Knows nothing of puzzles.
"""

from __future__ import annotations

import re
from collections.abc import Container

MAX_TAIL = 1 << 16
"""Characters at the end of a text in which the mark of the answer is looked for."""
MAX_ANSWER = 4096
"""Characters of the longest answer."""

_MARKS = {
    "\\boxed": re.compile(r"\\boxed ?\{"),
    **{word: re.compile(rf"{word}[ *]{{0,4}}:\*{{0,2}}") for word in ("Answer", "answer", "ANSWER")},
}
_LINE_START = re.compile(r"(?:^|\n)[ *#>]{0,8}(?:final )?$", re.IGNORECASE)
_MAX_START = 16
"""Characters of the longest text that _LINE_START matches."""
_BLANK_LINE = re.compile(r"\n[ \t]*\n")
_LOOK_ALIKES = str.maketrans({"×": "*", "·": "*", "∗": "*", "÷": "/", "∕": "/", "−": "-", "–": "-", "\r": None})  # noqa: RUF001
_SEPARATORS = str.maketrans(",;|[]()", "       ")
_GAPS = str.maketrans("", "", " \t,;|[]()")
_INTEGER = re.compile(r"[0-9]{1,6}")
_PAIR = re.compile(r"([A-Za-z][A-Za-z0-9]{0,15}) ?(?:=|:| is ) ?([A-Za-z0-9]{1,16})")


def final_answer(text: str) -> str | None:
    r"""What stands in the last \boxed{...} or after the last line that begins with "Answer:", whichever comes later.

    None if there is no mark, no end, nothing in between, or too much. `\\` (a row's end in LaTeX) reads as a new line,
    the fences of a code block and the stars of one bold line as nothing.
    """
    tail = text[-MAX_TAIL:]
    last = _last_mark(tail)
    if last is None:
        return None
    rest = tail[last.end() :].strip()[: MAX_ANSWER + 1]
    found = _braced(rest) if last[0].endswith("{") else _paragraph(rest)
    if found is None or len(found) > MAX_ANSWER:
        return None
    found = "\n".join(line for line in found.splitlines() if not line.startswith("```"))
    found = found.translate(_LOOK_ALIKES).replace("\\\\", "\n").strip("$ \t\n")
    if "\n" not in found and len(found) > 4 and found[:2] == found[-2:] == "**":
        found = found[2:-2]
    return found if found and found.isascii() else None


def _last_mark(tail: str) -> re.Match[str] | None:
    """Found from the end by plain search, which costs far less than a regular expression over all of a response."""
    last, begin = None, -1
    for word, pattern in _MARKS.items():
        at = tail.rfind(word)
        while at > begin:
            mark = pattern.match(tail, at)
            if mark is not None and (word[0] == "\\" or _begins_line(tail, at)):
                last, begin = mark, at
            at = tail.rfind(word, 0, at)
    return last


def _begins_line(tail: str, start: int) -> bool:
    """Whether a line begins at `start`, but for bullets, stars and the word "final"."""
    before = tail[max(start - _MAX_START, 0) : start]
    match = _LINE_START.search(before)
    return match is not None and (match[0][:1] == "\n" or len(before) == start)


def _braced(rest: str) -> str | None:
    depth = 1
    for i, character in enumerate(rest):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return rest[:i]
    return None


def _paragraph(rest: str) -> str:
    return _BLANK_LINE.split(rest, maxsplit=1)[0]


def cells(answer: str, height: int, width: int, symbols: Container[str]) -> list[str] | None:
    """Rows of one-character symbols, one row a line; blanks, commas, bars and brackets between them don't count."""
    rows = [row for line in answer.splitlines() if (row := line.translate(_GAPS))]
    if len(rows) != height or any(len(row) != width for row in rows):
        return None
    return rows if all(symbol in symbols for row in rows for symbol in row) else None


def words(answer: str, height: int, width: int) -> list[list[str]] | None:
    """Rows of words or numbers, one row a line, between them blanks, commas, bars or brackets."""
    rows = [row for line in answer.splitlines() if (row := line.translate(_SEPARATORS).split())]
    return rows if len(rows) == height and all(len(row) == width for row in rows) else None


def number_rows(answer: str, height: int, width: int) -> list[list[int]] | None:
    """Rows of whole numbers without a sign."""
    rows = words(answer, height, width)
    if rows is None or not all(_INTEGER.fullmatch(word) for row in rows for word in row):
        return None
    return [[int(word) for word in row] for row in rows]


def integers(answer: str) -> list[int] | None:
    """Whole numbers without a sign, between them blanks, new lines, commas, bars or brackets."""
    found = answer.translate(_SEPARATORS).split()
    return [int(word) for word in found] if all(map(_INTEGER.fullmatch, found)) else None


def moves(answer: str, alphabet: str) -> str | None:
    """Letters of `alphabet` (capitals), any case, with or without blanks and commas between them."""
    letters = "".join(answer.translate(_GAPS).split()).upper()
    return letters if not letters.strip(alphabet) else None


def pairs(answer: str) -> dict[str, str] | None:
    """`name=value` (or `name: value`, `name is value`), between them commas, semicolons or new lines; no name twice."""
    found: dict[str, str] = {}
    for part in re.split(r"[,;\n]", answer.strip(" ,;.\n{}[]()")):
        match = _PAIR.fullmatch(" ".join(part.split()))
        if match is None or match[1] in found:
            return None
        found[match[1]] = match[2]
    return found
