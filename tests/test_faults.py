"""kill -9 of any actor's process at any time, and actors that misbehave: the run reaches its end or says why not."""

from __future__ import annotations

import re
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest
from tiny_job import CLUSTER, NODES, Launch, check_rows, launch


def cluster_with(tmp: Path, actor: str, name: str, **fields: object) -> Path:
    """The default cluster file with another class for an actor."""
    before, head, after = CLUSTER.read_text().partition(f"[actors.{actor}]")
    comment, _, rest = after.partition("\n")
    kind, _, rest = rest.partition("\n")
    assert kind.startswith("class = ")
    lines = [f'class = "job_actors:{name}"', *(f"{key} = {value!r}" for key, value in fields.items())]
    path = tmp / "cluster.toml"
    path.write_text(f"{before}{head}{comment}\n" + "\n".join(lines) + f"\n{rest}")
    return path


def ended_well(job: Launch, steps: int, *killed: str) -> None:
    """The run has reached its end with nothing but kills and restarts of these nodes' actors on its way."""
    assert job.finish() == 0, job.errors
    assert job.errors == ""
    assert job.left_behind() == []
    check_rows(job, steps)
    assert {(e["node"], e["reason"]) for e in job.events("node_exit")} == {
        (node, "killed by SIGKILL") for node in killed
    }
    assert job.events("actor_exit") == []
    restarts = [e["actor"] for e in job.events("actor_restart")]
    assert job.summary["restarts"] == Counter(restarts)
    assert set(restarts) == {*killed, *(["balancer"] if "reward" in killed else [])}


@pytest.mark.slow
def test_every_worker_may_be_killed_in_the_middle_of_rl(tmp_path: Path) -> None:
    with launch(tmp_path, {"rl.steps": 40}) as job:
        job.wait_for_step(4)
        job.kill("rollout")
        job.wait_for_event("answers_continued")
        job.wait_for_step(len(job.rows()) + 3)
        job.kill("verifier", "reward")
        job.wait_for_event("actor_up", actor="reward", incarnation=2)
        job.wait_for_step(len(job.rows()) + 3)
        job.kill("trainer")
        job.wait_for_event("actor_up", actor="trainer", incarnation=2)
        ended_well(job, 40, *NODES)
    assert set(job.summary["restarts"].values()) == {1}


@pytest.mark.slow
def test_workers_may_be_killed_together_and_again_as_they_come_back(tmp_path: Path) -> None:
    with launch(tmp_path, {"rl.steps": 40}) as job:
        job.wait_for_step(6)
        job.kill("trainer", "rollout")
        job.wait_for_event("answers_continued")
        job.wait_for_step(len(job.rows()) + 3)
        job.kill("rollout")
        job.wait_for_event("node_start", node="rollout", incarnation=3)
        job.kill("rollout")
        job.wait_for_event("node_start", node="rollout", incarnation=4)
        job.wait_for_step(len(job.rows()) + 8)
        job.kill(*NODES)
        ended_well(job, 40, *NODES)
    assert any(e["batches"] for e in job.events("batches_repeated"))


@pytest.mark.slow
def test_workers_may_be_killed_in_the_warm_up_and_while_it_is_measured(tmp_path: Path) -> None:
    settings = {"sft.steps": 200, "sft.checkpoint_every": 60, "evaluation.num_problems": 512}
    with launch(tmp_path, settings) as job:
        job.wait_for_step(100, "sft")
        job.kill("trainer")
        job.wait_for_event("actor_up", actor="trainer", incarnation=2)
        job.kill("rollout")
        job.wait("the last step of the warm-up", lambda: trained(job) >= 180)
        job.wait_for_event("actor_up", actor="rollout", incarnation=2)
        job.kill("rollout", "verifier", "trainer")
        ended_well(job, 6, "rollout", "trainer", "verifier")
    assert [row["step"] for row in job.rows("sft")] == list(range(20, 201, 20))
    assert [(e["stage"], e["n"]) for e in job.summary["evaluation"]] == [("sft", 512), ("rl", 512)]


@pytest.mark.slow
def test_workers_that_are_killed_as_the_run_ends_do_not_hold_it_up(tmp_path: Path) -> None:
    with launch(tmp_path) as job:
        job.wait_for_event("checkpoint", folder="done-000006")
        with suppress(ProcessLookupError):
            job.kill("rollout", "verifier", "trainer")
        assert job.finish() == 0, job.errors
    assert job.summary["ok"] and job.events("node_stop_late") == []
    assert job.left_behind() == []


def trained(job: Launch) -> int:
    return max((row["step"] for row in job.rows("sft")), default=0)


