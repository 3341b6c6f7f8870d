"""Cases of kernels/tokens.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from case import Case
from torch import Tensor

from headrace.kernels import launch, reference, tokens

_SLICE = 256
"""Rows that are made exact at a time: float64 of all would not fit a GPU."""


def _logits(size: tuple[int, int], random: torch.Generator) -> tuple[Tensor, Tensor]:
    device = random.device
    logits = torch.empty(size, dtype=torch.bfloat16, device=device)
    for part in logits.split(_SLICE):
        part.copy_(3 * torch.randn(part.shape, generator=random, device=device))
    return logits, torch.randint(0, size[1], size[:1], generator=random, device=device)


def _flows(size: tuple[int, int], random: torch.Generator) -> tuple[Tensor, ...]:
    """Logits, tokens, what the forward pass kept, and the gradients of log-probabilities and entropies."""
    logits, ids = _logits(size, random)
    tops, masses, entropies = [], [], []
    for part in logits.split(_SLICE):
        logprobs = part.double().log_softmax(-1)
        tops.append(part.double().amax(-1))
        masses.append(part.double().logsumexp(-1) - tops[-1])
        entropies.append(-(logprobs.exp() * logprobs).sum(-1))
    norms = torch.stack((torch.cat(tops), torch.cat(masses)), dim=1).float()
    grads = torch.randn(2, size[0], generator=random, device=random.device)
    return logits, ids, torch.cat(entropies).float(), norms, grads[0].clone(), grads[1].clone()


def _queries(size: tuple[int, int], random: torch.Generator) -> tuple[Tensor, ...]:
    logits, ids = _logits(size, random)
    return logits, torch.full(size[:1], 0.8, device=random.device), ids + 2**40, ids % 100


def _by_slices(op: Callable[..., Any], *args: Tensor) -> tuple[Tensor, ...]:
    parts = [tuple(op(*part)) for part in zip(*(arg.split(_SLICE) for arg in args), strict=True)]
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def _logprob(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    return tuple(reference.token_logprob(logits.double(), ids)[:2])  # type: ignore[return-value]


def _logprob_by_torch(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    logprobs = logits.float().log_softmax(-1)
    return logprobs.gather(1, ids.unsqueeze(1)).squeeze(1), -(logprobs.exp() * logprobs).sum(-1)


def _gradient(logits: Tensor, ids: Tensor, entropies: Tensor, norms: Tensor, *grads: Tensor) -> tuple[Tensor]:
    leaf = logits.double().requires_grad_()
    outputs = reference.token_logprob(leaf, ids)[:2]
    (grad,) = torch.autograd.grad(outputs, leaf, tuple(grad.double() for grad in grads))
    return (grad.to(logits.dtype),)


def _run_gradient(*args: Tensor) -> tuple[Tensor, ...]:
    if not launch.runs_kernels(args[0]):
        return _by_slices(_gradient, *args)
    logits, ids, entropies, norms, *grads = args
    return (tokens._backward(logits, ids, entropies, norms, grads[0], grads[1], 1.0, overwrite=False),)


def _gradient_by_torch(
    logits: Tensor, ids: Tensor, entropies: Tensor, norms: Tensor, by_logprob: Tensor, by_entropy: Tensor
) -> Tensor:
    logprobs = logits.float().log_softmax(-1)
    p = logprobs.exp()
    grad = -p * (by_logprob.unsqueeze(1) + by_entropy.unsqueeze(1) * (logprobs + entropies.unsqueeze(1)))
    return grad.scatter_add(1, ids.unsqueeze(1), by_logprob.unsqueeze(1)).to(logits.dtype)


def _sample(op: Callable[..., Any], logits: Tensor, temperatures: Tensor, ordinals: Tensor, steps: Tensor) -> Any:
    return tuple(op(logits, temperatures, seed=7, ordinals_N=ordinals, steps_N=steps))


def _sample_by_torch(logits: Tensor, temperatures: Tensor, ordinals: Tensor, steps: Tensor) -> Any:
    logprobs = (logits.float() / temperatures.unsqueeze(1)).log_softmax(-1)
    p = logprobs.exp()
    drawn = torch.multinomial(p, 1)
    return drawn, logprobs.gather(1, drawn), -(p * logprobs).sum(-1)


def cases() -> Iterator[Case]:
    sizes = ((1, 19), (3, 1001), (2, 4104))
    yield Case(
        name="token_logprob",
        small=((0, 19), *sizes),
        large=(8192, 151_936),
        make=_logits,
        run=lambda logits, ids: tuple(tokens.token_logprob(logits, ids)[:2]),
        exact=partial(_by_slices, _logprob),
        atol=1e-5,
        eager=_logprob_by_torch,
        moved_bytes=lambda logits, ids: logits.nbytes,
        bars={"copy": 0.85, "eager": 6.0, "compiled": 1.3},
        spec=tokens.FORWARD,
        tuned=tuple((1 << n, 151_936) for n in range(0, 12, 2)),
    )
    yield Case(
        name="token_logprob_backward",
        small=sizes,
        large=(8192, 151_936),
        make=_flows,
        run=_run_gradient,
        exact=partial(_by_slices, _gradient),
        rtol=2.0**-6,
        atol=1e-6,
        eager=_gradient_by_torch,
        moved_bytes=lambda logits, *_: 2 * logits.nbytes,
        bars={"copy": 0.85, "eager": 6.0, "compiled": 1.3},
        spec=tokens.BACKWARD,
    )
    yield Case(
        name="sample_logprob",
        small=sizes,
        large=(1024, 151_936),
        make=_queries,
        run=partial(_sample, tokens.sample_logprob),
        exact=partial(_by_slices, partial(_sample, reference.sample_logprob)),
        rtol=1e-6,
        atol=2e-5,
        eager=_sample_by_torch,
        moved_bytes=lambda logits, *_: logits.nbytes,
        bars={"copy": 0.80, "eager": 4.0, "compiled": 1.5},
        spec=tokens.SAMPLE,
        tuned=tuple((1 << n, 151_936) for n in range(0, 10, 2)),
    )
