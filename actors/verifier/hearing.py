"""From the responses of a group to cases, and to their verdicts.

    not ended            -> an error: it is not judged
    out of tokens        -> incorrect: it has no answer
    ended by itself      -> a Case: question, reference, data set and row of the prompt, text of the response -> court

Knows neither rules nor processes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any

from ..data.task import Task
from ..types import Group, Trajectory, Verdict
from .case import Case
from .court import Court


async def hear(group: Group, task: Task, court: Court) -> list[Verdict]:
    """One verdict for each trajectory of the group, in their order."""
    question = task.decode(group.prompt.tokens)
    return await together([_verdict(group, trajectory, question, task, court) for trajectory in group.trajectories])


async def together(verdicts: Sequence[Coroutine[Any, Any, Verdict]]) -> list[Verdict]:
    """All of them; if one raises, or the caller gives up, none is left running."""
    async with asyncio.TaskGroup() as tasks:
        pending = [tasks.create_task(verdict) for verdict in verdicts]
    return [task.result() for task in pending]


def row_of(group: Group) -> str:
    """What messages call the prompt."""
    source = f" of {group.prompt.dataset}" if group.prompt.dataset else ""
    return f"prompt {group.prompt.ordinal}{source}"


async def _verdict(group: Group, trajectory: Trajectory, question: str, task: Task, court: Court) -> Verdict:
    prompt, row = group.prompt, row_of(group)
    if not trajectory.finish:
        verdict = Verdict(correct=False, error=f"{row}: unfinished response", kind="unfinished")
        court.metrics.unheard(verdict)
        return verdict
    if trajectory.finish == "length":
        verdict = Verdict(correct=False, note="ran out of tokens")
        court.metrics.unheard(verdict)
        return verdict
    text = task.decode(trajectory.tokens())
    return await court.verdict(
        Case(question=question, reference=prompt.answer, response=text, dataset=prompt.dataset, row=row)
    )
