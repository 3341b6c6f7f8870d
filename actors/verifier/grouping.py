"""From a group of responses to cases, and to verdicts in the same order. Knows no way of judging."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from ..data import running_sum
from ..types import Group, Trajectory, Verdict
from .case import Case
from .judging import failed

T = TypeVar("T")


async def judge_group(group: Group, judge: Callable[[Case], Awaitable[Verdict]]) -> list[Verdict]:
    """One verdict for each trajectory. One that ran out of tokens is wrong; one that has not ended is an error."""
    question = running_sum.decode(group.prompt.tokens)

    async def one(trajectory: Trajectory) -> Verdict:
        case = Case(
            reference=group.prompt.answer,
            response=running_sum.decode(trajectory.tokens()),
            question=question,
            row=f"prompt {group.prompt.ordinal}",
        )
        if not trajectory.finish:
            return failed(case, "unfinished response", "unfinished")
        if trajectory.finish == "length":
            return Verdict(correct=False, note="ran out of tokens")
        return await judge(case)

    return await _in_order(one, group.trajectories)


async def judge_all(cases: Sequence[Case], judge: Callable[[Case], Awaitable[Verdict]]) -> list[Verdict]:
    """One verdict for each case; if the caller gives up, none is left running."""
    return await _in_order(judge, cases)


async def _in_order(judge: Callable[[T], Awaitable[Verdict]], items: Sequence[T]) -> list[Verdict]:
    async def run(item: T) -> Verdict:
        return await judge(item)

    async with asyncio.TaskGroup() as tasks:
        pending = [tasks.create_task(run(item)) for item in items]
    return [task.result() for task in pending]
