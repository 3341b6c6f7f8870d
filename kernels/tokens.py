"""K12 and K13: log-probabilities of tokens, and drawing tokens. Kernels: cuda/token_logprob.cu, cuda/sample_logprob.cu.

    logits_NV, tokens_N --token_logprob--> logprobs_N, entropies_N, best_N
    logits_NV, temperatures_N, who asks --sample_logprob--> tokens_N, logprobs_N, entropies_N

N rows, V tokens of the vocabulary. A row's result has the same bits in any batch and any configuration.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from . import launch, reference
from .checks import require, require_contiguous, require_device, require_dtype, require_range, require_shape
from .launch import KernelSpec
from .reference.tokens import Sample, TokenLogprobs

MAX_VOCABULARY = 2**31 - 1

_LOGITS = {torch.float32: "float", torch.bfloat16: "bf16"}
_CONFIGS = ({"BLOCK": 512}, {"BLOCK": 256}, {"BLOCK": 128})
_VARIANTS = tuple({"LOGIT": logit} for logit in _LOGITS.values())
FORWARD = KernelSpec(source="token_logprob.cu", name="token_logprob", configs=_CONFIGS, variants=_VARIANTS)
BACKWARD = KernelSpec(source="token_logprob.cu", name="token_logprob_backward", configs=_CONFIGS, variants=_VARIANTS)
SAMPLE = KernelSpec(source="sample_logprob.cu", name="sample_logprob", configs=_CONFIGS, variants=_VARIANTS)
SPECS: tuple[KernelSpec, ...] = (FORWARD, BACKWARD, SAMPLE)


def token_logprob(
    logits_NV: Tensor, tokens_N: Tensor, *, temperature: float = 1.0, overwrite: bool = False
) -> TokenLogprobs:
    """Log-probability (at most 0) of each token and entropy of its row, as `reference.token_logprob` defines them.

    logits_NV: float32 or bfloat16, contiguous; tokens_N: int64, inside [0, V); on a GPU a token outside gives NaN and
    no gradient, elsewhere an error. Results are float32. With `overwrite` the backward pass on a GPU writes the
    gradient over the logits, which nobody may need any more; a second one then raises torch's RuntimeError about
    memory that was modified. Raises ValueError for input that breaks these rules.
    """
    op = "token_logprob"
    _check(op, logits_NV, tokens_N=tokens_N)
    require(temperature > 0 and math.isfinite(temperature), op, f"temperature must be above 0, not {temperature}")
    if tokens_N.numel() and not tokens_N.is_cuda:  # looking at a GPU's numbers would mean to wait for them
        low, high = int(tokens_N.min()), int(tokens_N.max())
        vocabulary = logits_NV.shape[1]
        require(low >= 0 and high < vocabulary, op, f"tokens_N must be in [0, {vocabulary}), not {low} to {high}")
    if not launch.runs_kernels(logits_NV):
        return reference.token_logprob(logits_NV, tokens_N, temperature=temperature)
    require_dtype(op, "logits_NV", logits_NV, *_LOGITS)
    return TokenLogprobs(*_TokenLogprob.apply(logits_NV, tokens_N, 1.0 / temperature, overwrite))  # type: ignore[no-untyped-call]


def sample_logprob(
    logits_NV: Tensor, temperatures_N: Tensor, *, seed: int, ordinals_N: Tensor, steps_N: Tensor
) -> Sample:
    """Draws a token from each row at its temperature (0: the likeliest), as `reference.sample_logprob` defines it.

    logits_NV: float32 or bfloat16; temperatures_N: float32; ordinals_N, steps_N: int64, which response and which of its
    tokens. The same (seed, ordinal, step) and the same row give the same token and the same bits in any batch. Log-
    probability and entropy are float32, of the distribution that was drawn from. Raises ValueError for other input.
    """
    op = "sample_logprob"
    _check(op, logits_NV, temperatures_N=temperatures_N, ordinals_N=ordinals_N, steps_N=steps_N)
    require_dtype(op, "temperatures_N", temperatures_N, torch.float32)
    if not launch.runs_kernels(logits_NV):
        return reference.sample_logprob(logits_NV, temperatures_N, seed=seed, ordinals_N=ordinals_N, steps_N=steps_N)
    require_dtype(op, "logits_NV", logits_NV, *_LOGITS)
    num_rows, vocabulary = logits_NV.shape
    tokens = launch.empty((num_rows,), torch.int64, logits_NV)
    logprobs = launch.empty((num_rows,), torch.float32, logits_NV)
    entropies = launch.empty((num_rows,), torch.float32, logits_NV)
    signed = (seed + 2**63) % 2**64 - 2**63
    _start(
        SAMPLE,
        logits_NV,
        (logits_NV, temperatures_N, ordinals_N, steps_N, tokens, logprobs, entropies, vocabulary, signed,
         _by_chunks(logits_NV)),
    )  # fmt: skip
    return Sample(tokens, logprobs, entropies)


def _check(op: str, logits_NV: Tensor, **per_row: Tensor) -> None:
    require(logits_NV.is_floating_point(), op, f"logits_NV must be floating-point numbers, not {logits_NV.dtype}")
    require_shape(op, "logits_NV", logits_NV, -1, -1)
    require_range(op, "the vocabulary", logits_NV.shape[1], 1, MAX_VOCABULARY)
    require_contiguous(op, logits_NV=logits_NV, **per_row)
    require_device(op, logits_NV, **per_row)
    for name, tensor in per_row.items():
        require_shape(op, name, tensor, logits_NV.shape[0])
        if name != "temperatures_N":
            require_dtype(op, name, tensor, torch.int64)


class _TokenLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, tokens: Tensor, inverse_temperature: float, overwrite: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        num_rows, vocabulary = logits.shape
        logprobs, entropies = (launch.empty((num_rows,), torch.float32, logits) for _ in range(2))
        norms = launch.empty((num_rows, 2), torch.float32, logits)
        best = launch.empty((num_rows,), torch.int64, logits)
        _start(
            FORWARD,
            logits,
            (logits, tokens, logprobs, entropies, norms, best, vocabulary, inverse_temperature, _by_chunks(logits)),
        )
        ctx.mark_non_differentiable(best)
        ctx.save_for_backward(logits, tokens, entropies, norms)
        ctx.inverse_temperature, ctx.overwrite = inverse_temperature, overwrite
        return logprobs, entropies, best

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        logits, tokens, entropies, norms = ctx.saved_tensors
        by_logprob, by_entropy = (grad.contiguous() for grad in grads[:2])
        temper, overwrite = ctx.inverse_temperature, ctx.overwrite
        grad = _backward(logits, tokens, entropies, norms, by_logprob, by_entropy, temper, overwrite=overwrite)
        return grad, None, None, None


def _backward(
    logits: Tensor,
    tokens: Tensor,
    entropies: Tensor,
    norms: Tensor,
    grad_logprobs: Tensor,
    grad_entropies: Tensor,
    inverse_temperature: float,
    *,
    overwrite: bool,
) -> Tensor:
    grad_logits = logits.detach() if overwrite else launch.empty(logits.shape, logits.dtype, logits)
    _start(
        BACKWARD,
        logits,
        (logits, tokens, entropies, norms, grad_logprobs, grad_entropies, grad_logits, logits.shape[1],
         inverse_temperature, _by_chunks(logits, grad_logits)),
    )  # fmt: skip
    if overwrite:
        torch.autograd.graph.increment_version(logits)
    return grad_logits


def _by_chunks(*tensors: Tensor) -> int:
    return int(tensors[0].shape[1] % 8 == 0 and all(tensor.data_ptr() % 16 == 0 for tensor in tensors))


def _start(spec: KernelSpec, logits: Tensor, args: tuple[launch.Argument, ...]) -> None:
    config = launch.pick(spec, tokens=logits.shape[0], V=logits.shape[1])
    variant = {"LOGIT": _LOGITS[logits.dtype]}
    launch.launch(spec, logits.shape[0], config["BLOCK"], args, device_of=logits, config=config, variant=variant)
