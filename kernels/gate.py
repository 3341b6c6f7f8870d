"""K1, the gate: which experts each token goes to, and with what weight. The kernel is cuda/topk_gate.cu.

    logits_TE --topk_gate--> ids_TK, weights_TK, probs_TE

Knows nothing of experts beyond their logits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checks, launch, reference
from .launch import KernelSpec
from .reference.routing import Gate, Score

MAX_EXPERTS = 512
MAX_CHOICES = 32
MAX_GROUPS = 32
_OP = "topk_gate"

_CONFIGS = ({"SLOTS": 16, "BLOCK": 256}, {"SLOTS": 8, "BLOCK": 256})
_SIZES = (128, MAX_EXPERTS)
_LOGITS = {torch.float32: "float", torch.bfloat16: "bf16"}
_VARIANTS: tuple[dict[str, int | str], ...] = tuple(
    {"LOGIT": logit, "E_MAX": size} for logit in _LOGITS.values() for size in _SIZES
)
FORWARD = KernelSpec(source="topk_gate.cu", name="topk_gate", configs=_CONFIGS, variants=_VARIANTS)
BACKWARD = KernelSpec(source="topk_gate.cu", name="topk_gate_backward", configs=_CONFIGS, variants=_VARIANTS)
SPECS: tuple[KernelSpec, ...] = (FORWARD, BACKWARD)


class _Rule(NamedTuple):
    """How experts are chosen and weighted."""

    k: int
    renormalize: bool
    score: Score
    groups: int
    top_groups: int
    scale: float


def topk_gate(
    logits_TE: Tensor,
    k: int,
    *,
    renormalize: bool,
    score: Score = "softmax",
    bias_E: Tensor | None = None,
    groups: int = 1,
    top_groups: int = 1,
    scale: float = 1.0,
    ids_TK: Tensor | None = None,
    probs: bool = True,
) -> Gate:
    """The best k of E experts for each token and their weights, as `reference.topk_gate` defines them.

    logits_TE: float32 or bfloat16, contiguous; at most 512 experts, k at most 32. bias_E: float32, only with
    score="sigmoid". ids_TK: int64, the choice of an earlier pass to repeat; on a GPU an id that is no expert gives the
    weight NaN, elsewhere an error. Weights and scores are float32. Without `probs` the scores of all experts are not
    written: probs_TE is [T, 0]. Gradients flow to the logits through weights and scores, not through the choice.
    Raises ValueError for input that breaks these rules.
    """
    rule = _Rule(k, renormalize, score, groups, top_groups, scale)
    _check(logits_TE, rule, bias_E, ids_TK)
    if not launch.runs_kernels(logits_TE):
        gate = reference.topk_gate(logits_TE, bias_E=bias_E, ids_TK=ids_TK, **rule._asdict())
        return gate if probs else gate._replace(probs_TE=gate.probs_TE[:, :0])
    checks.require_dtype(_OP, "logits_TE", logits_TE, *_LOGITS)
    ids, weights, scores = _Gate.apply(logits_TE, bias_E, ids_TK, rule, probs)  # type: ignore[no-untyped-call]
    return Gate(ids, weights, scores)


def _check(logits_TE: Tensor, rule: _Rule, bias_E: Tensor | None, ids_TK: Tensor | None) -> None:
    checks.require(
        logits_TE.is_floating_point(), _OP, f"logits_TE must be floating-point numbers, not {logits_TE.dtype}"
    )
    checks.require_shape(_OP, "logits_TE", logits_TE, -1, -1)
    num_tokens, num_experts = logits_TE.shape
    checks.require_range(_OP, "the number of experts", num_experts, 1, MAX_EXPERTS)
    checks.require_range(_OP, "k", rule.k, 1, min(num_experts, MAX_CHOICES))
    checks.require_one_of(_OP, "score", rule.score, ("softmax", "sigmoid"))
    checks.require_range(_OP, "groups", rule.groups, 1, min(num_experts, MAX_GROUPS))
    checks.require_range(_OP, "top_groups", rule.top_groups, 1, rule.groups)
    checks.require(
        num_experts % rule.groups == 0, _OP, f"{num_experts} experts can't be split into {rule.groups} equal groups"
    )
    room = num_experts // rule.groups * rule.top_groups
    checks.require(
        rule.k <= room, _OP, f"k is {rule.k}, but the {rule.top_groups} best groups have only {room} experts"
    )
    checks.require_contiguous(_OP, logits_TE=logits_TE, bias_E=bias_E, ids_TK=ids_TK)
    checks.require_device(_OP, logits_TE, bias_E=bias_E, ids_TK=ids_TK)
    if bias_E is not None:
        checks.require(
            rule.score == "sigmoid", _OP, "bias_E is for score='sigmoid' only; leave it out or change the score"
        )
        checks.require_shape(_OP, "bias_E", bias_E, num_experts)
        checks.require_dtype(_OP, "bias_E", bias_E, torch.float32)
    if ids_TK is not None:
        checks.require_shape(_OP, "ids_TK", ids_TK, num_tokens, rule.k)
        checks.require_dtype(_OP, "ids_TK", ids_TK, torch.int64)
        if ids_TK.numel() and not ids_TK.is_cuda:  # looking at a GPU's numbers would mean to wait for them
            low, high = int(ids_TK.min()), int(ids_TK.max())
            checks.require(
                low >= 0 and high < num_experts, _OP, f"ids_TK must be in [0, {num_experts}), not {low} to {high}"
            )


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, bias: Tensor | None, replayed: Tensor | None, rule: _Rule, probs: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        num_tokens, num_experts = logits.shape
        ids = launch.empty((num_tokens, rule.k), torch.int64, logits) if replayed is None else replayed.clone()
        weights = launch.empty((num_tokens, rule.k), torch.float32, logits)
        scores = launch.empty((num_tokens, num_experts if probs else 0), torch.float32, logits)
        norms = launch.empty((num_tokens, 2), torch.float32, logits)
        args = (
            logits, bias, ids, weights, scores if probs else None, norms, num_tokens, num_experts, rule.k,
            int(rule.score == "sigmoid"), int(rule.renormalize), float(rule.scale), rule.groups, rule.top_groups,
            int(replayed is not None), _by_four(logits),
        )  # fmt: skip
        _start(FORWARD, logits, args)
        ctx.mark_non_differentiable(ids)
        ctx.save_for_backward(logits, ids, norms)
        ctx.rule, ctx.probs = rule, probs
        return ids, weights, scores

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        logits, ids, norms = ctx.saved_tensors
        by_weights, by_scores = (grad.contiguous() for grad in grads[1:])
        grad = _backward(logits, ids, norms, by_weights, by_scores if ctx.probs else None, ctx.rule)
        return grad, None, None, None, None


def _backward(
    logits: Tensor, ids: Tensor, norms: Tensor, grad_weights: Tensor, grad_scores: Tensor | None, rule: _Rule
) -> Tensor:
    grad_logits = launch.empty(logits.shape, logits.dtype, logits)
    args = (
        logits, ids, norms, grad_weights, grad_scores, grad_logits, *logits.shape, rule.k,
        int(rule.score == "sigmoid"), int(rule.renormalize), float(rule.scale), _by_four(logits),
    )  # fmt: skip
    _start(BACKWARD, logits, args)
    return grad_logits


def _by_four(logits: Tensor) -> int:
    return int(logits.shape[1] % 4 == 0 and logits.data_ptr() % 16 == 0)


def _start(spec: KernelSpec, logits: Tensor, args: tuple[launch.Argument, ...]) -> None:
    num_tokens, num_experts = logits.shape
    config = launch.pick(spec, tokens=num_tokens, E=num_experts)
    size = next(size for size in _SIZES if num_experts <= size)
    lanes = min(32, size // config["SLOTS"])
    block = config["BLOCK"]
    variant: dict[str, int | str] = {"LOGIT": _LOGITS[logits.dtype], "E_MAX": size}
    launch.launch(
        spec, -(-num_tokens // (block // lanes)), block, args, device_of=logits, config=config, variant=variant
    )
