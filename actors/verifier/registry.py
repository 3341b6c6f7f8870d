"""The rules by name, and where their code is: named here, imported only where it runs.

A rule is two plain functions: `judge(case, policy) -> Verdict`, and `check(reference, policy)` that may raise
BadReference.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ...runtime.toml import nearest
from ..types import Verdict
from .case import Case
from .policies import ChoicePolicy, ExactPolicy, JsonPolicy, MathPolicy, RegexPolicy

Judge = Callable[[Case, Any], Verdict]
Check = Callable[[str, Any], None]


@dataclass(frozen=True)
class Rule:
    """How one rule is found and run."""

    name: str
    judge: str
    """module:function, the module in this package."""
    check: str
    policy: type
    killable: bool
    """Whether it may take forever, or too much memory, so that it runs in a worker process only."""
    sample: Case | None = None
    """Judged once before children are forked, so that each starts with what the rule's libraries build up."""

    def load(self) -> tuple[Judge, Check]:
        """Imports the code."""
        return _load(self.judge), _load(self.check)


HALF = Case(reference=r"\frac{1}{2}", response=r"So \boxed{0.5}, or $\frac{2}{4}$.")

RULES = {
    rule.name: rule
    for rule in (
        Rule("exact", "text_rules:exact", "text_rules:check_exact", ExactPolicy, killable=False),
        Rule("multiple_choice", "text_rules:multiple_choice", "text_rules:check_choice", ChoicePolicy, killable=False),
        Rule("regex", "text_rules:regex", "text_rules:check_regex", RegexPolicy, killable=True),
        Rule("json_schema", "json_rule:judge", "json_rule:check", JsonPolicy, killable=True),
        Rule("math", "math_rule:judge", "math_rule:check", MathPolicy, killable=True, sample=HALF),
    )
}


def rule(name: str) -> Rule:
    """The rule of that name. Raises ValueError that names the nearest one."""
    if name not in RULES:
        hint = nearest(name, RULES, otherwise=f"; known are {', '.join(RULES)}")
        raise ValueError(f"rule: there is no rule {name!r}{hint}")
    return RULES[name]


def _load(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(f"{__package__}.{module}"), name)
