"""Actors as no job should have them, for tests; node processes import this module without pytest."""

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headrace.actors.controller import Controller
from headrace.actors.trainer import Trainer
from headrace.actors.types import Group, Verdict
from headrace.actors.verifier import RuleVerifier
from headrace.runtime import message
from headrace.runtime.dispatch import RANK_ZERO, dispatch
from headrace.runtime.exchange import Manifest


@dataclass(kw_only=True)
class NeverStarts(RuleVerifier):
    """Its machine has no sandbox."""

    async def start(self) -> None:
        raise OSError("no sandbox\non this machine")


@dataclass(kw_only=True)
class StartsOnce(RuleVerifier):
    """Leaves something behind that keeps its next incarnation from starting."""

    lock: str

    async def start(self) -> None:
        await asyncio.to_thread(Path(self.lock).touch, exist_ok=False)


@dataclass(kw_only=True)
class Erratic(RuleVerifier):
    """Right about the evaluation set; about training prompts it fails in a way of its own for each of five ordinals."""

    @message(concurrent=True, deadline_s=0.5)
    async def judge(self, group: Group) -> list[Verdict]:
        verdicts: list[Verdict] = await super().judge(group)
        match group.prompt.ordinal % 5 if group.prompt.ordinal >= 0 else -1:
            case 0:
                return [Verdict(correct=False, error="the sandbox is gone") for _ in verdicts]
            case 1:
                raise ZeroDivisionError("a verifier's bug")
            case 2:
                await asyncio.sleep(3600)
            case 3:
                verdicts[0] = Verdict(correct=False, error="the sandbox is gone")
        return verdicts


@dataclass(kw_only=True)
class FailsAtStep6(Controller):
    """Has a bug that strikes each time it gets there."""

    async def _measure(self, *args: Any) -> Any:
        if self.state.rl_steps == 6:
            raise ZeroDivisionError("step 6")
        return await super()._measure(*args)


@dataclass(kw_only=True)
class Diverges(Trainer):
    """From its third RL step on, a weight is no number."""

    @dispatch(RANK_ZERO)
    @message(thread=True, deadline_s=60.0)
    def publish(self, version: int, keep: dict[int, list[str]] | None = None) -> Manifest:
        weights = dict(self._learner.weights())
        if self._learner.stage == "rl" and self._learner.step >= 3:
            weights["lm_head.weight"] = weights["lm_head.weight"].copy()
            weights["lm_head.weight"][5, 7] = float("nan")
        return self._publisher.publish(version, weights, keep=keep)
