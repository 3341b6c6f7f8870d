"""FP8 with error feedback: what rounding did to one column of a weight matrix is made up for by the next ones.

GPTQ (arXiv 2210.17323, algorithm 1) with rows' scales from `range_search` and a final fit of each scale by the whole
Hessian. It needs the inputs' second moments E[x x^T], not only their diagonal, and C sequential steps over columns: for
every n-th sync, or a last export; each sync of RL weights starts from the master weights, so nothing accumulates in
between. Plain torch, on any device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .precision import Fitted, range_search
from .reference.precision import encode

PANEL = 128
"""Columns whose error is passed on to all later columns at once, by one matrix product."""


def error_feedback(w_RC: Tensor, moments_CC: Tensor, *, damping: float = 0.01) -> Fitted:
    """Quantizes w so that the error of w x, over inputs with E[x x^T] = moments_CC, is small.

    `damping` is added to the diagonal, as a share of its mean; columns whose input is always zero are left to plain
    rounding. Raises ValueError if the shapes do not fit, or the moments are not finite.
    """
    columns = w_RC.shape[1]
    if tuple(moments_CC.shape) != (columns, columns):
        raise ValueError(
            f"error_feedback: moments_CC must be [{columns}, {columns}] for weights {list(w_RC.shape)}, got "
            f"{list(moments_CC.shape)}; accumulate x^T x over the layer's inputs"
        )
    if not (moments_CC.isfinite().all() and w_RC.isfinite().all()):
        raise ValueError("error_feedback: weights and moments must be finite; look for NaN in the layer's inputs")
    moments = moments_CC.double()
    searched = range_search(w_RC, moments.diagonal().float())
    if not moments.any():
        return searched
    step_CC = _steps(moments, damping)
    codes_RC = torch.empty_like(searched.codes_RC)
    left, scale_R1 = w_RC.float().clone(), searched.encode_R1
    for begin in range(0, columns, PANEL):
        end = min(begin + PANEL, columns)
        errors = torch.empty(len(left), end - begin, device=left.device)
        for column in range(begin, end):
            value = left[:, column : column + 1]
            code = encode(value, scale_R1)
            codes_RC[:, column : column + 1] = code
            error = (value - code.float() * scale_R1) / step_CC[column, column]
            left[:, column:end] -= error * step_CC[column, column:end]
            errors[:, column - begin : column - begin + 1] = error
        left[:, end:] -= errors @ step_CC[begin:end, end:]
    fitted = _fit(w_RC.double(), codes_RC.double(), moments, scale_R1)
    return Fitted(codes_RC, fitted, scale_R1, searched.choice_R)


def _steps(moments: Tensor, damping: float) -> Tensor:
    """Row c says how an error in column c is spread over the columns from c on: Cholesky of the inverse, upper."""
    dead = moments.diagonal() == 0
    damped = moments + damping * moments.diagonal().mean() * torch.eye(len(moments)).to(moments)
    damped[dead, dead] = damped.diagonal().mean()
    steps: Tensor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
    return steps.float()


def _fit(w: Tensor, q: Tensor, moments: Tensor, otherwise: Tensor) -> Tensor:
    """The scale a per row that minimizes (w - a q) H (w - a q)^T."""
    weighted = q @ moments
    along, norm = (weighted * w).sum(1, keepdim=True), (weighted * q).sum(1, keepdim=True)
    return torch.where((norm > 0) & (along > 0), (along / norm).float(), otherwise)
