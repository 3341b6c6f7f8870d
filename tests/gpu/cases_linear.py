"""Cases of actors/model/linear.py: products with FP8 weights and activations, against torch's products in bf16."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from case import Case
from torch import Tensor

from headrace.actors.model.linear import Fp8Weight, quantize
from headrace.kernels.reference import precision

BF16_STEP = 2.0**-7
"""Results come in bf16, from sums in fp32."""


def _dense(size: tuple[int, int, int], random: torch.Generator) -> tuple[Tensor, ...]:
    """Tokens, rows and columns of the weight; columns of very different sizes."""
    tokens, rows, columns = size
    x = torch.randn(tokens, columns, generator=random, device=random.device)
    w = torch.randn(rows, columns, generator=random, device=random.device) / columns**0.5
    held = quantize(w)
    return x.bfloat16(), held.codes, held.scales, w.bfloat16()


def _grouped(size: tuple[int, int, int, int], random: torch.Generator) -> tuple[Tensor, ...]:
    """Experts, tokens of each, rows and columns of its weight."""
    experts, tokens, rows, columns = size
    x = torch.randn(experts * tokens, columns, generator=random, device=random.device)
    w = torch.randn(experts, rows, columns, generator=random, device=random.device) / columns**0.5
    held = quantize(w)
    ends = (tokens * torch.arange(1, experts + 1, device=random.device)).int()
    return x.bfloat16(), held.codes, held.scales, w.bfloat16(), ends


def _product(x: Tensor, codes: Tensor, scales: Tensor, w: Tensor) -> Tensor:
    return Fp8Weight(codes, scales, None, True).linear(x)


def _grouped_product(x: Tensor, codes: Tensor, scales: Tensor, w: Tensor, ends: Tensor) -> Tensor:
    """On a CPU, for which torch has no such function, by emulation."""
    values = None if x.is_cuda else (codes.float() * scales).bfloat16()
    return Fp8Weight(codes, scales, values, x.is_cuda).grouped_linear(x, ends)


def _seen(x: Tensor) -> Tensor:
    inputs = precision.fp8_quant(x, "row")
    return inputs.codes_RC.double() * inputs.scales.double()


def _exact(x: Tensor, codes: Tensor, scales: Tensor, w: Tensor) -> Tensor:
    return _seen(x) @ (codes.double() * scales.double()).t()


def _grouped_exact(x: Tensor, codes: Tensor, scales: Tensor, w: Tensor, ends: Tensor) -> Tensor:
    values = codes.double() * scales.double()
    inputs = _seen(x) if x.is_cuda else x.double()
    parts = inputs.tensor_split(ends[:-1].tolist())
    return torch.cat([part @ value.t() for part, value in zip(parts, values, strict=True)])


def cases() -> Iterator[Case]:
    yield Case(
        name="fp8_linear",
        small=((5, 16, 32), (33, 64, 144)),
        large=(4096, 4096, 4096),
        make=_dense,
        run=_product,
        exact=_exact,
        rtol=BF16_STEP,
        atol=BF16_STEP,
        eager=lambda x, codes, scales, w: F.linear(x, w),
        bars={"eager": 1.1},
    )
    yield Case(
        name="fp8_grouped_linear",
        small=((3, 16, 16, 32), (4, 32, 48, 64)),
        large=(64, 512, 1536, 2048),
        make=_grouped,
        run=_grouped_product,
        exact=_grouped_exact,
        rtol=BF16_STEP,
        atol=2 * BF16_STEP,
        eager=lambda x, codes, scales, w, ends: F.grouped_mm(x, w.transpose(1, 2), offs=ends),
        bars={"eager": 1.1},
    )
