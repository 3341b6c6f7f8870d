"""The `[sft]` and `[rl]` tables. Knows nothing of how they are followed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Gt, Le

from ...runtime.codec import wire


@wire
@dataclass(frozen=True, kw_only=True)
class SftSettings:
    """Warm-up by imitation of demonstrations, before RL."""

    steps: Annotated[int, Ge(0)] = 300
    """Optimizer steps; 0 starts RL from random weights."""
    batch: Annotated[int, Ge(1)] = 64
    """Demonstrations of a step."""
    learning_rate: Annotated[float, Gt(0)] = 4e-3
    """AdamW: for embedding, head, router and norms."""
    muon_learning_rate: Annotated[float, Ge(0)] = 0.012
    """Muon: for all other matrices; 0 trains them by AdamW too."""
    weight_decay: Annotated[float, Ge(0)] = 0.0
    """Share of a matrix that a step at learning rate 1 would take away."""
    warmup_steps: Annotated[int, Ge(0)] = 30
    """Steps over which the learning rates rise linearly."""
    decay_ratio: Annotated[float, Ge(0), Le(1)] = 0.5
    """Last share of the steps, over which the learning rates fall linearly."""
    final_ratio: Annotated[float, Ge(0), Le(1)] = 0.1
    """Share of the learning rates that is left at the end of the decay."""
    clip_norm: Annotated[float, Gt(0)] = 1.0
    """Largest gradient norm; longer ones are scaled down to it."""
    aux_weight: Annotated[float, Ge(0)] = 0.02
    """Weight of the router's load-balancing loss, which is 1 when experts are used evenly."""
    micro_batch_tokens: Annotated[int, Ge(1)] = 8192
    """Tokens of one forward and backward pass; a single longer sequence still passes."""
    report_every: Annotated[int, Ge(1)] = 25
    """Steps between two rows of metrics."""
    checkpoint_every: Annotated[int, Ge(1)] = 100
    """Steps between checkpoints: what a death of the trainer costs at most."""


@wire
@dataclass(frozen=True, kw_only=True)
class RlSettings:
    """DAPO (arXiv 2503.14476): what is sampled for a step, and what the step does with it."""

    steps: Annotated[int, Ge(0)] = 200
    """Steps; each publishes one policy version."""
    group_size: Annotated[int, Ge(2)] = 8
    """Responses to a prompt (G)."""
    groups_per_step: Annotated[int, Ge(1)] = 16
    """Groups that a step trains (B)."""
    mini_batches: Annotated[int, Ge(1)] = 2
    """Optimizer updates of a step, each on its own share of the groups."""
    max_new_tokens: Annotated[int, Ge(1)] = 96
    """Token budget of a response."""
    temperature: Annotated[float, Gt(0)] = 1.0
    """Of sampling; the trained policy is the one at this temperature."""
    learning_rate: Annotated[float, Gt(0)] = 5e-4
    """AdamW: for what Muon does not train."""
    muon_learning_rate: Annotated[float, Ge(0)] = 0.0
    """Muon: for hidden matrices; 0 trains them by AdamW too."""
    weight_decay: Annotated[float, Ge(0)] = 0.0
    """Share of a matrix that a step at learning rate 1 would take away."""
    warmup_steps: Annotated[int, Ge(0)] = 10
    """Steps over which the learning rates rise linearly; without, a weak checkpoint learns nothing."""
    decay_ratio: Annotated[float, Ge(0), Le(1)] = 0.3
    """Last share of the steps, over which the learning rates fall linearly."""
    final_ratio: Annotated[float, Ge(0), Le(1)] = 0.1
    """Share of the learning rates that is left at the end of the decay."""
    clip_norm: Annotated[float, Gt(0)] = 1.0
    """Largest gradient norm; longer ones are scaled down to it."""
    clip_low: Annotated[float, Gt(0), Le(1)] = 0.2
    """A ratio below 1 - clip_low brings nothing further to tokens of negative advantage."""
    clip_high: Annotated[float, Gt(0)] = 0.28
    """A ratio above 1 + clip_high brings nothing further to tokens of positive advantage; larger than clip_low, so that
    rare tokens can rise."""
    dual_clip: Annotated[float, Ge(0)] = 0.0
    """Largest ratio that counts at negative advantage, above 1 + clip_high; 0 sets no bound."""
    aux_weight: Annotated[float, Ge(0)] = 0.002
    """Weight of the router's load-balancing loss, which is 1 when experts are used evenly."""
    micro_batch_tokens: Annotated[int, Ge(1)] = 8192
    """Tokens of one forward and backward pass; a single longer sequence still passes."""
    max_staleness: Annotated[int, Ge(0)] = 4
    """Most policy versions between a group's oldest token and the step that trains it (eta); 0 is synchronous."""
    alpha: Annotated[float, Ge(0), Le(1)] = 0.0
    """Least share of a step's groups that the newest version alone generated (completion ratio); 1 is synchronous."""
    max_running: Annotated[int, Ge(1)] = 40
    """Groups that are submitted and not yet trained, filtered or failed."""
    min_group_size: Annotated[int, Ge(2)] = 2
    """Judged responses that a group must have; with fewer it counts as failed."""
    checkpoint_every: Annotated[int, Ge(1)] = 10
    """Steps between checkpoints: batches since the last one are trained again when the trainer dies."""

    def __post_init__(self) -> None:
        if self.mini_batches > self.groups_per_step:
            raise ValueError(
                f"mini_batches must be at most groups_per_step ({self.groups_per_step}), got {self.mini_batches}; "
                "an update needs a group"
            )
        if self.dual_clip and self.dual_clip <= 1 + self.clip_high:
            raise ValueError(
                f"dual_clip must be 0 or above 1 + clip_high ({1 + self.clip_high:g}), got {self.dual_clip:g}; try 10"
            )
