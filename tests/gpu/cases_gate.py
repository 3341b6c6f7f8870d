"""Cases of kernels/gate.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from case import Case
from torch import Tensor

from headrace.kernels import gate, launch, reference

_RULE = gate._Rule(k=8, renormalize=True, score="softmax", groups=1, top_groups=1, scale=1.0)


def _logits(size: tuple[int, int], random: torch.Generator) -> tuple[Tensor]:
    return (torch.randn(size, generator=random, device=random.device),)


def _steps(size: tuple[int, int], random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Logits and a bias of few values, so that no choice hangs on the rounding of a sigmoid."""
    tokens, experts = size
    logits = torch.randint(-6, 7, (tokens, experts), generator=random, device=random.device) / 2
    return logits, torch.randint(0, 2, (experts,), generator=random, device=random.device) / 4


def _flows(size: tuple[int, int], random: torch.Generator) -> tuple[Tensor, ...]:
    """Logits, what the forward pass kept of them, and the gradient of the weights."""
    (logits,) = _logits(size, random)
    top = logits.amax(-1, keepdim=True)
    norms = torch.cat((top, 1 / (logits - top).exp().sum(-1, keepdim=True)), dim=1)
    grad = torch.randn(size[0], 8, generator=random, device=random.device)
    return logits, logits.topk(8).indices, norms, grad


def _gradient(logits: Tensor, ids: Tensor, norms: Tensor, grad: Tensor) -> Tensor:
    leaf = logits.double().requires_grad_()
    weights = reference.topk_gate(leaf, 8, renormalize=True, ids_TK=ids).weights_TK
    return torch.autograd.grad(weights, leaf, grad.double())[0]


def _run_gradient(*args: Tensor) -> Tensor:
    if not launch.runs_kernels(args[0]):
        return _gradient(*args)
    logits, ids, norms, grad = args
    return gate._backward(logits, ids, norms, grad, None, _RULE)


def _by_torch(logits: Tensor) -> Any:
    weights, ids = logits.softmax(-1).topk(8)
    return weights / weights.sum(-1, keepdim=True), ids


def _grouped(logits: Tensor, bias: Tensor, op: Any) -> Any:
    options = {"score": "sigmoid", "bias_E": bias, "groups": 8, "top_groups": 4, "scale": 2.5}
    return tuple(op(logits, 8, renormalize=True, **options)[:2])


def cases() -> Iterator[Case]:
    yield Case(
        name="gate",
        small=((0, 16), (7, 60), (33, 128), (9, 512)),
        large=(262_144, 128),
        make=_logits,
        run=lambda logits: tuple(gate.topk_gate(logits, 8, renormalize=True, probs=False)[:2]),
        exact=lambda logits: tuple(reference.topk_gate(logits.double(), 8, renormalize=True)[:2]),
        rtol=1e-5,
        atol=1e-7,
        eager=_by_torch,
        moved_bytes=lambda logits: logits.nbytes + len(logits) * (8 * (8 + 4) + 8),
        bars={"copy": 0.60, "eager": 3.0, "compiled": 1.5},
        spec=gate.FORWARD,
        tuned=tuple((1 << n, experts) for n in range(6, 18, 2) for experts in (64, 128, 256)),
    )
    yield Case(
        name="gate_sigmoid_groups",
        small=((33, 64), (9, 256)),
        large=(65_536, 256),
        make=_steps,
        run=lambda logits, bias: _grouped(logits, bias, gate.topk_gate),
        exact=lambda logits, bias: _grouped(logits.double(), bias, reference.topk_gate),
        rtol=1e-5,
        moved_bytes=lambda logits, bias: 2 * logits.nbytes + len(logits) * (8 * (8 + 4) + 8),
        eager=lambda logits, bias: _grouped(logits, bias, reference.topk_gate),
    )
    yield Case(
        name="gate_backward",
        small=((7, 60), (33, 128)),
        large=(262_144, 128),
        make=_flows,
        run=_run_gradient,
        exact=_gradient,
        rtol=1e-4,
        atol=1e-6,
        moved_bytes=lambda logits, ids, norms, grad: 2 * logits.nbytes + ids.nbytes + norms.nbytes + grad.nbytes,
        spec=gate.BACKWARD,
    )
