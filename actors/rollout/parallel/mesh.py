"""How the ranks of one rollout worker share its work: heads and widths, experts, and tokens.

    rank = (s * ep + e) * tp + t           Mesh(tp=2, ep=2):   e0: 0 1    e1: 2 3

    tp   heads of attention, inner widths of experts           one of them: t
    ep   experts, by slots that may hold replicas              e
    sp   tokens of a step, if there are many (a long prefill)  s

Where a step has many tokens, attention divides them over s and e alike, for attention has no experts to divide. A rank
keeps the keys and values of its heads for all tokens: tp divides that memory, ep and sp do not. A value; knows nothing
of torch, actors or how ranks talk.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ...model.config import ModelConfig

ALIGNED = 4
"""Inner widths of experts are a multiple of this: rows of 16 bytes of fp32, as grouped products want them."""


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """Sizes of the three axes."""

    tp: int = 1
    ep: int = 1
    sp: int = 1
    spare_experts: int = 0
    """Slots of each rank beyond its share of the experts: room for replicas of busy ones."""

    @property
    def size(self) -> int:
        """Ranks."""
        return self.tp * self.ep * self.sp

    def place(self, rank: int) -> Place:
        """Where a rank stands."""
        rows, t = divmod(rank, self.tp)
        s, e = divmod(rows, self.ep)
        return Place(self, rank, t, e, s)

    def slots_per_rank(self, num_experts: int) -> int:
        """Experts that a rank holds in each layer."""
        return num_experts // self.ep + self.spare_experts

    def local(self, config: ModelConfig) -> ModelConfig:
        """The sizes of the part of a layer that one rank computes; its experts are counted by slots elsewhere."""
        return replace(
            config,
            num_heads=config.num_heads // self.tp,
            num_kv_heads=config.num_kv_heads // self.tp,
            moe_intermediate_size=config.moe_intermediate_size // self.tp,
        )

    def check(self, config: ModelConfig) -> None:
        """Raises ValueError, with rule, value and remedy, if a model of these sizes can't be divided so."""
        for what, value, parts in (
            ("num_heads", config.num_heads, self.tp),
            ("num_kv_heads", config.num_kv_heads, self.tp),
            ("moe_intermediate_size", config.moe_intermediate_size, self.tp * (ALIGNED if self.tp > 1 else 1)),
        ):
            if value % parts:
                raise ValueError(
                    f"[model] {what} must be a multiple of {parts} for tp = {self.tp}, got {value}; "
                    f"set tp to a divisor, or {what} to {-(-value // parts) * parts}"
                )
        if config.num_experts % self.ep:
            raise ValueError(
                f"ep must divide [model] num_experts ({config.num_experts}), got {self.ep}; set it to a divisor"
            )
        if self.spare_experts and self.ep == 1:
            raise ValueError(
                "spare_experts are replicas on other ranks, so they need ep > 1; raise ep or set them to 0"
            )
        if self.slots_per_rank(config.num_experts) > config.num_experts:
            raise ValueError(
                f"spare_experts must be at most {config.num_experts - config.num_experts // self.ep}, with which every "
                f"rank holds every expert, got {self.spare_experts}"
            )


@dataclass(frozen=True)
class Place:
    """One rank in a mesh."""

    mesh: Mesh
    rank: int
    t: int
    e: int
    s: int

    @property
    def row(self) -> int:
        """Which of the `num_rows` shares of a step's tokens is this rank's, where they are divided."""
        return self.s * self.mesh.ep + self.e

    @property
    def num_rows(self) -> int:
        return self.mesh.sp * self.mesh.ep
