"""The experts' matrices times the rows of their tokens, few at a time: plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def moe_gemv(x_ND: Tensor, ends_E: Tensor, w_EFD: Tensor, scales_EF: Tensor | None = None) -> Tensor:
    """y[n] = (scales[e] *) w[e] x[n] for each row n of expert e, summed in float32: [N, F] of x's dtype.

    ends_E (int32): one past the last row of each expert, as `align` gives it; rows past the last end become 0. Weights
    are of x's dtype or, with scales, float8_e4m3fn.
    """
    y_NF = x_ND.new_zeros(len(x_ND), w_EFD.shape[1])
    begin = 0
    for expert, end in enumerate(ends_E.tolist()):
        if end > begin:
            y = x_ND[begin:end].float() @ w_EFD[expert].float().t()
            y_NF[begin:end] = (y if scales_EF is None else y * scales_EF[expert]).to(x_ND.dtype)
        begin = end
    return y_NF


def rows_in_order(ends_E: Tensor, num_rows: int) -> bool:
    """Whether the ends rise from 0 to at most `num_rows`."""
    steps = torch.diff(ends_E.long(), prepend=ends_E.new_zeros(1).long())
    return bool((steps >= 0).all()) and (not len(ends_E) or int(ends_E[-1]) <= num_rows)
