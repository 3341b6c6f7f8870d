"""PuzzleVerifier, and what verifiers are told of a prompt: any solution is right, a bad instance is an error."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from headrace.actors.data import Puzzles, RunningSum, Task
from headrace.actors.job import load_job
from headrace.actors.telemetry import Telemetry
from headrace.actors.types import Finish, Group, Prompt, Segment, Trajectory
from headrace.actors.verifier import Case, PuzzleVerifier, RuleVerifier, TextVerifier
from headrace.actors.verifier.puzzles import TASKS, corrupt, generate, solve
from headrace.runtime import System
from headrace.runtime.cluster import load_cluster
from headrace.runtime.toml import parse

CLUSTERS = Path(__file__).parents[1] / "bin" / "clusters"
TASK = Puzzles(puzzles=dict.fromkeys(TASKS, 1.0), max_level=2, max_prompt_tokens=1000)


def group_of(task: Task, prompt: Prompt, *responses: tuple[np.ndarray, Finish]) -> Group:
    none = np.zeros(0, np.float32)
    trajectories = [
        Trajectory(member=m, segments=[Segment(version=1, tokens=tokens, logprobs=none)], finish=finish)
        for m, (tokens, finish) in enumerate(responses)
    ]
    return Group(prompt=prompt, trajectories=trajectories)


def spelled(text: str) -> np.ndarray:
    from headrace.actors.data.puzzle_text import vocabulary

    return np.append(vocabulary().encode(text), np.int32(0))


async def opened(**fields: Any) -> PuzzleVerifier:
    verifier = PuzzleVerifier(**fields)
    await verifier.start()
    return verifier


@pytest.mark.parametrize("name", TASKS)
async def test_solutions_are_right_and_near_misses_wrong(name: str) -> None:
    verifier = await opened(task=TASK)
    for ordinal in range(5):
        puzzle = generate(name, seed=1, ordinal=ordinal, difficulty=1 + ordinal % 3)
        reference, text = json.dumps(puzzle.data), solve(puzzle)
        cases = [
            Case(reference=reference, dataset=name, response=response)
            for response in (text, f"First I try.\n\n{text}", corrupt(puzzle, text, seed=0, ordinal=ordinal), "")
        ]
        verdicts = await verifier.judge_cases(cases)
        assert [v.correct for v in verdicts] == [True, True, False, False]
        assert not any(v.error for v in verdicts)


async def test_a_solution_that_the_solver_did_not_find_is_right() -> None:
    verifier = await opened(task=TASK)
    maze = json.dumps({"grid": ["#####", "#S.E#", "#...#", "#...#", "#####"]})
    texts = ["Answer:\nRR", "Answer:\nDRRU", "Answer:\nDDRRUU", "Answer:\nRL", "Answer:\nUR"]
    verdicts = await verifier.judge_cases([Case(reference=maze, dataset="maze", response=text) for text in texts])
    assert [v.correct for v in verdicts] == [True, True, True, False, False]


@pytest.mark.parametrize(
    ("dataset", "reference", "message"),
    [
        ("maize", "{}", "there is no puzzle 'maize'; the data set of a prompt must be one of twenty_four, "),
        ("maze", "{", "the reference is no JSON: "),
        ("maze", "[" * 100_000, "the reference is no JSON: "),
        ("maze", "[1]", "the reference must be a JSON object, got '[1]'"),
        ("maze", "{}", "the reference is no instance of maze: KeyError: 'grid'"),
        ("maze", '{"grid": 5}', "the reference is no instance of maze: TypeError: "),
        ("sudoku", '{"grid": "\\ud800"}', "the reference is no instance of sudoku: "),
    ],
)
async def test_a_bad_reference_is_an_error_with_its_row_and_counted(dataset: str, reference: str, message: str) -> None:
    verifier = await opened(task=TASK)
    [verdict] = await verifier.judge_cases(
        [Case(reference=reference, dataset=dataset, response="Answer:\nRR", row="prompt 7 of maze")]
    )
    assert (verdict.correct, verdict.kind, verdict.retryable) == (False, "bad reference", False)
    assert verdict.error.startswith(f"prompt 7 of maze: {message}")
    assert (await verifier.stats())["errors/bad reference"] == 1


async def test_groups_are_decoded_through_the_task() -> None:
    verifier = await opened(task=TASK)
    for prompt in TASK.evaluation_set(0, 30):
        right = TASK.solve(prompt)
        junk = np.array([500, 3, 119, 0], np.int32)
        group = group_of(TASK, prompt, (right, "stop"), (right[:-1], "length"), (right[:-1], ""), (junk, "stop"))
        verdicts = await verifier.judge(group)
        assert [v.correct for v in verdicts] == [True, False, False, False]
        assert [v.kind for v in verdicts] == ["", "", "unfinished", ""]
        assert verdicts[2].error == f"prompt {prompt.ordinal} of {prompt.dataset}: unfinished response"
    stats = await verifier.stats()
    assert stats["correct"] + stats["cache_hits"] >= 30
    assert stats["out_of_tokens"] == stats["errors"] == 30


async def test_in_a_node_of_its_own(tmp_path: Path) -> None:
    prompt = TASK.problem(0, 1, "maze", 1)
    group = group_of(TASK, prompt, (TASK.solve(prompt), "stop"), (spelled("Answer:\nU" * 9), "stop"))
    async with System(tmp_path / "run") as system:
        ref = await system.spawn(PuzzleVerifier(task=TASK), name="verifier", node="verifier")
        assert [v.correct for v in await ref.judge(group)] == [True, False]
        assert (await ref.stats())["incorrect"] == 1


def test_the_puzzle_job_is_valid_and_its_verifier_has_its_task(tmp_path: Path) -> None:
    job = load_job(CLUSTERS / "puzzles.toml")
    verifier = job.cluster.actors["verifier"].instance
    assert isinstance(job.task, Puzzles) and isinstance(verifier, PuzzleVerifier) and verifier.task is job.task
    (tmp_path / "again.toml").write_text(job.to_toml())
    assert load_job(tmp_path / "again.toml") == job


# What a text verifier is told of a prompt


SEEN = "def judge(question, reference, response):\n    return len(question) + len(reference) / 1000\n"


async def test_a_users_function_gets_the_text_of_a_puzzle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "seen_by_user.py").write_text(SEEN)
    monkeypatch.syspath_prepend(tmp_path)
    verifier = TextVerifier(task=TASK, function="seen_by_user:judge")
    await verifier.start()
    try:
        prompt = TASK.problem(0, 5, "countdown", 1)
        [verdict] = await verifier.judge(group_of(TASK, prompt, (TASK.solve(prompt), "stop")))
        assert verdict.reward == len(TASK.decode(prompt.tokens)) + len(prompt.answer) / 1000
    finally:
        await verifier.stop(None)


POLICIES = """
[run]
name = "x"

