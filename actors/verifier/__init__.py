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
code_verifier.py     CodeVerifier: programs, against tests, in sandboxes
  code_tests.py        what a program is judged by; code_extract.py: where it stands in a response
  code_judge.py        build, run, compare: AC, WA, TLE, MLE, RE, CE; code_functions.py: tests that call functions
  code_compare.py      ways to compare outputs; code_languages.py: Python, C++
  sandbox/             runs a program that can reach nothing; inside/: programs of ours that run in there
"""

from .actor import RuleVerifier as RuleVerifier
from .case import Case as Case
from .code_verifier import CodeVerifier as CodeVerifier
from .puzzle_verifier import PuzzleVerifier as PuzzleVerifier
from .text_verifier import TextVerifier as TextVerifier
