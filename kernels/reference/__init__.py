"""Mixture-of-experts token balancing in plain torch: the meaning of each kernel, and what runs without a GPU.

    logits_TE --topk_gate--> ids_TK, weights_TK --align--> rows sorted by expert
    x_TD --permute--> x_ND --(grouped matmul)--> y_ND --unpermute--> y_TD

T tokens, D width, E experts, K choices per token, N = T * K rows. Every order is stable: rows of one expert keep
token order, so equal input gives equal bits. Differentiable where a gradient has a meaning. Right for any load,
experts without rows included. Knows nothing of models.
"""

from __future__ import annotations

from .capacity import Redirect as Redirect
from .capacity import capacity_redirect as capacity_redirect
from .replicas import replica_dispatch as replica_dispatch
from .replicas import replica_split as replica_split
from .routing import Gate as Gate
from .routing import Rows as Rows
from .routing import align as align
from .routing import expert_load as expert_load
from .routing import load_ema as load_ema
from .routing import prob_sum as prob_sum
from .routing import topk_gate as topk_gate
from .rows import permute as permute
from .rows import unpermute as unpermute
