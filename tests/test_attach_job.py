"""The REPL in a real job, small as it is: what the README shows, settings that survive, what is told of a sample."""

import contextlib
import doctest
import io
import re
import signal
import time
from pathlib import Path

import pytest
from tiny_job import check_rows, launch

from headrace.attach_files import offline_names
from headrace.attach_link import Link
from headrace.attach_shell import Shell

README = (Path(__file__).parents[1] / "README.md").read_text()

TRANSCRIPTS = [
    text for text in re.findall(r"^```console\n(.*?)^```$", README, re.DOTALL | re.MULTILINE) if ">>> " in text
]

STEPS = 24


def typed(shell: Shell, source: str) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        shell.run(source)
    return out.getvalue()


def play(shell: Shell, transcript: str) -> list[tuple[str, str, str]]:
    """Types what stands behind the prompts; returns (input, what is shown there, what came) where that differs by more
    than numbers, and by more than an ellipsis stands for."""
    differ = []
    for part in re.split(r"^(?=[\w/]*>>> )", transcript, flags=re.MULTILINE)[1:]:
        first, _, shown = part.partition("\n")
        came = typed(shell, first.partition(">>> ")[2])
        shown = shown.replace("default\n", "tiny\n")
        want, got = (re.sub(r"\d[\d.e-]*", "7", text).strip() + "\n" for text in (shown, came))
        flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
        if not doctest.OutputChecker().check_output(want, got, flags):
            differ.append((first, shown, came))
    return differ


@pytest.mark.slow
def test_a_job_is_looked_into_changed_killed_and_resumed(tmp_path):
    settings = {"rl.steps": STEPS, "rl.checkpoint_every": 2}
    with launch(tmp_path, settings) as job:
        job.wait_for_step(3)
        link = Link(job.run)
        shell = Shell(link)
        assert "RolloutPool(rollout up, version" in typed(shell, "rollout_pool")
        for transcript in TRANSCRIPTS:
            assert play(shell, transcript) == []
        trained = link.ask("peek", actor="controller", path="stories._told['trained']")
        ordinal = int(re.search(r"\{(\d+):", trained)[1])
        story = typed(shell, f"explain({ordinal})")
        for words in (
            "controller:",
            "trained  step",
            "response 0",
            "by version",
            "workers rollout",
            "reward",
            "pool:",
            "acked",
        ):
            assert words in story, story
        changed = typed(shell, "settings(max_staleness=0, learning_rate=1.5e-4, temperature=0.9)")
        assert "learning_rate: 0.0003 -> 0.00015" in changed and "later" not in changed
        reached = job.rows()[-1]["step"]
        job.wait_for_step(reached + 4)
        assert 0.9 == float(link.ask("peek", actor="trainer", path="_learner._temperature"))
        job.interrupt(signal.SIGKILL)
        job.finish()
        shell.close()
        time.sleep(0.5)
    with launch(tmp_path, settings, "--resume") as job:
        assert job.finish() == 0, job.errors
        check_rows(job, STEPS)
        late = [row for row in job.rows() if row["step"] > reached + 3]
        assert len(late) > 5 and all(row["staleness_max"] == 0 for row in late)
        assert all(row["learning_rate"] <= 1.5e-4 for row in late) and late[0]["learning_rate"] > 1e-5
    names = offline_names(job.run)
    known = re.search(r"known are some of \d+ to (\d+)", repr(names["explain"](10**9)))
    assert "put" in repr(names["explain"](int(known[1]))) or "retired" in repr(names["explain"](int(known[1])))
