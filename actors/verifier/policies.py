"""What counts as equal, explicit for each data set: plain settings of the rules. Imports no rule.

[actors.verifier.policy] holds the policy of all cases, [actors.verifier.policies.NAME] that of the data set NAME.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal, TypeVar

from annotated_types import Ge, Le, MinLen

from ...runtime.toml import nearest

P = TypeVar("P")


@dataclass(frozen=True, kw_only=True)
class ExactPolicy:
    """Rule `exact`: the final answer is the reference, character by character."""

    ignore_case: bool = False
    ignore_spaces: bool = False
    """All white space, inside the answer too; at its ends it never counts."""


@dataclass(frozen=True, kw_only=True)
class RegexPolicy:
    """Rule `regex`: the reference is a pattern that the whole final answer must match."""

    ignore_case: bool = False


@dataclass(frozen=True, kw_only=True)
class ChoicePolicy:
    """Rule `multiple_choice`: the final answer names one of these letters, and it is the reference."""

    letters: Annotated[str, MinLen(2)] = "ABCDEFGHIJ"


@dataclass(frozen=True, kw_only=True)
class JsonPolicy:
    """Rule `json_schema`: the reference is a JSON Schema (draft 2020-12) that the answer's JSON document must fit."""

    fenced: bool = True
    """Whether the document may stand in the last ``` block of a longer response; else the response is the document."""


@dataclass(frozen=True, kw_only=True)
class MathPolicy:
    """Rule `math`: the final answer equals the reference as mathematics."""

    decimals: Annotated[int, Ge(0), Le(50)] = 6
    """Numbers are equal if they agree when rounded to so many decimal places: with 6, 0.333333 is 1/3, 0.333 is not."""
    units: Literal["ignore", "compare"] = "ignore"
    """Whether `5 cm` is `5` (and so `5 m`), or what follows the number is compared, too, as text."""
    percent: Literal["hundredths", "ignore"] = "hundredths"
    """Whether `50 %` is 1/2 (and 50, if the reference has the sign, too), or the sign is dropped: `50 %` is 50."""
    several_boxes: Literal["join", "last", "refuse"] = "join"
    """What several boxes mean: together the set of solutions, so that `5` and `3` is not 3; the last one; or, if their
    contents differ, an incorrect answer."""
    decimal_comma: bool = True
    """Whether the reference 1,5 may also be read as 1.5, or only as the two numbers 1 and 5."""
    same_variables: bool = True
    """Whether f(x) and f(y) differ, and {1, 2} and (1, 2)."""
    relations_as_sets: bool = False
    """Whether 1 < x < 2 as an answer is the reference (1, 2); the other way round it always is."""
    letters: str = ""
    """Single letters that are answers by themselves, "ABCD", in data that mixes in multiple choice."""


MATH_POLICIES = {
    "gsm8k": MathPolicy(percent="ignore"),
    "math500": MathPolicy(decimal_comma=False),
    "aime": MathPolicy(decimals=0, several_boxes="refuse"),
}
"""Policies of well-known data sets, to start from."""


def build_policy(cls: type[P], values: Mapping[str, Any]) -> P:
    """The policy with `values`. Raises ValueError that names the key, the rule and the value."""
    import pydantic_core  # Here only: a node whose verifier has no policy starts without it.
    from pydantic import TypeAdapter, ValidationError

    known = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            raise ValueError(f"unknown key {key!r}{nearest(key, known, otherwise=_choices(known))}")
    try:
        return TypeAdapter(cls).validate_json(pydantic_core.to_json(dict(values)), strict=True)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        where = ".".join(map(str, problem["loc"]))
        rule = problem["msg"].replace("Input should be", "must be")
        raise ValueError(f"{where} {rule}, got {problem['input']!r}") from None


def _choices(known: Mapping[str, Any]) -> str:
    return f"; known are {', '.join(known)}"
