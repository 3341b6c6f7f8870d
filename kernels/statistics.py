"""K2: what the routers asked for over time. The kernels are cuda/expert_load.cu.

    probs_TE --prob_sum--> [E], for the load-balancing loss        counts_LE --load_ema_--> ema_LE, for placement

T tokens, E experts, L layers. The counts themselves are `routing.expert_load`, or the `load_E` of `routing.align`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import reference
from .checks import require, require_contiguous, require_device, require_dtype, require_range, require_shape
from .launch import KernelSpec, empty, launch, pick, runs_kernels

MAX_EXPERTS = 4096
_ROWS = 64
"""Tokens that one thread of prob_partial adds up: ROWS in expert_load.cu."""

_BLOCKS = ({"BLOCK": 128}, {"BLOCK": 64})
_SCALARS: tuple[dict[str, int | str], ...] = ({"SCALAR": "float"}, {"SCALAR": "bf16"})
_INDICES: tuple[dict[str, int | str], ...] = ({"INDEX": "int"}, {"INDEX": "long long"})

PARTIAL = KernelSpec(source="expert_load.cu", name="prob_partial", configs=_BLOCKS, variants=_SCALARS)
TOTAL = KernelSpec(source="expert_load.cu", name="prob_total", configs=_BLOCKS)
EMA = KernelSpec(source="expert_load.cu", name="load_ema", configs=_BLOCKS, variants=_INDICES)
SPECS: tuple[KernelSpec, ...] = (PARTIAL, TOTAL, EMA)


def prob_sum(probs_TE: Tensor) -> Tensor:
    """Sum of the router's probabilities (float32 or bfloat16) over the tokens: float32 [E], differentiable.

    On a GPU it is added up in a fixed order. Raises ValueError for another dtype or shape, or E above 4096.
    """
    require_dtype("prob_sum", "probs_TE", probs_TE, torch.float32, torch.bfloat16)
    require_shape("prob_sum", "probs_TE", probs_TE, -1, -1)
    require_range("prob_sum", "E", probs_TE.shape[1], 1, MAX_EXPERTS)
    require_contiguous("prob_sum", probs_TE=probs_TE)
    if not runs_kernels(probs_TE):
        return reference.prob_sum(probs_TE)
    result: Tensor = _ProbSum.apply(probs_TE)  # type: ignore[no-untyped-call]
    return result


def load_ema_(ema_LE: Tensor, counts_LE: Tensor, decay: float) -> Tensor:
    """The moving average of each layer's load after one more batch, written into `ema_LE` (float32), which is returned.

    ema = ema + (1 - decay) * (counts - ema). Raises ValueError unless counts are int32 or int64 of the same shape and
    0 <= decay <= 1.
    """
    require_dtype("load_ema_", "ema_LE", ema_LE, torch.float32)
    require_dtype("load_ema_", "counts_LE", counts_LE, torch.int32, torch.int64)
    require_shape("load_ema_", "counts_LE", counts_LE, *ema_LE.shape)
    require_contiguous("load_ema_", ema_LE=ema_LE, counts_LE=counts_LE)
    require_device("load_ema_", ema_LE, counts_LE=counts_LE)
    require(0 <= decay <= 1, "load_ema_", f"decay must be from 0 to 1, not {decay}")
    if not runs_kernels(ema_LE):
        return ema_LE.copy_(reference.load_ema(ema_LE, counts_LE, decay))
    config, variant = pick(EMA, tokens=ema_LE.numel()), _INDICES[counts_LE.dtype == torch.int64]
    blocks = -(-ema_LE.numel() // config["BLOCK"])
    args = (ema_LE, counts_LE, ema_LE.numel(), float(1 - decay))
    launch(EMA, blocks, config["BLOCK"], args, device_of=ema_LE, config=config, variant=variant)
    return ema_LE


class _ProbSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, probs_TE: Tensor) -> Tensor:
        ctx.shape, ctx.dtype = probs_TE.shape, probs_TE.dtype
        num_tokens, num_experts = probs_TE.shape
        chunks = -(-num_tokens // _ROWS)
        partial_CE = empty((chunks, num_experts), torch.float32, probs_TE)
        sums_E = empty((num_experts,), torch.float32, probs_TE)
        config, variant = pick(PARTIAL, tokens=num_tokens, E=num_experts), _SCALARS[probs_TE.dtype == torch.bfloat16]
        grid = chunks, -(-num_experts // config["BLOCK"])
        args = (probs_TE, partial_CE, num_tokens, num_experts)
        launch(PARTIAL, grid, config["BLOCK"], args, device_of=probs_TE, config=config, variant=variant)
        config = pick(TOTAL, tokens=chunks, E=num_experts)
        blocks = -(-num_experts // config["BLOCK"])
        sizes = (chunks, num_experts)
        launch(TOTAL, blocks, config["BLOCK"], (partial_CE, sums_E, *sizes), device_of=probs_TE, config=config)
        return sums_E

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0].to(ctx.dtype).expand(ctx.shape)
