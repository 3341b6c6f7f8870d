"""Tokens to the rows of their experts and back: plain torch, differentiable."""

from __future__ import annotations

from torch import Tensor

from .routing import Rows


def permute(x_TD: Tensor, rows: Rows, k: int) -> Tensor:
    """Copies every token to the rows of its k experts: [N, D]."""
    return x_TD.index_select(0, rows.pairs_N // k)


def unpermute(y_ND: Tensor, rows: Rows, weights_TK: Tensor) -> Tensor:
    """Brings the rows back and sums each token's k rows by their weights: [T, D]."""
    num_tokens, k = weights_TK.shape
    weighted_ND = y_ND * weights_TK.reshape(-1).index_select(0, rows.pairs_N).unsqueeze(1)
    return y_ND.new_zeros(num_tokens, y_ND.shape[1]).index_add(0, rows.pairs_N // k, weighted_ND)
