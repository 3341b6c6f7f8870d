"""One kernel's case for tests/gpu/run: fresh data, the operation, what is right, what torch offers, the bars."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headrace.kernels.launch import KernelSpec


@dataclass(frozen=True, kw_only=True)
class Case:
    """All functions but `make` take the arguments that `make` gave."""

    name: str
    small: tuple[Any, ...]
    """Sizes that are checked, on the CPU too."""
    large: Any
    """The size that is checked and timed."""
    make: Callable[[Any, torch.Generator], tuple[Any, ...]]
    """(size, random) -> fresh arguments on the generator's device."""
    run: Callable[..., Any]
    """The operation: a tensor, or a tuple of tensors and Nones."""
    exact: Callable[..., Any]
    """The same in plain torch; in float64 where it computes."""
    rtol: float = 0.0
    atol: float = 0.0
    """0 and 0: equal in every bit."""
    eager: Callable[..., Any] | None = None
    """What torch offers; timed as it is and compiled by torch.compile."""
    moved_bytes: Callable[..., int] | None = None
    """The least that must be read and written: gives the share of the copy rate."""
    bars: Mapping[str, float] = field(default_factory=dict)
    """Least ratios: to the "copy" rate, to torch "eager", to torch "compiled"."""
    spec: KernelSpec | None = None
    """Whose configurations are tuned."""
    tuned: tuple[Any, ...] = ()
    """More sizes at which they are timed."""
    load: Callable[..., Sequence[int]] | None = None
    """Pairs of each expert, for the tuner; None where no experts come in."""


def cases() -> Iterator[Case]:
    """Those of every file cases_*.py in this folder."""
    for path in sorted(Path(__file__).parent.glob("cases_*.py")):
        yield from importlib.import_module(path.stem).cases()


def tensors(result: Any) -> list[Tensor]:
    """The tensors that an operation returned."""
    return [part for part in (result if isinstance(result, tuple) else (result,)) if part is not None]


def difference(case: Case, got: Any, wanted: Any) -> str:
    """What is wrong with a result; empty if nothing is."""
    mine, right = tensors(got), tensors(wanted)
    if len(mine) != len(right):
        return f"{len(mine)} results instead of {len(right)}"
    for i, (a, b) in enumerate(zip(mine, right, strict=True)):
        if a.shape != b.shape:
            return f"result {i} has the shape {list(a.shape)} instead of {list(b.shape)}"
        if a.dtype == torch.float8_e4m3fn:
            a, b = a.view(torch.uint8), b.view(torch.uint8)
        exact = case.rtol == case.atol == 0
        close = a.to(b.dtype).eq(b) | (a.isnan() & b.isnan()) if exact else a.double().isclose(
            b.double(), rtol=case.rtol, atol=case.atol, equal_nan=True
        )  # fmt: skip
        if not bool(close.all()):
            worst = int((a.double() - b.double()).abs().nan_to_num(torch.inf).masked_fill(close, -1).argmax())
            values = f"{a.flatten()[worst].item()} instead of {b.flatten()[worst].item()}"
            return f"result {i}: {int((~close).sum())} of {a.numel()} values, the worst {values} at {worst}"
    return ""
