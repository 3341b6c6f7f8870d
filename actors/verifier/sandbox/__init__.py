"""Runs a program that nobody trusts, once, where it can reach nothing: no network, no files and processes but its own.

    pool.py       sandboxes that are started ahead, each used for one run, replaced in the background
      box.py        one of them: a bubblewrap process, its socket, its end
      bubble.py     the command line: namespaces, what is mounted; whether it works here; seccomp.py: calls refused
      keeper.py     the program inside, process 1: takes one order, runs it under limits, reports
    order.py      what is asked, and what comes back

Knows nothing of tests, verdicts or languages.
"""

from .bubble import SandboxUnavailable as SandboxUnavailable
from .order import Order as Order
from .order import Outcome as Outcome
from .order import RunLimits as RunLimits
from .order import SandboxFailed as SandboxFailed
from .pool import SandboxPool as SandboxPool
