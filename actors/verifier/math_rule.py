r"""The rule `math`: equal as mathematics, by the package math-verify (sympy underneath).

    reference --as LaTeX--> gold ---\
                                     verify(gold, answer) -> right or wrong
    response --window--> answer ----/

sympy works as long and takes as much memory as an expression asks for, so this runs only where it can be killed:
see worker.py. math-verify's own time-outs are switched off; they are alarms that arithmetic in C outlives.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

from math_verify import ExprExtractionConfig, LatexExtractionConfig, StringExtractionConfig, parse, verify
from math_verify.errors import TimeoutException

from ..types import Verdict
from .case import BadReference, Case
from .extract import MAX_ANSWER_CHARS, boxed, final_answer, plain, spoken
from .policies import MathPolicy
from .text_rules import NO_ANSWER

WINDOW_CHARS = 4096
"""The end of a response, where its answer is looked for; a box that stands before it counts all the same."""

_DELIMITED = re.compile(r"(?<!\\)\$|\\\(|\\\[|\\f?boxed")
_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:[ ,]\d{3})+(?:\.\d+)?|\d*\.?\d+)")
_DECIMAL_COMMA = re.compile(r"[-+]?\d+,\d+")
_LATEX = re.compile(r"[\\^{}]")
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{3,}")
_UPRIGHT = re.compile(r"\\(?:text|textrm|mathrm|mbox)\s{0,8}\{([^{}]*)\}")
_DRESS = re.compile(r"\\[,;:! ]|\$|~|\\[()\[\]]")
_UNIT = re.compile(r"(?<![A-Za-z\\])[A-Za-z\u00b0\u00b5\u03bc%][A-Za-z\u00b0\u00b5\u03bc%/^*0-9 -]*$")
_PERCENT = re.compile(r"\\?%|\b(?:percent|pct)\b", re.IGNORECASE)


def check(reference: str, policy: MathPolicy) -> None:
    """Reads the reference and compares it with a number, any: it may be read at once and take forever to work out."""
    gold = _gold(reference, policy)
    if not _mathematical(gold, policy):
        raise BadReference(f"the reference can't be read as mathematics: {reference[:80]!r}")
    _equal(gold, _parse("$0.5$", policy), policy)


def judge(case: Case, policy: MathPolicy) -> Verdict:
    """Right iff the answer equals the reference under the policy; without an answer it is wrong.

    Raises BadReference if the reference is not mathematics, unless the answer is the very same text.
    """
    gold = _gold(case.reference, policy)
    text = spoken(case.response)
    boxes = {"".join(box.split()) for box in boxed(text)} if policy.several_boxes == "refuse" else set()
    value, unit = _split_unit(final_answer(text)) if policy.units == "compare" else ("", "")
    answers = _parse(f"${value}$" if value else _window(text, policy), policy)
    if not _mathematical(gold, policy):
        if not set(gold) & {answer for answer in answers if isinstance(answer, str)}:
            check(case.reference, policy)
        return Verdict(correct=True, note="the same text")
    if not answers:
        return NO_ANSWER
    if len(boxes) > 1:
        return Verdict(correct=False, note="several boxes with different contents")
    if policy.units == "compare" and unit != _split_unit(case.reference)[1]:
        return Verdict(correct=False, note="other units")
    read = answers[-1] if isinstance(answers[-1], str) else ""
    return Verdict(correct=_equal(gold, answers, policy), note=f"read as {read[:80]}" if read else "")


@lru_cache(maxsize=256)
def _gold(reference: str, policy: MathPolicy) -> list[Any]:
    """The reference, parsed. LaTeX without delimiters is given them: `2^{19}` would be read as the number 2."""
    text = plain(reference).strip()
    if not 0 < len(text) <= MAX_ANSWER_CHARS:
        raise BadReference(f"the reference has {len(text)} characters; 1 to {MAX_ANSWER_CHARS} are taken")
    if policy.units == "compare":
        text = _split_unit(text)[0]
    if _DELIMITED.search(text) or _NUMBER.fullmatch(text) or text in tuple(policy.letters):
        return _parse(text, policy)
    decimal = _parse(text, policy) if policy.decimal_comma and _DECIMAL_COMMA.fullmatch(text) else []
    return decimal + _parse(f"${text}$", policy)


def _mathematical(gold: list[Any], policy: MathPolicy) -> bool:
    """Whether something was understood: what math-verify could not read, it hands back as text."""
    return any(not isinstance(value, str) or value in tuple(policy.letters) for value in gold)


def _equal(gold: list[Any], answers: list[Any], policy: MathPolicy) -> bool:
    try:
        equal = verify(
            gold,
            answers,
            float_rounding=policy.decimals,
            strict=policy.same_variables,
            allow_set_relation_comp=policy.relations_as_sets,
            timeout_seconds=None,
        )
    except TimeoutException:  # No Exception; the package raises it wherever it has set an alarm.
        return False
    return bool(equal)


def _window(text: str, policy: MathPolicy) -> str:
    """The part of a response that math-verify looks at, with delimiters for an answer that is LaTeX without them."""
    window = text[-WINDOW_CHARS:]
    if policy.several_boxes == "last" or (len(text) > WINDOW_CHARS and "boxed{" not in window):
        boxes = boxed(text)
        if boxes:
            return rf"\boxed{{{boxes[-1]}}}" if len(boxes[-1]) <= MAX_ANSWER_CHARS else ""
    if not _DELIMITED.search(window):
        answer = final_answer(window).removesuffix(".")
        if _LATEX.search(answer) and not _WORD.search(answer):
            return f"${answer}$"
    return window


def _split_unit(text: str) -> tuple[str, str]:
    """The value and what follows it: `$5 \\text{ km/h}$.` is `5` and `km/h`."""
    text = _DRESS.sub("", _UPRIGHT.sub(r" \1", plain(text))).strip().removesuffix(".")
    match = _UNIT.search(text)
    return (text[: match.start()].strip(), "".join(match[0].split())) if match else (text, "")


def _parse(text: str, policy: MathPolicy) -> list[Any]:
    """What math-verify reads in `text`, best first; a string in it is the text of what it could not read."""
    if policy.percent == "ignore":
        text = _PERCENT.sub("", text)
    values = parse(text, list(_targets(policy.letters)), parsing_timeout=None)
    return [value for value in values if value is not None and value != ""]


@lru_cache(maxsize=16)
def _targets(letters: str) -> tuple[Any, ...]:
    """What to look for: LaTeX, its units and boxes taken care of; plain numbers and terms; letters."""
    found = (LatexExtractionConfig(), ExprExtractionConfig())
    return (*found, StringExtractionConfig(strings=tuple(letters), lowercase=False)) if letters else found
