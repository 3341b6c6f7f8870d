r"""Where the final answer stands in a response. Linear in its length, and nothing of it is evaluated.

    the last MAX_CHARS characters
      -> what follows the last </think> (a <think> that was never closed has no answer)
      -> the content of the last \boxed{...} or \fbox{...} whose braces close
         or else the rest of the line after the last "final answer is", "answer is", "answer:" or "####"
         or else the last line that is not empty

What is invisible (zero-width and direction marks) is dropped, and digits and signs of other scripts read as ASCII ones.
Knows nothing of references.
"""

from __future__ import annotations

import re
import unicodedata

MAX_CHARS = 1 << 20
"""Of a longer response only the end is read."""

MAX_ANSWER_CHARS = 1 << 14
"""A longer answer is none."""

_BRACE = re.compile(r"(?P<box>\\(?:f?boxed|fbox)\s{0,8}\{)|\\[{}]|(?P<open>\{)|(?P<close>\})")
_MARK = re.compile(r"(?:final\s{1,8})?answer(?:\s{1,8}is\s{0,8}:?|\s{0,8}:)|####", re.IGNORECASE)
_LOOKS_LIKE = {
    **dict.fromkeys(map(ord, "\u2212\u2010\u2011\u2012\u2013\uff0d\ufe63"), "-"),
    **dict.fromkeys(map(ord, "\u00a0\u2007\u2009\u202f\u3000"), " "),
    **dict(zip(map(ord, "\uff0b\uff0e\uff0c\uff1a\uff08\uff09\uff1d\uff05\uff0f"), "+.,:()=%/", strict=True)),
}


def final_answer(response: str) -> str:
    """The final answer of `response`, stripped; "" if there is none, or if it is longer than MAX_ANSWER_CHARS."""
    text = spoken(response)
    boxes = boxed(text)
    if boxes:
        answer = boxes[-1]
    elif marks := list(_MARK.finditer(text)):
        answer = text[marks[-1].end() :].lstrip().partition("\n")[0]
    else:
        answer = text.rstrip().rpartition("\n")[2]
    answer = answer.strip()
    return answer if len(answer) <= MAX_ANSWER_CHARS else ""


def spoken(response: str) -> str:
    """The part of a response that is meant for the reader, in plain characters."""
    return plain(after_thinking(response[-MAX_CHARS:]))


def after_thinking(text: str) -> str:
    """What follows the last `</think>`; "" where a `<think>` is never closed."""
    text = text.rpartition("</think>")[2]
    return "" if "<think>" in text else text


def boxed(text: str) -> list[str]:
    """The contents of all boxes whose braces close, in their order; a box in a box is not listed."""
    found: list[tuple[int, int]] = []
    opened: list[int] = []
    for match in _BRACE.finditer(text):
        if match["box"]:
            opened.append(match.end())
        elif match["open"]:
            opened.append(-1)
        elif match["close"] and opened and (start := opened.pop()) >= 0:
            while found and found[-1][0] > start:
                found.pop()
            found.append((start, match.start()))
    return [text[start:end] for start, end in found]


def plain(text: str) -> str:
    """`text` without invisible characters, and with ASCII digits, signs and spaces for those of other scripts."""
    return text if text.isascii() else text.translate(_PLAIN)


class _Plain(dict[int, str]):
    """What each character reads as, by its code; remembers some, since translate() asks for each one."""

    def __missing__(self, code: int) -> str:
        char = chr(code)
        category = unicodedata.category(char)
        if category in ("Cf", "Cs"):
            char = ""
        elif category == "Nd":
            char = str(unicodedata.decimal(char))
        if len(self) < 10_000:
            self[code] = char
        return char


_PLAIN = _Plain(_LOOKS_LIKE)
