"""Mixture-of-experts token balancing in plain torch: the meaning of each kernel, and what runs without a GPU.

    logits_TE --topk_gate--> ids_TK, weights_TK --align--> rows sorted by expert
    x_TD --permute--> x_ND --(grouped matmul)--> y_ND --unpermute--> y_TD
    logits_NV --token_logprob, sample_logprob--> logprobs_N, tokens_N

T tokens, D width, E experts, K choices per token, N = T * K rows. Every order is stable: rows of one expert keep
token order, so equal input gives equal bits. Differentiable where a gradient has a meaning. Right for any load,
experts without rows included. Knows nothing of models.
"""

from __future__ import annotations

from .bucket import checksum as checksum
from .bucket import pack_weights as pack_weights
from .bucket import plan_bucket as plan_bucket
from .bucket import unpack_weights as unpack_weights
from .capacity import Redirect as Redirect
from .capacity import capacity_redirect as capacity_redirect
from .gemv import moe_gemv as moe_gemv
from .precision import amax_scales as amax_scales
from .precision import fp8_dequant as fp8_dequant
from .precision import fp8_quant as fp8_quant
from .precision import range_search as range_search
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
from .rows import unpermute_fp8 as unpermute_fp8
from .tokens import Sample as Sample
from .tokens import TokenLogprobs as TokenLogprobs
from .tokens import sample_logprob as sample_logprob
from .tokens import token_logprob as token_logprob
