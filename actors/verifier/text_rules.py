"""Rules that compare text: exact, multiple choice, regular expression. Pure functions of a case and a policy.

    judge(case, policy) -> Verdict                    check(reference, policy) raises BadReference

Knows nothing of processes; `regex` may take forever on a bad pattern, so it is run where it can be killed.
"""

from __future__ import annotations

import re

from ..types import Verdict
from .case import BadReference, Case
from .extract import final_answer, plain
from .policies import ChoicePolicy, ExactPolicy, RegexPolicy

RIGHT, WRONG = Verdict(correct=True), Verdict(correct=False)
NO_ANSWER = Verdict(correct=False, note="no answer found")

MAX_PATTERN_CHARS = 10_000


def check_exact(reference: str, policy: ExactPolicy) -> None:
    if not _fold(reference, policy):
        raise BadReference("the reference is empty")


def exact(case: Case, policy: ExactPolicy) -> Verdict:
    """Right iff the final answer is the reference, up to what the policy ignores."""
    check_exact(case.reference, policy)
    answer = _fold(final_answer(case.response), policy)
    return _verdict(answer == _fold(case.reference, policy)) if answer else NO_ANSWER


def check_choice(reference: str, policy: ChoicePolicy) -> None:
    if _letter(reference, policy) is None:
        raise BadReference(f"the reference must be one of the letters {policy.letters}, got {reference[:80]!r}")


def multiple_choice(case: Case, policy: ChoicePolicy) -> Verdict:
    """Right iff the final answer names one letter, the reference: `B`, `(B)`, `B.`, `**B**`, `B) because ...`.

    Case counts, so that the article in "a mouse" is no answer. Two letters are none.
    """
    check_choice(case.reference, policy)
    answer = _letter(final_answer(case.response), policy)
    return _verdict(answer == _letter(case.reference, policy)) if answer else NO_ANSWER


def check_regex(reference: str, policy: RegexPolicy) -> None:
    _pattern(reference, policy)


def regex(case: Case, policy: RegexPolicy) -> Verdict:
    """Right iff the pattern, which is the reference, matches the whole final answer."""
    pattern = _pattern(case.reference, policy)
    answer = final_answer(case.response)
    return _verdict(pattern.fullmatch(answer) is not None)


def _verdict(right: bool) -> Verdict:
    return RIGHT if right else WRONG


def _fold(text: str, policy: ExactPolicy) -> str:
    text = plain(text).strip()
    if policy.ignore_spaces:
        text = "".join(text.split())
    return text.casefold() if policy.ignore_case else text


def _letter(text: str, policy: ChoicePolicy) -> str | None:
    """The one letter that `text` names; None if there is none or more than one."""
    letters = re.escape(policy.letters)
    text = re.sub(r"\\(?:text|mathrm|mathbf|textbf)\s{0,8}\{([^{}]{0,80})\}", r"\1", plain(text)[:1000])
    alone = re.fullmatch(rf"[\s*$({{\[]*([{letters}])[\s*$)}}\].:,;]*", text)
    if alone:
        return alone[1]
    led = re.match(rf"[\s*$(\[]*([{letters}])\**[.):\]]", text)
    named = set(re.findall(rf"(?<![A-Za-z])[(\[]?([{letters}])[)\].:](?![A-Za-z])", text))
    return led[1] if led and named <= {led[1]} else None


def _pattern(reference: str, policy: RegexPolicy) -> re.Pattern[str]:
    if len(reference) > MAX_PATTERN_CHARS:
        raise BadReference(f"the pattern has {len(reference)} characters, at most {MAX_PATTERN_CHARS} are taken")
    try:
        return re.compile(reference, re.IGNORECASE if policy.ignore_case else re.NOFLAG)
    except (re.error, OverflowError, RecursionError) as error:
        raise BadReference(f"the reference is no regular expression: {error}") from None
