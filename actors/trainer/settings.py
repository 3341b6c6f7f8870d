"""The `[sft]`, `[rl]` and `[critic]` tables. Knows nothing of how they are followed.

The defaults are those of the papers, for real models: DAPO section 4.1 and its public recipe, VAPO section 5.1, and
section 4.1 of the Seed-Thinking-v1.5 report. A small model wants others; its cluster file says them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le

from ...runtime.codec import wire

Correction = Literal["none", "tis", "decoupled"]


@dataclass(frozen=True, kw_only=True)
class UpdateSettings:
    """How a model is updated; each stage and each model has its own."""

    learning_rate: Annotated[float, Gt(0)] = 1e-6
    """AdamW: for what Muon does not train."""
    muon_learning_rate: Annotated[float, Ge(0)] = 0.0
    """Muon: for hidden matrices; 0 trains them by AdamW too."""
    weight_decay: Annotated[float, Ge(0)] = 0.1
    """Share of a matrix that a step at learning rate 1 would take away."""
    warmup_steps: Annotated[int, Ge(0)] = 20
    """Steps over which the learning rates rise linearly; without, a weak checkpoint learns nothing by RL."""
    clip_norm: Annotated[float, Gt(0)] = 1.0
    """Largest gradient norm; longer ones are scaled down to it."""
    max_skipped: Annotated[int, Ge(0)] = 3
    """Updates in a row that may be skipped because their gradient is not finite; one more ends the run."""
    aux_weight: Annotated[float, Ge(0)] = 0.002
    """Weight of the router's load-balancing loss, which is 1 when experts are used evenly."""
    micro_batch_tokens: Annotated[int, Ge(1)] = 32768
    """Tokens of one forward and backward pass; a single longer sequence still passes."""


@wire
@dataclass(frozen=True, kw_only=True)
class SftSettings(UpdateSettings):
    """Warm-up by imitation of demonstrations, before RL."""

    steps: Annotated[int, Ge(0)] = 12500
    """Optimizer steps; 0 starts RL from random weights."""
    batch: Annotated[int, Ge(1)] = 64
    """Demonstrations of a step."""
    learning_rate: Annotated[float, Gt(0)] = 2e-5
    """AdamW: for what Muon does not train."""
    weight_decay: Annotated[float, Ge(0)] = 0.0
    """Share of a matrix that a step at learning rate 1 would take away."""
    decay_ratio: Annotated[float, Ge(0), Le(1)] = 1.0
    """Last share of the steps, over which the learning rates fall linearly (the report's: along a cosine)."""
    final_ratio: Annotated[float, Ge(0), Le(1)] = 0.1
    """Share of the learning rates that is left at the end of the decay."""
    aux_weight: Annotated[float, Ge(0)] = 0.02
    """Weight of the router's load-balancing loss, which is 1 when experts are used evenly."""
    report_every: Annotated[int, Ge(1)] = 25
    """Steps between two rows of metrics."""
    checkpoint_every: Annotated[int, Ge(1)] = 100
    """Steps between checkpoints: what a death of the trainer costs at most."""


@wire
@dataclass(frozen=True, kw_only=True)
class RlSettings(UpdateSettings):
    """The RL stage: what is sampled for a step, and how the policy follows its algorithm."""

    algorithm: str = "dapo"
    """dapo, vapo, ppo, grpo, or "module:Name" of your own; its settings are the table [algorithm]."""
    steps: Annotated[int, Ge(0)] = 5000
    """Steps; each publishes one policy version."""
    group_size: Annotated[int, Ge(1)] = 16
    """Responses to a prompt (G)."""
    groups_per_step: Annotated[int, Ge(1)] = 512
    """Groups that a step trains (B)."""
    mini_batches: Annotated[int, Ge(1)] = 16
    """Optimizer updates of a step, each on its own share of the groups."""
    max_new_tokens: Annotated[int, Ge(1)] = 20480
    """Token budget of a response."""
    decay_ratio: Annotated[float, Ge(0), Le(1)] = 0.0
    """Last share of the steps, over which the learning rates fall linearly."""
    final_ratio: Annotated[float, Ge(0), Le(1)] = 0.1
    """Share of the learning rates that is left at the end of the decay."""
    temperature: Annotated[float, Gt(0)] = 1.0
    """Of sampling; the trained policy is the one at this temperature."""
    top_k: Annotated[int, Ge(0)] = 0
    """Only the k likeliest tokens are sampled; 0: all. Here and below, log-probabilities are of what is left: what
    samples is not quite the trained policy then."""
    top_p: Annotated[float, Gt(0), Le(1)] = 1.0
    """Only the likeliest tokens whose probabilities sum to this are sampled."""
    min_p: Annotated[float, Ge(0), Le(1)] = 0.0
    """Only tokens at least this times as likely as the likeliest are sampled."""
    stop_strings: tuple[str, ...] = ()
    """Texts that end a response as soon as it has one, in evaluations, too."""
    correction: Correction = "none"
    """Of what sampled the tokens being another policy than the one that the step begins from: older, or in FP8.
    none: the surrogate's ratio is to the policy that sampled; tis and decoupled: to the one that the step begins from,
    and a token weighs as much more or less as that one would have sampled it, with tis at most `truncation`. Then only
    the second and later mini-batches are clipped: with one, keep max_staleness low."""
    truncation: Annotated[float, Ge(1)] = 2.0
    """Largest weight of a token under tis."""
    max_staleness: Annotated[int, Ge(0)] = 4
    """Most policy versions between a group's oldest token and the step that trains it (eta); 0 is synchronous."""
    alpha: Annotated[float, Ge(0), Le(1)] = 0.0
    """Least share of a step's groups that the newest version alone generated (completion ratio); 1 is synchronous."""
    max_running: Annotated[int, Ge(1)] = 1536
    """Groups that are submitted and not yet trained, filtered or failed."""
    min_group_size: Annotated[int, Ge(1)] = 2
    """Judged responses that a group must have; with fewer it counts as failed."""
    checkpoint_every: Annotated[int, Ge(1)] = 10
    """Steps between checkpoints: batches since the last one are trained again when the trainer dies."""

    def __post_init__(self) -> None:
        if self.mini_batches > self.groups_per_step:
            raise ValueError(
                f"mini_batches must be at most groups_per_step ({self.groups_per_step}), got {self.mini_batches}; "
                "an update needs a group"
            )

    def sampling(self) -> dict[str, Any]:
        """What a request for training asks for: fields of rollout.Request."""
        return {
            "max_new_tokens": self.max_new_tokens, "temperature": self.temperature, "top_k": self.top_k,
            "top_p": self.top_p, "min_p": self.min_p, "stop_strings": list(self.stop_strings),
        }  # fmt: skip


@wire
@dataclass(frozen=True, kw_only=True)
class CriticSettings(UpdateSettings):
    """The critic of VAPO and PPO, from its value pretraining on; the learning rates stay as they are after the rise."""

    learning_rate: Annotated[float, Gt(0)] = 2e-6
    """AdamW: for what Muon does not train."""
    mini_batches: Annotated[int, Ge(1)] = 16
    """Optimizer updates of a step, each on its own share of the groups."""
