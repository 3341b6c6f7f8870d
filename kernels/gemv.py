"""Mixture-of-experts products while decoding (K14): a few tokens per expert, bound by reading the weights once.

With more than a handful of rows per expert `torch.nn.functional.grouped_mm` is the right call. A row's result does not
depend on the other rows of the batch; cuda/moe_gemv.cu says why.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import launch, reference
from .checks import require, require_contiguous, require_device, require_dtype, require_shape
from .launch import KernelSpec
from .reference.gemv import rows_in_order

_FORMATS: dict[tuple[torch.dtype, torch.dtype], dict[str, int | str]] = {
    (torch.float32, torch.float32): {"IN": "float", "WEIGHT": "float"},
    (torch.bfloat16, torch.bfloat16): {"IN": "bf16", "WEIGHT": "bf16"},
    (torch.float32, torch.float8_e4m3fn): {"IN": "float", "WEIGHT": "e4m3"},
    (torch.bfloat16, torch.float8_e4m3fn): {"IN": "bf16", "WEIGHT": "e4m3"},
}
GEMV = KernelSpec(
    source="moe_gemv.cu",
    name="moe_gemv",
    configs=({"BLOCK": 128, "FEATURES": 2}, {"BLOCK": 128, "FEATURES": 1}),
    variants=tuple(_FORMATS.values()),
)
SPECS: tuple[KernelSpec, ...] = (GEMV,)


def moe_gemv(x_ND: Tensor, ends_E: Tensor, w_EFD: Tensor, scales_EF: Tensor | None = None) -> Tensor:
    """Each row of x times the matrix of its expert: [N, F] of x's dtype; sums in float32.

    x_ND: float32 or bfloat16, sorted by expert. ends_E: int32, one past the last row of each expert; rows past the last
    end become 0. w_EFD: of x's dtype, or float8_e4m3fn with scales_EF, float32. All contiguous, on one device. Raises
    ValueError for anything else; ends that do not rise are refused on a CPU and read no foreign memory on a GPU.
    """
    op = "moe_gemv"
    require_dtype(op, "x_ND", x_ND, torch.float32, torch.bfloat16)
    require_dtype(op, "w_EFD", w_EFD, x_ND.dtype, torch.float8_e4m3fn)
    require_dtype(op, "ends_E", ends_E, torch.int32)
    require_shape(op, "x_ND", x_ND, -1, -1)
    require_shape(op, "w_EFD", w_EFD, -1, -1, x_ND.shape[1])
    experts, features, columns = w_EFD.shape
    require_shape(op, "ends_E", ends_E, experts)
    require(experts < 2**16 - 1, op, f"at most {2**16 - 2} experts, not {experts}")
    fp8 = w_EFD.dtype == torch.float8_e4m3fn
    require((scales_EF is not None) == fp8, op, "scales_EF belongs to float8_e4m3fn weights, and they need it")
    if scales_EF is not None:
        require_dtype(op, "scales_EF", scales_EF, torch.float32)
        require_shape(op, "scales_EF", scales_EF, experts, features)
    require_contiguous(op, x_ND=x_ND, ends_E=ends_E, w_EFD=w_EFD, scales_EF=scales_EF)
    require_device(op, x_ND, ends_E=ends_E, w_EFD=w_EFD, scales_EF=scales_EF)
    if not x_ND.is_cuda:
        fine = rows_in_order(ends_E, len(x_ND))
        require(fine, op, f"ends_E must rise and end at most at {len(x_ND)}, the rows of x_ND; take it from align()")
    if not launch.runs_kernels(x_ND):
        return reference.moe_gemv(x_ND, ends_E, w_EFD, scales_EF)

    y_NF = launch.empty((len(x_ND), features), x_ND.dtype, x_ND)
    if not y_NF.numel():
        return y_NF
    weights = w_EFD.view(torch.uint8) if fp8 else w_EFD
    config = launch.pick(GEMV, tokens=len(x_ND), E=experts, F=features, D=columns)
    chunk = 16 // w_EFD.element_size()
    vector = columns % chunk == 0 and x_ND.data_ptr() % 16 == 0 and w_EFD.data_ptr() % 16 == 0
    args = (x_ND, ends_E, weights, scales_EF, y_NF, len(x_ND), experts, features, columns, int(vector))
    grid = (-(-features // (config["FEATURES"] * config["BLOCK"] // 32)), experts + 1)
    variant = _FORMATS[x_ND.dtype, w_EFD.dtype]
    launch.launch(GEMV, grid, config["BLOCK"], args, device_of=x_ND, config=config, variant=variant)
    return y_NF
