"""K2 and K3: pairs sorted by expert, and how many each got. The kernels are cuda/align.cu.

    ids_TK --align--> Rows        ids_TK --expert_load--> load_E

Nothing here waits for the device. T tokens, K choices, P = T * K pairs, E experts, N rows, M tiles of rows, C chunks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference
from .checks import require_contiguous, require_dtype, require_range, require_shape
from .launch import Config, KernelSpec, empty, launch, pick, runs_kernels
from .reference.routing import Rows as Rows
from .reference.routing import num_rows as num_rows

MAX_EXPERTS = 4096
SMALL_PAIRS = 4096
"""Up to here one block does everything: what a decode step brings."""
SMALL_EXPERTS = 1024

_SORT = (
    {"BLOCK": 256, "ITEMS": 16},
    {"BLOCK": 256, "ITEMS": 8},
    {"BLOCK": 128, "ITEMS": 16},
    {"BLOCK": 128, "ITEMS": 32},
)
_ONE_BLOCK = ({"BLOCK": 512}, {"BLOCK": 256}, {"BLOCK": 128})
_INDICES: tuple[dict[str, int | str], ...] = ({"INDEX": "int"}, {"INDEX": "long long"})

COUNT = KernelSpec(source="align.cu", name="align_count", configs=_SORT, variants=_INDICES)
SCAN = KernelSpec(source="align.cu", name="align_scan", configs=_SORT, variants=_INDICES)
OFFSETS = KernelSpec(source="align.cu", name="align_offsets", configs=_SORT, variants=_INDICES)
SCATTER = KernelSpec(source="align.cu", name="align_scatter", configs=_SORT, variants=_INDICES)
SMALL = KernelSpec(source="align.cu", name="align_small", configs=_ONE_BLOCK, variants=_INDICES)
SPECS: tuple[KernelSpec, ...] = (COUNT, SCAN, OFFSETS, SCATTER, SMALL)


def align(ids_TK: Tensor, num_experts: int, *, tile: int = 1) -> Rows:
    """Sorts the T * K pairs by expert, in token order inside an expert; an id outside 0..E-1 is a pair without a row.

    `ids_TK` is int32 or int64, as are all indices of the result. With `tile` > 1 (at most 1024) each expert's rows are
    padded to a multiple of it, so that a tile of rows belongs to one expert. All rows without a pair hold -1.
    Raises ValueError for a wrong dtype or shape, an E above 4096, or 2**31 rows or more.
    """
    _check("align", ids_TK, num_experts)
    require_range("align", "tile", tile, 1, 1024)
    num_pairs, rows = ids_TK.numel(), num_rows(ids_TK.numel(), num_experts, tile)
    require_range("align", "the number of rows", rows, 0, 2**31 - 1)
    if not runs_kernels(ids_TK):
        return reference.align(ids_TK, num_experts, tile=tile, may_drop=True)
    result = Rows(
        pairs_N=empty((rows,), ids_TK.dtype, ids_TK),
        load_E=empty((num_experts,), ids_TK.dtype, ids_TK),
        ends_E=empty((num_experts,), torch.int32, ids_TK),
        rows_P=empty((num_pairs,), ids_TK.dtype, ids_TK),
        experts_M=empty((rows // tile,), torch.int32, ids_TK) if tile > 1 else None,
    )
    one_block = num_pairs <= SMALL_PAIRS and num_experts <= SMALL_EXPERTS
    (_align_by_one_block if one_block else _align_by_many)(ids_TK, result, tile)
    return result


def expert_load(ids_TK: Tensor, num_experts: int) -> Tensor:
    """How many pairs each expert got, in the dtype of the ids: [E]. Ids outside 0..E-1 count for nobody.

    Raises ValueError as `align` does, whose `load_E` is the same: who has that needs no second count.
    """
    _check("expert_load", ids_TK, num_experts)
    if not runs_kernels(ids_TK):
        return reference.align(ids_TK, num_experts, may_drop=True).load_E
    load_E = empty((num_experts,), ids_TK.dtype, ids_TK)
    _count(ids_TK, load_E, pick(COUNT, tokens=ids_TK.numel(), E=num_experts))
    return load_E


def _check(op: str, ids_TK: Tensor, num_experts: int) -> None:
    require_dtype(op, "ids_TK", ids_TK, torch.int32, torch.int64)
    require_shape(op, "ids_TK", ids_TK, -1, -1)
    require_range(op, "E", num_experts, 1, MAX_EXPERTS)
    require_range(op, "T * K", ids_TK.numel(), 0, 2**31 - 1)
    require_contiguous(op, ids_TK=ids_TK)


def _variant(ids_TK: Tensor) -> dict[str, int | str]:
    return _INDICES[ids_TK.dtype == torch.int64]


def _align_by_one_block(ids_TK: Tensor, rows: Rows, tile: int) -> None:
    experts = len(rows.load_E)
    config = pick(SMALL, tokens=ids_TK.numel(), E=experts)
    sizes = (ids_TK.numel(), experts, tile, len(rows.pairs_N))
    args = (ids_TK, rows.load_E, rows.ends_E, rows.pairs_N, rows.rows_P, rows.experts_M, *sizes)
    shared = (config["BLOCK"] // 32 + 3) * experts * 4
    launch(
        SMALL, 1, config["BLOCK"], args, device_of=ids_TK, config=config, variant=_variant(ids_TK), shared_bytes=shared
    )


def _align_by_many(ids_TK: Tensor, rows: Rows, tile: int) -> None:
    num_pairs, experts = ids_TK.numel(), len(rows.load_E)
    config, variant = pick(COUNT, tokens=num_pairs, E=experts), _variant(ids_TK)
    counts_EC = _count(ids_TK, rows.load_E, config)
    starts_E = empty((experts,), torch.int32, ids_TK)
    sizes = (experts, tile, len(rows.pairs_N))
    args = (rows.load_E, starts_E, rows.ends_E, rows.pairs_N, rows.experts_M, *sizes)
    launch(OFFSETS, 1, config["BLOCK"], args, device_of=ids_TK, config=config, variant=variant)
    launch(
        SCATTER,
        _blocks(num_pairs, config),
        config["BLOCK"],
        (ids_TK, counts_EC, starts_E, rows.pairs_N, rows.rows_P, num_pairs, experts),
        device_of=ids_TK,
        config=config,
        variant=variant,
        shared_bytes=_counters(experts, config),
    )


def _count(ids_TK: Tensor, load_E: Tensor, config: Config) -> Tensor:
    """Fills `load_E`; returns the pairs of each expert before each chunk, [E, C]."""
    num_pairs, experts, variant = ids_TK.numel(), len(load_E), _variant(ids_TK)
    chunks = -(-num_pairs // (32 * config["ITEMS"]))
    counts_EC = empty((experts, chunks), torch.int32, ids_TK)
    launch(
        COUNT,
        _blocks(num_pairs, config),
        config["BLOCK"],
        (ids_TK, counts_EC, num_pairs, experts),
        device_of=ids_TK,
        config=config,
        variant=variant,
        shared_bytes=_counters(experts, config),
    )
    args = (counts_EC, load_E, chunks)
    launch(SCAN, experts, config["BLOCK"], args, device_of=ids_TK, config=config, variant=variant)
    return counts_EC


def _blocks(num_pairs: int, config: Config) -> int:
    return -(-num_pairs // (config["BLOCK"] * config["ITEMS"]))


def _counters(experts: int, config: Config) -> int:
    """Bytes of one counter for each expert and warp of a block."""
    return config["BLOCK"] // 32 * experts * 4
