"""Verifiers: actors that turn a response into a verdict: correct, incorrect, a number, or an error.

actor.py             RuleVerifier: that of the default job
text_verifier.py     TextVerifier: by a rule, or by a function of the user's own (function.py)
  court.py             cache, retries with a budget, deadline, metrics.py
  judging.py           one attempt: in this process, or by
  workers.py           a pool of processes that may be killed; worker.py and tasks.py are the inside of one
  registry.py          the rules by name: text_rules.py, json_rule.py, math_rule.py; their settings: policies.py
  extract.py           where the final answer stands in a response
"""

from .actor import RuleVerifier as RuleVerifier
from .case import Case as Case
from .text_verifier import TextVerifier as TextVerifier