@pytest.mark.slow
def test_a_verifier_that_errs_costs_only_the_groups_that_it_can_not_judge(tmp_path: Path) -> None:
    with launch(tmp_path, {"rl.steps": 5}, cluster=cluster_with(tmp_path, "verifier", "Erratic")) as job:
        assert job.finish() == 0, job.errors
    check_rows(job, 5)
    last = job.rows()[-1]
    assert last["failed_groups"] >= 6
    reasons = sorted(e["reason"] for e in job.events("group_failed"))
    assert reasons[0] == "ZeroDivisionError: verifier.judge raised ZeroDivisionError: a verifier's bug"
    assert re.match(r"no verdict in time: controller:group \d+ waits for verifier.judge: no answer within", reasons[1])
    assert reasons[2:] == ["too few verdicts: the sandbox is gone"]
    sizes = {row["responses"] for row in job.rows()}
    assert sizes <= {12, 13, 14, 15, 16} and sizes != {16}, "a member without a verdict takes no part"
    assert "Traceback" not in job.output + job.errors


@pytest.mark.slow
def test_an_actor_that_can_not_start_ends_the_run_with_a_line(tmp_path: Path) -> None:
    with launch(tmp_path, cluster=cluster_with(tmp_path, "verifier", "NeverStarts")) as job:
        assert job.finish() == 1
    assert job.errors.splitlines()[0] == "the run failed: verifier did not start: OSError: no sandbox"
    assert len(job.errors.splitlines()) == 3
    assert "Traceback" not in job.output
    assert job.left_behind() == []
    (failed,) = job.events("run_failed")
    assert "Traceback" in failed["traceback"] and "on this machine" in failed["traceback"]
    assert not job.summary["ok"] and job.summary["reason"] == "verifier did not start: OSError: no sandbox"


@pytest.mark.slow
def test_an_actor_that_never_comes_back_uses_up_its_budget_and_ends_the_run(tmp_path: Path) -> None:
    cluster = cluster_with(tmp_path, "verifier", "StartsOnce", lock=str(tmp_path / "lock"), max_restarts=2)
    with launch(tmp_path, {"rl.steps": 1000}, cluster=cluster) as job:
        job.wait_for_step(2)
        job.kill("verifier")
        assert job.finish() == 1
    steps = len(job.rows())
    assert "verifier failed again after 2 restarts" in job.errors.splitlines()[0]
    assert "File exists" in job.errors.splitlines()[0]
    assert len(job.errors.splitlines()) == 3 and "Traceback" not in job.output + job.errors
    assert job.left_behind() == []
    summary = job.summary
    assert not summary["ok"] and summary["steps"] == steps and summary["restarts"] == {"verifier": 2}


@pytest.mark.slow
def test_a_controller_that_fails_again_and_again_is_given_up(tmp_path: Path) -> None:
    with launch(tmp_path, {"rl.steps": 30}, cluster=cluster_with(tmp_path, "controller", "FailsAtStep6")) as job:
        assert job.finish() == 1
    text = "the run failed: the controller failed 3 times with no step in between: ZeroDivisionError: step 6"
    assert job.errors.splitlines()[0] == text
    assert len(job.errors.splitlines()) == 3 and "Traceback" not in job.output
    assert job.left_behind() == []
    assert [row["step"] for row in job.rows()] == [1, 2, 3, 4, 5]
    shown = [line.split()[2] for line in job.output.splitlines() if line.split()[1:2] == ["rl"]]
    assert shown[:4] == ["1/30", "2/30", "3/30", "4/30"] and len(shown) == len(set(shown)), "each step is shown once"


@pytest.mark.slow
def test_weights_that_are_no_numbers_are_not_published_and_end_the_run_with_the_reason(tmp_path: Path) -> None:
    with launch(tmp_path, {"rl.steps": 30}, cluster=cluster_with(tmp_path, "trainer", "Diverges")) as job:
        assert job.finish() == 1
    reason = job.errors.splitlines()[0]
    assert "BadWeights: lm_head.weight of version 4 has at least 1 values that are not finite" in reason
    assert len(job.errors.splitlines()) == 3 and "Traceback" not in job.output
    assert job.left_behind() == [] and job.summary["reason"] in reason
    assert max(row["version"] for row in job.rows()) <= 4


@pytest.mark.slow
def test_by_the_tree(tmp_path: Path) -> None:
    """Weights may go by it; whoever comes back fetches them anew. (The name is short: sockets lie in its folder.)"""
    with launch(tmp_path, {"rl.steps": 30, "actors.controller.carrier": "tree"}) as job:
        job.wait_for_step(3)
        job.kill("rollout")
        job.wait_for_event("answers_continued")
        job.wait_for_step(len(job.rows()) + 3)
        job.kill("trainer")
        ended_well(job, 30, "rollout", "trainer")
