"""The rollout pool in a running system: workers are killed, come and go while they write."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from pool_actors import Editor, Scribe

from headrace.actors.types import Group
from headrace.runtime import Ref, RestartPolicy, System
from headrace.runtime.errors import ActorDied, RemoteError

QUICK = RestartPolicy(max_restarts=20, backoff_s=0.0)


@asynccontextmanager
async def office(run: Path, workers: int, policy: RestartPolicy = QUICK) -> AsyncIterator[tuple[System, Ref]]:
    async with System(run) as system:
        await system.spawn(Scribe(), name="scribe", node="one", policy=policy)
        editor = await system.spawn(Editor(), name="editor", policy=RestartPolicy(restart="temporary"))
        await editor.resize(workers)
        await until(editor.state, lambda state: all(row["version"] == 0 for row in state[0]))
        yield system, editor


async def until(ask: Callable[[], Awaitable[Any]], holds: Callable[[Any], object]) -> Any:
    async with asyncio.timeout(15):
        while not holds(answer := await ask()):  # noqa: ASYNC110 (nobody tells)
            await asyncio.sleep(0.005)
    return answer


def writers(groups: list[Group]) -> set[int]:
    return {int(token) for group in groups for t in group.trajectories for token in t.tokens()}


def check(groups: list[Group], tokens: int) -> None:
    for group in groups:
        assert [t.num_tokens for t in group.trajectories] == [tokens] * 2
        assert all(t.finish == "length" for t in group.trajectories)


async def test_groups_go_to_those_with_the_least_to_do(tmp_path: Path) -> None:
    async with office(tmp_path / "run", 3) as (_, editor):
        groups = await editor.write(6, 3)
        check(groups, 3)
        first = [int(group.trajectories[0].tokens()[0]) for group in groups]
        assert sorted(first) == [1, 1, 2, 2, 3, 3]
        stats = await editor.stats()
        assert stats["tokens"] == 3, "counts add up"
        assert stats["refused"] == {"scribe": 1, "scribe_2": 1, "scribe_3": 1, "both": 6}
        with pytest.raises(RemoteError, match="at least one rollout worker, got 0"):
            await editor.resize(0)
        assert writers(await editor.write(6, 1)) == {1, 2, 3}, "a refused number has changed nothing"
        assert (await editor.state())[2] == 0


async def test_what_a_killed_worker_wrote_goes_on_elsewhere_at_once(tmp_path: Path) -> None:
    async with office(tmp_path / "run", 2) as (system, editor):
        work = asyncio.create_task(editor.write(4, 150))
        await until(editor.written, lambda written: written > 80)
        os.kill(system.pids()["scribe_2"], signal.SIGKILL)
        groups = await work
        check(groups, 150)
        state = await editor.state()
        assert state[2] == 2, "two groups were halted"
        both = [group for group in groups if writers([group]) == {1, 2}]
        assert len(both) == 2, "they went on with the other worker"
        assert all(np_sorted_down(group) for group in both)
        (event,) = [e for e in system.events.recent if e["event"] == "answers_continued"]
        assert event["groups"] == 2 and event["tokens_kept"] > 0


def np_sorted_down(group: Group) -> bool:
    """First tokens of worker 2, then of worker 1."""
    return all(sorted(t.tokens().tolist(), reverse=True) == t.tokens().tolist() for t in group.trajectories)


async def test_one_that_leaves_hands_its_groups_on_and_one_that_comes_has_weights(tmp_path: Path) -> None:
    async with office(tmp_path / "run", 2) as (system, editor):
        await editor.publish(7)
        await until(editor.state, lambda state: all(row["version"] == 7 for row in state[0]))
        work = asyncio.create_task(editor.write(4, 200))
        await until(editor.written, lambda written: written > 80)
        assert await editor.resize(1) == ["scribe"]
        assert "scribe_2" not in {row["name"] for row in system.tree()}
        assert await editor.resize(3) == ["scribe", "scribe_2", "scribe_3"]
        check(await work, 200)
        late = await editor.write(6, 2, least=7)
        assert {s.version for group in late for t in group.trajectories for s in t.segments} == {7}
        assert writers(late) == {1, 2, 3}


async def test_a_worker_that_came_back_unheard_of_is_found_by_the_next_publish(tmp_path: Path) -> None:
    async with office(tmp_path / "run", 2) as (system, editor):
        await editor.turn_a_deaf_ear()
        os.kill(system.pids()["scribe_2"], signal.SIGKILL)
        await until(system_tree(system), lambda rows: any(r["incarnation"] == 2 and r["state"] == "up" for r in rows))
        await editor.publish(9)
        state = await until(editor.state, lambda state: all(row["version"] == 9 for row in state[0]))
        assert [row["incarnation"] for row in state[0]] == [1, 2]
        assert writers(await editor.write(4, 2, least=9)) == {1, 2}


def system_tree(system: System) -> Callable[[], Awaitable[list[dict[str, Any]]]]:
    async def tree() -> list[dict[str, Any]]:
        return [row for row in system.tree() if row["name"].startswith("scribe")]

    return tree


async def test_nobody_writes_with_older_weights_than_a_group_started_with(tmp_path: Path) -> None:
    async with office(tmp_path / "run", 1) as (_, editor):
        work = asyncio.create_task(editor.write(1, 2, least=5))
        state = await until(editor.state, lambda state: state[1])
        assert state[1] == ["1 groups wait for a rollout worker that holds version 5 or newer"]
        await editor.publish(5)
        (group,) = await work
        assert group.oldest_version == 5


async def test_when_the_last_worker_has_stopped_for_good_it_is_said(tmp_path: Path) -> None:
    async with office(tmp_path / "run", 1, RestartPolicy(restart="temporary")) as (system, editor):
        work = asyncio.create_task(editor.write(1, 2000))
        await until(editor.written, lambda written: written > 4)
        os.kill(system.pids()["one"], signal.SIGKILL)
        with pytest.raises(ActorDied, match="editor"):
            await work

        async def row() -> dict[str, Any]:
            return next(row for row in system.tree() if row["name"] == "editor")

        ended = await until(row, lambda row: row["state"] == "stopped")
        assert "scribe has stopped for good" in ended["reason"], "its owner failed by it"
