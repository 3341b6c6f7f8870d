"""The verifier for answers that are text: by a rule of registry.py or by a function of the user's own (function.py).

[actors.verifier]
class = "headrace.actors.verifier:TextVerifier"
rule = "math"                                     or: function = "my.module:judge"

[actors.verifier.policy]                          the rule's settings: policies.py
units = "compare"

[actors.verifier.policies.gsm8k]                  those of the cases of one data set, as their prompts name it
percent = "ignore"
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

from annotated_types import Ge

from .function import check_options, load_function
from .hearing import CourtVerifier
from .judging import ByWorkers, InProcess
from .policies import build_policy
from .registry import rule as find_rule
from .workers import Limits


@dataclass(kw_only=True)
class TextVerifier(CourtVerifier):
    """Judges the text of responses. Hostile text, a crash and a hang cost one worker process, never the actor."""

    rule: str = ""
    """exact, multiple_choice, regex, json_schema or math."""
    function: str = ""
    """In place of a rule: "module:name" of a function or class."""
    options: dict[str, Any] = field(default_factory=dict)
    """Arguments of the class that `function` names."""
    policy: dict[str, Any] = field(default_factory=dict)
    """What counts as equal: the settings of the rule, see policies.py."""
    policies: dict[str, dict[str, Any]] = field(default_factory=dict)
    """The same for single data sets, by their names; a key that is left out is that of `policy`."""
    workers: Annotated[int, Ge(1)] = 2
    """Processes that judge, and cases that are judged at a time."""
    limits: Limits = field(default_factory=Limits)
    """What one case may use."""

    def __post_init__(self) -> None:
        if bool(self.rule) == bool(self.function):
            raise ValueError(f"rule must be set, or function, one of them; got {self.rule!r} and {self.function!r}")
        if self.rule:
            for dataset, values in self._policies().items():
                try:
                    build_policy(find_rule(self.rule).policy, values)
                except ValueError as error:
                    raise ValueError(f"{f'policies {dataset}:' if dataset else 'policy'} {error}") from None
            if self.options:
                raise ValueError("options need a class that function names; a rule's settings are its policy")
        else:
            if self.policy or self.policies:
                raise ValueError("policy needs a rule; what a class is to be told are its options")
            check_options(load_function(self.function), self.options)

    async def start(self) -> None:
        self._judging: InProcess | ByWorkers
        if self.function:
            self._judging = ByWorkers.function(self.function, self.options, workers=self.workers, limits=self.limits)
        elif find_rule(self.rule).killable:
            self._judging = ByWorkers.rule(self.rule, self._policies(), workers=self.workers, limits=self.limits)
        else:
            self._judging = InProcess(self.rule, self._policies())
        self.open_court(self._judging.judge, places=self.workers)

    async def stop(self, reason: BaseException | None) -> None:
        await self._judging.close()

    def _policies(self) -> dict[str, dict[str, Any]]:
        return {"": self.policy} | {name: {**self.policy, **values} for name, values in self.policies.items()}
