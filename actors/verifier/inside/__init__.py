"""Programs that run inside sandboxes, under the sandbox's interpreter: standard library only, and nothing of headrace.

candidate.py    holds a submission, and serves calls of its functions
examiner.py     holds the tests, and calls those functions
plain.py        what travels between the two: values as data
"""

from pathlib import Path

FOLDER = Path(__file__).parent


def program(name: str) -> bytes:
    """The text of one of them."""
    return (FOLDER / f"{name}.py").read_bytes()
