"""An algorithm of the user's own in the real job: the README's, a coroutine with a loss of its own, and mistakes."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_job import CLUSTER, check_rows, launch

README = (Path(__file__).resolve().parent.parent / "README.md").read_text()

COROUTINE = '''
"""Every token of a correct answer is made likelier."""

from headrace.actors.algorithms import Objective


async def step(batch, *, policy):
    advantages = batch.spread(batch.correct.astype("float32"))
    return await policy.update(batch, advantages, Objective(function="own_coroutine:loss"))


def loss(logprobs, behaviour, advantage, num_tokens):
    return -(advantage * logprobs).sum() / num_tokens
'''

TWICE = """
async def step(batch, *, policy):
    advantages = batch.spread(batch.rewards)
    return {**await policy.update(batch, advantages), **await policy.update(batch, advantages)}
"""


def example() -> str:
    blocks = re.findall(r"^```python\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    (found,) = [block for block in blocks if "my_algorithm.py" in block]
    return str(found)


@pytest.mark.slow
def test_the_readmes_example_trains(tmp_path: Path) -> None:
    assert example().count("\n") < 60
    (tmp_path / "my_algorithm.py").write_text(example())
    settings = {"rl.algorithm": "my_algorithm:LeaveOneOut", "algorithm.clip": 0.3}
    with launch(tmp_path, settings) as job:
        assert job.finish() == 0, job.errors
    check_rows(job, 6)
    assert "clip = 0.3" in (job.run / "config.toml").read_text()
    assert {row["skipped_updates"] for row in job.rows()} == {0}


@pytest.mark.slow
def test_a_coroutine_with_a_loss_of_its_own_trains(tmp_path: Path) -> None:
    (tmp_path / "own_coroutine.py").write_text(COROUTINE)
    with launch(tmp_path, {"rl.algorithm": "own_coroutine:step"}) as job:
        assert job.finish() == 0, job.errors
    check_rows(job, 6)
    losses = [row["loss"] for row in job.rows()]
    assert min(losses) >= 0 and max(losses) > 0, "a mean over correct answers, not the surrogate"


@pytest.mark.slow
def test_an_algorithm_that_updates_twice_in_a_step_ends_the_run_with_a_line(tmp_path: Path) -> None:
    (tmp_path / "own_twice.py").write_text(TWICE)
    with launch(tmp_path, {"rl.algorithm": "own_twice:step"}) as job:
        assert job.finish() == 1
    assert "own_twice:step called policy.update 2 times in a step; a step makes one" in job.errors.splitlines()[0]
    assert "Traceback" not in job.output + job.errors


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import no_such_thing\n", "[rl] algorithm: mistaken needs 'no_such_thing', which is not installed"),
        ("1 / 0\n", "[rl] algorithm: mistaken can't be imported: ZeroDivisionError: division by zero"),
        ("async def stepp(batch, *, policy): ...\n", 'mistaken has no step; did you mean "stepp"?'),
        (
            "async def step(batch): ...\n",
            "step must be `async def` and take (batch, *, policy), got (batch)",
        ),
        (
            "def step(batch, *, policy): ...\n",
            "step must be `async def` and take (batch, *, policy), got a plain function",
        ),
    ],
)
def test_check_says_what_is_wrong_in_a_line(source: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / "mistaken.py").write_text(source)
    command = [sys.executable, "-P", "-m", "headrace", "launch", str(CLUSTER), "--check"]
    done = subprocess.run(
        [*command, "--set", "rl.algorithm=mistaken:step"], capture_output=True, text=True, timeout=60, check=False,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 2 and done.stdout == ""
    assert expected in done.stderr and done.stderr.count("\n") == 1
