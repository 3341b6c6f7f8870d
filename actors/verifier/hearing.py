"""From the responses of a group to cases, and to their verdicts.

    not ended            -> an error: it is not judged
    out of tokens        -> incorrect: it has no answer
    ended by itself      -> a Case: question, reference, data set and row of the prompt, text of the response -> court

`CourtVerifier` is what all verifiers with a court are to the others. Knows neither rules nor processes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...runtime import Actor, message
from ..data import RunningSum, Task
from ..types import Group, Trajectory, Verdict
from .case import Case
from .court import Care, Court


@dataclass(kw_only=True)
class CourtVerifier(Actor):
    """Base of the verifiers that judge case by case; `start` opens the court."""

    task: Task = field(default_factory=RunningSum)
    """Decodes prompts and responses."""
    care: Care = field(default_factory=Care)
    """Deadline, retries, cache."""

    def open_court(self, judge: Callable[[Case], Awaitable[Verdict]], *, places: int) -> None:
        """For `start`: verdicts come from `judge`, at most `places` at a time."""
        self.court = Court(judge, self.care, places=places)

    @message(concurrent=True, deadline_s=600.0)
    async def judge(self, group: Group) -> list[Verdict]:
        """One verdict for each trajectory of the group, in their order; see `hear` for those that did not end."""
        return await hear(group, self.task, self.court)

    @message(concurrent=True, deadline_s=600.0)
    async def judge_cases(self, cases: list[Case]) -> list[Verdict]:
        """One verdict for each case, in their order."""
        return await together([self.court.verdict(case) for case in cases])

    @message(concurrent=True)
    async def stats(self) -> dict[str, float]:
        """See VerdictMetrics.snapshot."""
        return self.court.metrics.snapshot()


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