[actors.verifier]
class = "headrace.actors.verifier:TextVerifier"
rule = "exact"

[actors.verifier.policies.running_sum]
ignore_spaces = true
"""


async def test_the_policy_is_that_of_the_data_set_of_the_prompt() -> None:
    cluster, _ = load_cluster(parse(POLICIES, "cluster.toml"), {})
    verifier = cluster.actors["verifier"].instance
    assert isinstance(verifier, TextVerifier)
    await verifier.start()
    task = RunningSum()
    (prompt,) = task.evaluation_set(0, 1)
    text = task.solve(prompt)
    prompt.answer = " ".join(task.decode(text))
    try:
        verdicts = []
        for dataset in ("running_sum", "another"):
            prompt.dataset = dataset
            verdicts += await verifier.judge(group_of(task, prompt, (text, "stop")))
        assert [v.correct for v in verdicts] == [True, False]
    finally:
        await verifier.stop(None)


# What the run says of its verifier


async def judged(verifier: RuleVerifier, rights: int, wrongs: int) -> dict[str, float]:
    task = RunningSum()
    (prompt,) = task.evaluation_set(0, 1)
    right = task.solve(prompt)
    await verifier.judge(group_of(task, prompt, *[(right, "stop")] * rights, *[(right[:-1], "stop")] * wrongs))
    return await verifier.stats()


async def test_totals_go_on_over_deaths_of_the_verifier_and_resumes_of_the_run(tmp_path: Path) -> None:
    telemetry = Telemetry(tmp_path, "rl", 0, {})
    assert telemetry.verified({}) == {}
    first = RuleVerifier()
    assert telemetry.verified(await judged(first, 3, 1))["verifier_verdicts"] == 4
    assert telemetry.verified(await judged(first, 1, 0))["verifier_correct"] == 4
    assert telemetry.verified({})["verifier_verdicts"] == 5
    await asyncio.sleep(0.01)
    second = RuleVerifier()
    row = telemetry.verified(await judged(second, 6, 2))
    counts = Counter(row)
    assert [counts[f"verifier_{name}"] for name in ("verdicts", "correct", "incorrect", "errors")] == [13, 10, 3, 0]
    resumed = Telemetry(tmp_path, "rl", 0, telemetry.snapshot())
    row = resumed.verified(await judged(second, 1, 0))
    assert row["verifier_verdicts"] == 14 and row["verifier_latency_p50_s"] > 0
    resumed.write({"stage": "rl", "step": 1, **row, "verifier_errors/worker died": 2})
    for each in (telemetry, resumed):
        each.close()
