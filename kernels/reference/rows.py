"""Tokens to the rows of their experts and back: plain torch, differentiable."""

from __future__ import annotations

import torch
from torch import Tensor

from .routing import Rows


def permute(x_TD: Tensor, rows: Rows, k: int) -> Tensor:
    """Copies every token to the rows of its k experts: [N, D]. Rows without a pair are zero."""
    if rows.rows_P is None:
        return x_TD.index_select(0, rows.pairs_N // k)
    num_tokens = x_TD.shape[0]
    empty_N = (rows.pairs_N < 0) | (rows.pairs_N >= num_tokens * k)
    tokens_N = torch.where(empty_N, num_tokens, rows.pairs_N // k)
    return torch.cat((x_TD, x_TD.new_zeros(1, x_TD.shape[1]))).index_select(0, tokens_N)


def unpermute(y_ND: Tensor, rows: Rows, weights_TK: Tensor) -> Tensor:
    """Brings the rows back and sums each token's k rows by their weights: [T, D]. A pair without a row adds nothing.

    Where rows are padded, or less precise than float32, sums are in float32 and in the order of the choices.
    """
    num_tokens, k = weights_TK.shape
    if rows.rows_P is None and y_ND.dtype not in (torch.bfloat16, torch.float16):
        weighted_ND = y_ND * weights_TK.reshape(-1).index_select(0, rows.pairs_N).unsqueeze(1)
        return y_ND.new_zeros(num_tokens, y_ND.shape[1]).index_add(0, rows.pairs_N // k, weighted_ND)
    num_rows, width = y_ND.shape
    rows_P = inverse(rows, num_tokens * k)
    lost_P = (rows_P < 0) | (rows_P >= num_rows)
    wide_ND = y_ND if y_ND.dtype == torch.float64 else y_ND.float()
    wide_ND = torch.cat((wide_ND, wide_ND.new_zeros(1, width)))
    y_TKD = wide_ND.index_select(0, torch.where(lost_P, num_rows, rows_P)).reshape(num_tokens, k, width)
    sum_TD = wide_ND.new_zeros(num_tokens, width)
    for choice in range(k):
        sum_TD = sum_TD + y_TKD[:, choice] * weights_TK[:, choice : choice + 1]
    return sum_TD.to(y_ND.dtype)


def unpermute_fp8(y_ND: Tensor, scales_NB: Tensor, rows: Rows, weights_TK: Tensor) -> Tensor:
    """`unpermute` of e4m3 rows, each number times its scale (one for each D / B columns): bfloat16 [T, D]."""
    (num_rows, width), num_scales = y_ND.shape, scales_NB.shape[1]
    wide_ND = y_ND.float().reshape(num_rows, num_scales, width // num_scales) * scales_NB.unsqueeze(-1)
    rows = rows._replace(rows_P=inverse(rows, weights_TK.numel()))
    return unpermute(wide_ND.reshape(num_rows, width), rows, weights_TK).to(torch.bfloat16)


def inverse(rows: Rows, num_pairs: int) -> Tensor:
    """Pair -> row [P], -1 for a pair without a row; without waiting for a GPU."""
    if rows.rows_P is not None:
        return rows.rows_P
    num_rows = rows.pairs_N.shape[0]
    stray_N = (rows.pairs_N < 0) | (rows.pairs_N >= num_pairs)
    rows_P = rows.pairs_N.new_full((num_pairs + 1,), -1)
    rows_N = torch.arange(num_rows, dtype=rows_P.dtype, device=rows_P.device)
    return rows_P.scatter_(0, torch.where(stray_N, num_pairs, rows.pairs_N).long(), rows_N)[:num_pairs]
