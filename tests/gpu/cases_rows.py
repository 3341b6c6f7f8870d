"""Cases of kernels/rows.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from case import Case
from torch import Tensor

from headrace.kernels import launch, reference
from headrace.kernels import rows as kernels
from headrace.kernels.reference import Rows

_SIZES = ((0, 2, 4, 16), (7, 2, 4, 13), (50, 4, 6, 64))
"""Tokens, choices, experts, width."""


def _rows(size: tuple[int, int, int, int], random: torch.Generator) -> Rows:
    tokens, k, experts, _ = size
    noise = torch.rand(tokens, experts, generator=random, device=random.device)
    return reference.align(noise.topk(k).indices.to(torch.int32), experts, tile=16)


def _tokens(size: tuple[int, int, int, int], random: torch.Generator, dtype: torch.dtype) -> tuple[Tensor, Rows, int]:
    x = torch.randn(size[0], size[3], generator=random, device=random.device)
    return x.to(dtype), _rows(size, random), size[1]


def _experts_out(size: tuple[int, int, int, int], random: torch.Generator) -> tuple[Tensor, Rows, Tensor]:
    rows = _rows(size, random)
    y = torch.randn(len(rows.pairs_N), size[3], generator=random, device=random.device)
    return y.bfloat16(), rows, torch.rand(size[:2], generator=random, device=random.device)


def _fp8_out(size: tuple[int, int, int, int], random: torch.Generator) -> tuple[Tensor, Tensor, Rows, Tensor]:
    y, rows, weights = _experts_out(size, random)
    return y.to(torch.float8_e4m3fn), torch.rand(len(y), 1, generator=random, device=y.device), rows, weights


def _flows(size: tuple[int, int, int, int], random: torch.Generator) -> tuple[Tensor, Rows, Tensor, Tensor]:
    grad = torch.randn(size[0], size[3], generator=random, device=random.device)
    return *_experts_out(size, random), grad.bfloat16()


def _sum_by_torch(y: Tensor, rows: Rows, weights: Tensor) -> Tensor:
    assert rows.rows_P is not None
    return (y[rows.rows_P].view(*weights.shape, -1) * weights.unsqueeze(-1)).sum(1).to(y.dtype)


def _gradient(op: Callable[..., Tensor], to: torch.dtype, y: Tensor, rows: Rows, weights: Tensor, grad: Tensor) -> Any:
    leaves = y.to(to).requires_grad_(), weights.to(to if to == torch.float64 else torch.float32).requires_grad_()
    return torch.autograd.grad(op(leaves[0], rows, leaves[1]), leaves, grad.to(to))


def _run_gradient(y: Tensor, rows: Rows, weights: Tensor, grad: Tensor) -> Any:
    if not launch.runs_kernels(y):
        return _gradient(reference.unpermute, y.dtype, y, rows, weights, grad)
    assert rows.rows_P is not None
    return kernels._unpermute_backward(grad, y, weights, rows.pairs_N, rows.rows_P)


def cases() -> Iterator[Case]:
    for name, dtype in (("permute", torch.bfloat16), ("permute_fp8", torch.float8_e4m3fn)):
        yield Case(
            name=name,
            small=_SIZES,
            large=(65_536, 8, 128, 2048),
            make=partial(_tokens, dtype=dtype),
            run=kernels.permute,
            exact=lambda x, rows, k: reference.permute(x.view(torch.uint8), rows, k).view(x.dtype),
            eager=lambda x, rows, k: x.view(torch.uint8).index_select(0, rows.pairs_N.clamp_min(0) // k),
            moved_bytes=lambda x, rows, k: x.nbytes * (1 + k),
            bars={"copy": 0.85, "eager": 1.1, "compiled": 1.0},
            spec=kernels.PERMUTE,
            tuned=tuple((1 << n, 8, 128, 2048) for n in range(4, 16, 2)),
            load=lambda x, rows, k: rows.load_E.tolist(),
        )
    yield Case(
        name="unpermute",
        small=_SIZES,
        large=(65_536, 8, 128, 2048),
        make=_experts_out,
        run=kernels.unpermute,
        exact=lambda y, rows, weights: reference.unpermute(y.double(), rows, weights.double()),
        rtol=2.0**-8,
        atol=1e-6,
        eager=_sum_by_torch,
        moved_bytes=lambda y, rows, weights: (1 + weights.shape[1]) * len(weights) * y.shape[1] * 2,
        bars={"copy": 0.85, "eager": 2.5, "compiled": 1.1},
        spec=kernels.UNPERMUTE,
        tuned=tuple((1 << n, 8, 128, 2048) for n in range(4, 16, 2)),
        load=lambda y, rows, weights: rows.load_E.tolist(),
    )
    yield Case(
        name="unpermute_fp8",
        small=((7, 2, 4, 13), (50, 4, 6, 64)),
        large=(65_536, 8, 128, 2048),
        make=_fp8_out,
        run=kernels.unpermute_fp8,
        exact=lambda y, scales, rows, weights: reference.unpermute_fp8(y, scales, rows, weights),
        rtol=2.0**-7,
        atol=1e-4,
        moved_bytes=lambda y, scales, rows, weights: (2 + weights.shape[1]) * len(weights) * y.shape[1],
        bars={"copy": 0.80},
        spec=kernels.UNPERMUTE_FP8,
        load=lambda y, scales, rows, weights: rows.load_E.tolist(),
    )
    yield Case(
        name="unpermute_backward",
        small=_SIZES,
        large=(16_384, 8, 128, 2048),
        make=_flows,
        run=_run_gradient,
        exact=partial(_gradient, reference.unpermute, torch.float64),
        rtol=2.0**-8,
        atol=1e-4,
        eager=partial(_gradient, _sum_by_torch, torch.bfloat16),
        moved_bytes=lambda y, rows, weights, grad: (1 + 2 * weights.shape[1]) * grad.nbytes,
        bars={"copy": 0.80, "eager": 2.5},
        spec=kernels.BACKWARD,
        load=lambda y, rows, weights, grad: rows.load_E.tolist(),
    )
