"""Keeps every expert within its capacity, on the device: what is beyond goes to the next-best expert that has room.

    ids_TK --accept--> ids_TK with gaps --propose--> asks --sort--> --accept--> ... R rounds

A fixed number of launches, no synchronisation with the host, the same result on every run and machine. The rule is in
`reference.capacity`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks, launch, reference
from .launch import KernelSpec
from .reference.capacity import NO_EXPERT, Redirect
from .routing import MAX_EXPERTS, align

_VARIANTS = ({"INDEX": "int"}, {"INDEX": "long long"})
PROPOSE = KernelSpec(
    source="capacity.cu", name="capacity_propose", configs=({"BLOCK": 256}, {"BLOCK": 128}), variants=_VARIANTS
)
ACCEPT = KernelSpec(
    source="capacity.cu", name="capacity_accept", configs=({"BLOCK": 256}, {"BLOCK": 1024}), variants=_VARIANTS
)
SPECS = (PROPOSE, ACCEPT)

WARP = 32
INDEX = {torch.int32: "int", torch.int64: "long long"}


def capacity_redirect(ids_TK: Tensor, scores_TE: Tensor, capacity_E: Tensor, *, rounds: int = 4) -> Redirect:
    """Redirects the pairs of T tokens so that expert e has at most capacity_E[e] of them; see the reference.

    ids_TK: int32 or int64, from 0 to E - 1, or NO_EXPERT; a token's experts differ. scores_TE: float32, the higher the
    better. capacity_E: int64, >= 0. Raises ValueError before any launch for another dtype, shape or device, E not in
    1..4096, K not in 1..32 or above E, or rounds not in 0..64.
    """
    op = "capacity_redirect"
    checks.require_dtype(op, "ids_TK", ids_TK, *INDEX)
    checks.require_dtype(op, "scores_TE", scores_TE, torch.float32)
    checks.require_dtype(op, "capacity_E", capacity_E, torch.int64)
    checks.require_shape(op, "scores_TE", scores_TE, -1, -1)
    num_tokens, num_experts = scores_TE.shape
    checks.require_shape(op, "ids_TK", ids_TK, num_tokens, -1)
    checks.require_shape(op, "capacity_E", capacity_E, num_experts)
    checks.require_contiguous(op, ids_TK=ids_TK, scores_TE=scores_TE, capacity_E=capacity_E)
    checks.require_device(op, ids_TK, scores_TE=scores_TE, capacity_E=capacity_E)
    checks.require_range(op, "E", num_experts, 1, MAX_EXPERTS)
    checks.require_range(op, "T * K", ids_TK.numel(), 0, 2**31 - 1)
    checks.require_range(op, "k", ids_TK.shape[1], 1, min(WARP, num_experts))
    checks.require_range(op, "rounds", rounds, 0, 64)
    if not launch.runs_kernels(ids_TK):
        return reference.capacity_redirect(ids_TK, scores_TE, capacity_E, rounds=rounds)
    ids, load = torch.full_like(ids_TK, NO_EXPERT), torch.zeros_like(capacity_E)
    _accept(ids_TK, ids, scores_TE, capacity_E, load)
    for _ in range(rounds):
        _accept(_propose(ids_TK, ids, scores_TE, capacity_E, load), ids, scores_TE, capacity_E, load)
    return Redirect(ids, load, ((ids_TK >= 0) & (ids < 0)).sum())


def _propose(wanted: Tensor, ids: Tensor, scores: Tensor, capacity: Tensor, load: Tensor) -> Tensor:
    """The expert that each pair without one asks; NO_EXPERT: none."""
    (num_tokens, k), num_experts = ids.shape, scores.shape[1]
    proposal = launch.empty(ids.shape, ids.dtype, ids)
    config = launch.pick(PROPOSE, tokens=num_tokens, E=num_experts)
    grid = -(-num_tokens * WARP // config["BLOCK"])
    args = (scores, wanted, capacity, load, ids, proposal, num_tokens, num_experts, k)
    variant = {"INDEX": INDEX[ids.dtype]}
    launch.launch(PROPOSE, grid, config["BLOCK"], args, device_of=ids, config=config, variant=variant)
    return proposal


def _accept(proposal: Tensor, ids: Tensor, scores: Tensor, capacity: Tensor, load: Tensor) -> None:
    """Fills the experts' room; writes `ids` and `load`."""
    num_experts = scores.shape[1]
    rows = align(proposal, num_experts)
    config = launch.pick(ACCEPT, tokens=ids.numel(), E=num_experts)
    args = (scores, rows.pairs_N, rows.ends_E, capacity, load, ids, num_experts, ids.shape[1])
    variant = {"INDEX": INDEX[ids.dtype]}
    launch.launch(ACCEPT, num_experts, config["BLOCK"], args, device_of=ids, config=config, variant=variant)
