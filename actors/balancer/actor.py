"""Places replicas of experts on the ranks that share them, from the load that training makes, and says what it saves.

    trainer --load of the step--> balancer: monitor, judge, move if it pays --> rank_load_before, _after, expert_moves

The ranks are virtual: where the model's experts all live in one process, this shows with the job's own routing what a
group of ranks would have to do. It is no part of learning; a run goes on without it. Knows nothing of what is learned.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from annotated_types import Ge, Gt, Lt

from ...kernels.placement import Placement
from ...runtime import Actor, message
from ..model.config import ModelConfig
from ..trainer.actor import Trainer
from .fleet import Fleet, Terms


@dataclass(kw_only=True)
class Balancer(Actor):
    """One balancer for all layers of the trained model."""

    model: ModelConfig
    virtual_ranks: Annotated[int, Ge(2)] = 4
    """Virtual ranks that share the experts of each layer."""
    slots_per_rank: Annotated[int, Ge(1)] = 3
    """Experts that a rank holds of each layer; what is more than the model's experts over the ranks is for replicas."""
    decay: Annotated[float, Ge(0), Lt(1)] = 0.8
    """Weight of a step in the expected load, over that of the next one."""
    horizon_steps: Annotated[int, Ge(1)] = 20
    """Steps for which a placement may be expected to hold: their savings pay for the moves."""
    move_pairs: Annotated[float, Gt(0)] = 4000.0
    """Cost of moving an expert: (token, choice) pairs that a rank could compute meanwhile. Forward and backward are 6
    operations for each of the expert's weights, a copy moves 2 bytes: at 700 TFLOP/s and 50 GB/s about 4,700 pairs."""

    def __post_init__(self) -> None:
        slots, experts = self.virtual_ranks * self.slots_per_rank, self.model.num_experts
        if slots < experts:
            raise ValueError(
                f"virtual_ranks * slots_per_rank must be at least [model] num_experts ({experts}), got {slots}; "
                "every expert needs a place"
            )

    async def start(self) -> None:
        terms = Terms(
            num_ranks=self.virtual_ranks, slots_per_rank=self.slots_per_rank, decay=self.decay,
            horizon_steps=self.horizon_steps, move_pairs=self.move_pairs,
        )  # fmt: skip
        self._fleet = Fleet(terms)
        self._trainer = self.worker_group("trainer", Trainer) if self.name else None
        self._step = 0

    def snapshot(self) -> dict[str, Any]:
        """Where the experts are; what load to expect is soon learned again."""
        return {"step": self._step, "experts": [placement.experts_P for placement in self._fleet.placements]}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._step = state["step"]
        experts = [np.array(layer) for layer in state["experts"]]
        self._fleet.placements = [Placement(layer, self.model.num_experts, self.virtual_ranks) for layer in experts]

    @message(deadline_s=30.0)
    async def balance(self, step: int) -> dict[str, float]:
        """Balances by the load of RL step `step`, if the trainer still knows it and it was not seen before; returns
        metrics by the names of actors/report.py, else none."""
        assert self._trainer is not None, "outside a system call `observe`"
        known, load_LE = await self._trainer.expert_load()
        if known != step or step <= self._step:
            return {}
        metrics: dict[str, float] = await self.in_thread(self.observe, load_LE)
        self._step = step
        await self.save()
        return metrics

    def observe(self, load_LE: np.ndarray) -> dict[str, float]:
        """The same for a load [layers, E] that is given."""
        outcome = self._fleet.observe(load_LE)
        return {
            "rank_load_before": outcome.before,
            "rank_load_after": outcome.after,
            "expert_moves": outcome.moves,
        }
