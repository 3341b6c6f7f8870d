"""What a worker process judges by: made there from plain values, so that only names and settings cross the pipe.

    rule(...)       one of registry.py        function(...)      the user's own, function.py

Each makes `judge(request) -> report`; see worker.py for both.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import cache
from typing import Any

from .case import BadReference, Case
from .function import ask, load_function, make
from .policies import build_policy
from .registry import rule as find_rule
from .worker import MAX_REPORT_TEXT, Report


def rule(name: str, policies: Mapping[str, Mapping[str, Any]]) -> Callable[[Any], Report]:
    """Judges by the rule `name`; the policy is that of the case's data set, or else that under ""."""
    found = find_rule(name)
    logging.disable(logging.WARNING)  # Libraries complain of what models write.
    judge, check = found.load()
    built: dict[str, Any] = {dataset: build_policy(found.policy, values) for dataset, values in policies.items()}

    if found.sample is not None:
        judge(found.sample, built[""])

    def answer(request: Mapping[str, Any]) -> Report:
        case = Case(**request["case"])
        policy = built.get(case.dataset, built[""])
        try:
            if request["only_reference"]:
                check(case.reference, policy)
                return {"reference_is_good": True}
            return {"verdict": asdict(judge(case, policy))}
        except BadReference as error:
            return {"bad_reference": str(error)[:MAX_REPORT_TEXT]}
        except RecursionError:
            return {"ended": "nested too deeply", "own_fault": True}

    return answer


def function(path: str, options: Mapping[str, Any]) -> Callable[[Any], Report]:
    """Judges by the user's function or class; an instance is made by each worker, when its first case comes."""
    found = load_function(path)
    judge = cache(lambda: make(found, options))

    def answer(request: Mapping[str, Any]) -> Report:
        return {"verdict": asdict(ask(judge, Case(**request["case"])))}

    return answer
