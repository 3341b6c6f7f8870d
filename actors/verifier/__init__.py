"""Verifiers: actors that turn a response into a verdict: correct, incorrect, a number, or an error.

actor.py             RuleVerifier: that of the default job
text_verifier.py     TextVerifier: by a rule, or by a function of the user's own (function.py)
puzzle_verifier.py   PuzzleVerifier: the logic suite in puzzles/
  hearing.py           from the responses of a group to cases
  court.py             cache, retries with a budget, deadline, metrics.py
  judging.py           one attempt: in this process, or by
  workers.py           a pool of processes that may be killed; worker.py and tasks.py are the inside of one
  registry.py          the rules by name: text_rules.py, json_rule.py, math_rule.py; their settings: policies.py
  extract.py           where the final answer stands in a response
"""

from .actor import RuleVerifier as RuleVerifier
from .case import Case as Case
from .puzzle_verifier import PuzzleVerifier as PuzzleVerifier
from .text_verifier import TextVerifier as TextVerifier
