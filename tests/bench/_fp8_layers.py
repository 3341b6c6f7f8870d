"""One layer in FP8: matrices and inputs with outliers, and the error on outputs for inputs that were not looked at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

ROWS, COLUMNS = 256, 512
NUM_INPUTS = 2048
"""To look at; as many are held out."""


@dataclass(frozen=True, kw_only=True)
class Fixture:
    """What a layer's inputs and weights are like."""

    name: str
    loud_inputs: int = 6
    """Input channels that are `boost` times the others, as in trained transformers"""
    boost: float = 20.0
    quiet_inputs: int = 0
    """Channels with inputs at a tenth and weights at five times the others"""
    rank: int = 64
    """Of what the inputs have in common; half of their variance"""


FIXTURES = (
    Fixture(name="loud inputs"),
    Fixture(name="very loud inputs", boost=50.0),
    Fixture(name="many loud inputs", loud_inputs=24, boost=10.0),
    Fixture(name="large weights on quiet inputs", quiet_inputs=6),
    Fixture(name="strongly correlated inputs", rank=8),
)


@dataclass(frozen=True)
class Layer:
    """weight [R, C], and inputs [n, C] to look at and held out."""

    weight: Tensor
    seen: Tensor
    held_out: Tensor

    def moments(self) -> Tensor:
        """E[x x^T] over the inputs to look at."""
        return self.seen.t() @ self.seen / len(self.seen)

    def error(self, weight: Tensor) -> float:
        """|x (w - w')| / |x w| over the inputs held out."""
        exact = self.held_out.double() @ self.weight.double().t()
        return float((exact - self.held_out.double() @ weight.double().t()).norm() / exact.norm())


def make(fixture: Fixture, seed: int) -> Layer:
    """A layer of this kind."""
    random = torch.Generator().manual_seed(seed)
    weight = 0.02 * torch.randn(ROWS, COLUMNS, generator=random)
    channels = torch.randperm(COLUMNS, generator=random)
    loud, quiet = channels.split([fixture.loud_inputs, COLUMNS - fixture.loud_inputs])
    quiet = quiet[: fixture.quiet_inputs]
    weight[:, quiet] *= 5.0
    size = torch.ones(COLUMNS)
    size[loud] = fixture.boost
    size[quiet] = 0.1
    common = torch.randn(fixture.rank, COLUMNS, generator=random) / fixture.rank**0.5

    def inputs() -> Tensor:
        shared = torch.randn(NUM_INPUTS, fixture.rank, generator=random) @ common
        return (shared + torch.randn(NUM_INPUTS, COLUMNS, generator=random)) * 0.5**0.5 * size

    return Layer(weight, inputs(), inputs())


def error_ratio(layer: Layer, quantizer: Callable[[Tensor, Tensor], Tensor], plain: Tensor) -> float:
    """Error of `quantizer` (weight, moments -> weight) over that of the weight `plain`."""
    return layer.error(quantizer(layer.weight, layer.moments())) / layer.error(plain)
