"""FP8 (e4m3) quantization: per row or block (K10), by amax history, and by the scale that hurts a layer least (K11).

    activations, gradients    fp8_quant(x, "1x128")            each block by its own amax, one pass
                              fp8_quant(x, b, scales=...)      by amax_scales of the batches before
    weights, at each sync     range_search(w, moment)          searched and fitted scales, one per row
    weights, now and then     feedback.error_feedback(w, H)    columns make up for each other's error

The meaning is reference/precision.py; on a GPU, cuda/fp8_quant.cu and cuda/range_search.cu compute it, to the bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import launch, reference
from .checks import require, require_contiguous, require_device, require_dtype, require_one_of, require_range
from .checks import require_shape as require_shape
from .launch import KernelSpec
from .reference.precision import BLOCKS as BLOCKS
from .reference.precision import SIDE, Block
from .reference.precision import Fitted as Fitted
from .reference.precision import Quantized as Quantized
from .reference.precision import fp8_dequant as fp8_dequant

_FORMATS: tuple[dict[str, int | str], ...] = ({"IN": "float"}, {"IN": "bf16"})
ROW = KernelSpec(
    source="fp8_quant.cu", name="fp8_row", configs=({"BLOCK": 256}, {"BLOCK": 128}, {"BLOCK": 512}), variants=_FORMATS
)
GROUP = KernelSpec(source="fp8_quant.cu", name="fp8_group", configs=({"BLOCK": 128}, {"BLOCK": 256}), variants=_FORMATS)
TILE = KernelSpec(source="fp8_quant.cu", name="fp8_tile", configs=({"BLOCK": 512}, {"BLOCK": 256}), variants=_FORMATS)
HISTORY = KernelSpec(source="fp8_quant.cu", name="fp8_history", configs=({"BLOCK": 256},), variants=({"IN": "float"},))
SEARCH = KernelSpec(
    source="range_search.cu",
    name="range_search",
    configs=({"BLOCK": 128, "PASS": 11}, {"BLOCK": 256, "PASS": 11}, {"BLOCK": 128, "PASS": 3}),
    variants=_FORMATS,
)
SPECS: tuple[KernelSpec, ...] = (ROW, GROUP, TILE, HISTORY, SEARCH)

_KEEP = 4
"""Groups that a warp of fp8_group takes: KEEP there."""


def fp8_quant(x_RC: Tensor, block: Block, *, pow2: bool = False, scales: Tensor | None = None) -> Quantized:
    """Quantizes float32 or bfloat16 [R, C], contiguous, with one scale per "row", "1x128" group or "128x128" tile.

    Without `scales` (float32, from 2^-110 to 2^120, by block) each block has its own: amax / 448, or with `pow2` the
    power of two at or above it. What does not fit is clamped to +-448, an infinity too; NaN gets the code 0x7F. The
    amax that comes back is over finite values. Raises ValueError for another dtype, layout, block or shape of scales.
    """
    op = "fp8_quant"
    _require_matrix(op, x_RC)
    require_one_of(op, "block", block, BLOCKS)
    rows, columns = x_RC.shape
    shape = (-(-rows // SIDE) if block == "128x128" else rows, 1 if block == "row" else -(-columns // SIDE))
    if scales is not None:
        require_dtype(op, "scales", scales, torch.float32)
        require_shape(op, "scales", scales, *shape)
        require_contiguous(op, scales=scales)
        require_device(op, x_RC, scales=scales)
    if not launch.runs_kernels(x_RC):
        return reference.fp8_quant(x_RC, block, pow2=pow2, scales=scales)

    codes = launch.empty(x_RC.shape, torch.uint8, x_RC)
    made = launch.empty(shape, torch.float32, x_RC) if scales is None else scales
    amax = launch.empty(shape, torch.float32, x_RC)
    spec = {"row": ROW, "1x128": GROUP, "128x128": TILE}[block]
    config = launch.pick(spec, tokens=rows, C=columns)
    grid: tuple[int, int] = (shape[0], 1)
    if block == "1x128":
        grid = (rows, -(-shape[1] // (config["BLOCK"] // 32 * _KEEP)))
    elif block == "128x128":
        grid = shape
    require(grid[1] < 2**16, op, f"x_RC has {columns} columns; the kernel's limit for {block} is about 8 million")
    size = (rows, columns) if block == "128x128" else (columns,)
    args = (x_RC, scales, codes, made, amax, *size, int(pow2), int(_is_vector(x_RC)))
    launch.launch(spec, grid, config["BLOCK"], args, device_of=x_RC, config=config, variant=_format(x_RC))
    return Quantized(codes.view(torch.float8_e4m3fn), made, amax)


def amax_scales(history_HN: Tensor, amax_N: Tensor, slot: int, *, pow2: bool = False) -> Tensor:
    """Writes `amax_N` into row `slot` of the history (in place) and returns scales [N] for the next batch.

    float32, contiguous. The scale fits the largest of the H amax of its column; zeros are a history's begin. Raises
    ValueError for another dtype, layout or shape, or a slot that is not there.
    """
    op = "amax_scales"
    for name, tensor in (("history_HN", history_HN), ("amax_N", amax_N)):
        require_dtype(op, name, tensor, torch.float32)
    require_shape(op, "history_HN", history_HN, -1, -1)
    slots, num = history_HN.shape
    require_shape(op, "amax_N", amax_N, num)
    require_range(op, "slot", slot, 0, slots - 1)
    require_contiguous(op, history_HN=history_HN, amax_N=amax_N)
    require_device(op, history_HN, amax_N=amax_N)
    if not launch.runs_kernels(history_HN):
        return reference.amax_scales(history_HN, amax_N, slot, pow2=pow2)
    scales = launch.empty((num,), torch.float32, history_HN)
    config = launch.pick(HISTORY, tokens=num)
    args = (history_HN, amax_N, scales, slots, num, slot, int(pow2))
    grid = -(-num // config["BLOCK"])
    launch.launch(
        HISTORY, grid, config["BLOCK"], args, device_of=history_HN, config=config, variant=HISTORY.variants[0]
    )
    return scales


def range_search(w_RC: Tensor, moment_C: Tensor | None = None) -> Fitted:
    """Quantizes float32 or bfloat16 weights [R, C], each row by the scale that makes the smallest error on the output.

    moment_C: float32, mean square of the layer's input in each column; without it all columns count alike. See
    reference.range_search for what is minimized. Raises ValueError for another dtype, layout or shape.
    """
    op = "range_search"
    _require_matrix(op, w_RC, name="w_RC")
    rows, columns = w_RC.shape
    if moment_C is not None:
        require_dtype(op, "moment_C", moment_C, torch.float32)
        require_shape(op, "moment_C", moment_C, columns)
        require_contiguous(op, moment_C=moment_C)
        require_device(op, w_RC, moment_C=moment_C)
    if not launch.runs_kernels(w_RC):
        return reference.range_search(w_RC, moment_C)
    codes = launch.empty(w_RC.shape, torch.uint8, w_RC)
    scales, encodes = (launch.empty((rows, 1), torch.float32, w_RC) for _ in range(2))
    choices = launch.empty((rows,), torch.int32, w_RC)
    config = launch.pick(SEARCH, tokens=rows, C=columns)
    args = (w_RC, moment_C, codes, scales, encodes, choices, rows, columns, int(_is_vector(w_RC)))
    grid = -(-rows // (config["BLOCK"] // 32))
    launch.launch(SEARCH, grid, config["BLOCK"], args, device_of=w_RC, config=config, variant=_format(w_RC))
    return Fitted(codes.view(torch.float8_e4m3fn), scales, encodes, choices)


def _require_matrix(op: str, x_RC: Tensor, name: str = "x_RC") -> None:
    require_dtype(op, name, x_RC, torch.float32, torch.bfloat16)
    require_shape(op, name, x_RC, -1, -1)
    require(x_RC.shape[1] > 0, op, f"{name} must have at least one column, not shape {list(x_RC.shape)}")
    require(len(x_RC) < 2**31, op, f"{name} must have fewer than 2**31 rows, not {len(x_RC)}; split it")
    require_contiguous(op, **{name: x_RC})


def _format(x: Tensor) -> dict[str, int | str]:
    return _FORMATS[x.dtype == torch.bfloat16]


def _is_vector(x_RC: Tensor) -> bool:
    """Whether every four elements from a multiple of four columns on can be loaded at once."""
    return x_RC.shape[1] % 4 == 0 and x_RC.data_ptr() % (4 * x_RC.element_size()) == 0
