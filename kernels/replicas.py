"""Pairs to the replicas of their experts on the device: how many each takes, and which slot each pair goes to.

    counts_LE --replica_split--> quota_LER          (per batch: the placement stays, the shares follow the load)
    ids_TK, rows --replica_dispatch--> slots_TK

No synchronisation with the host, no random numbers, the same result on every run and machine. Where the replicas are is
decided in `placement`. Knows nothing of how tokens travel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks, launch, reference
from .launch import KernelSpec
from .leveling import NO_SLOT, SWEEPS
from .reference import Rows

SPLIT = KernelSpec(source="replica_split.cu", name="replica_split", configs=({"BLOCK": 128}, {"BLOCK": 512}))
DISPATCH = KernelSpec(
    source="replica_dispatch.cu",
    name="replica_dispatch",
    configs=({"BLOCK": 256}, {"BLOCK": 128}),
    variants=({"INDEX": "int"}, {"INDEX": "long long"}),
)
SPECS = (SPLIT, DISPATCH)

MOST_EXPERTS, MOST_RANKS, MOST_REPLICAS = 4096, 1024, 32
"""What replica_split.cu has shared memory and lanes for."""

INDEX = {torch.int32: "int", torch.int64: "long long"}


def replica_split(
    counts_LE: Tensor, slots_LER: Tensor, *, num_ranks: int, slots_per_rank: int, sweeps: int = SWEEPS
) -> Tensor:
    """How many pairs each replica takes so that no rank has more to do than it must: int64 [L, E, R].

    counts_LE: pairs of each expert, int64, >= 0. slots_LER: slots of its replicas, int64, NO_SLOT after the last one
    (one at least); slot s is on rank s // slots_per_rank. Rows of the result sum to the counts. No rank gets more than
    it would by an even split; see `leveling`. Raises ValueError before any launch for another dtype, shape or device,
    or more experts, ranks or replicas than the kernel has room for.
    """
    op = "replica_split"
    checks.require_dtype(op, "counts_LE", counts_LE, torch.int64)
    checks.require_dtype(op, "slots_LER", slots_LER, torch.int64)
    checks.require_shape(op, "counts_LE", counts_LE, -1, -1)
    num_layers, num_experts = counts_LE.shape
    checks.require_shape(op, "slots_LER", slots_LER, num_layers, num_experts, -1)
    checks.require_contiguous(op, counts_LE=counts_LE, slots_LER=slots_LER)
    checks.require_device(op, counts_LE, slots_LER=slots_LER)
    checks.require_range(op, "the number of experts", num_experts, 1, MOST_EXPERTS)
    checks.require_range(op, "num_ranks", num_ranks, 1, MOST_RANKS)
    checks.require_range(op, "the number of replicas", slots_LER.shape[2], 1, MOST_REPLICAS)
    checks.require_range(op, "slots_per_rank", slots_per_rank, 1, 2**31 - 1)
    if not launch.runs_kernels(counts_LE):
        shape = {"num_ranks": num_ranks, "slots_per_rank": slots_per_rank, "sweeps": sweeps}
        return reference.replica_split(counts_LE, slots_LER, **shape)
    quota_LER = launch.empty(slots_LER.shape, torch.int64, counts_LE)
    config = launch.pick(SPLIT, tokens=num_layers * num_experts, E=num_experts)
    sizes = num_experts, slots_LER.shape[2], num_ranks, slots_per_rank, sweeps
    args = (counts_LE, slots_LER, quota_LER, *sizes)
    launch.launch(SPLIT, num_layers, config["BLOCK"], args, device_of=counts_LE, config=config)
    return quota_LER


def replica_dispatch(ids_TK: Tensor, rows: Rows, slots_ER: Tensor, quota_ER: Tensor) -> Tensor:
    """The slot of each (token, choice) pair, shape and dtype of ids_TK (int32 or int64).

    `rows` are `align`'s for ids_TK, without padding. The pairs of an expert, in token order, fill its replicas one by
    one as `quota_ER` says; what is beyond goes to the last one. A pair without a row gets NO_SLOT. slots_ER, quota_ER:
    int64 [E, R], a layer of `replica_split`. Raises ValueError before any launch for another dtype, shape or device, or
    padded rows.
    """
    op = "replica_dispatch"
    checks.require_dtype(op, "ids_TK", ids_TK, *INDEX)
    checks.require_dtype(op, "slots_ER", slots_ER, torch.int64)
    checks.require_dtype(op, "quota_ER", quota_ER, torch.int64)
    checks.require_shape(op, "ids_TK", ids_TK, -1, -1)
    checks.require_shape(op, "slots_ER", slots_ER, -1, -1)
    checks.require_shape(op, "quota_ER", quota_ER, *slots_ER.shape)
    checks.require_shape(op, "rows.pairs_N", rows.pairs_N, ids_TK.numel())
    checks.require_shape(op, "rows.ends_E", rows.ends_E, len(slots_ER))
    checks.require_contiguous(op, ids_TK=ids_TK, slots_ER=slots_ER, quota_ER=quota_ER)
    checks.require_device(op, ids_TK, slots_ER=slots_ER, quota_ER=quota_ER, pairs_N=rows.pairs_N, ends_E=rows.ends_E)
    checks.require(rows.experts_M is None, op, "rows must be without padding; align them with tile=1")
    if not launch.runs_kernels(ids_TK):
        return reference.replica_dispatch(ids_TK, rows, slots_ER, quota_ER)
    slots_TK = torch.full_like(ids_TK, NO_SLOT)
    config = launch.pick(DISPATCH, tokens=ids_TK.numel(), E=len(slots_ER))
    grid = min(-(-ids_TK.numel() // config["BLOCK"]), 2**16)
    pairs, ends = rows.pairs_N.to(ids_TK.dtype), rows.ends_E.to(torch.int32)
    args = (ids_TK, pairs, ends, slots_ER, quota_ER, slots_TK, ids_TK.numel(), slots_ER.shape[1])
    variant = {"INDEX": INDEX[ids_TK.dtype]}
    launch.launch(DISPATCH, grid, config["BLOCK"], args, device_of=ids_TK, config=config, variant=variant)
    return slots_TK
