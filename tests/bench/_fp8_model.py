"""A trained model in FP8: what its matrices become, and how far its next-token distribution moves.

The model's own forward pass is run; a function mode meets every product of activations and weights, in the order in
which the model makes them, and puts another weight in its place. The router, the output layer and the embedding stay
bf16. Weights are those that the engine holds: fused, with the norms folded in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from headrace.actors.model.qwen3_moe import Qwen3Moe
from headrace.kernels.feedback import error_feedback
from headrace.kernels.precision import fp8_dequant, fp8_quant, range_search

KEPT = ("gate", "head")
"""Sites whose weights stay bf16."""
TOKENS_PER_PASS = 8192

Quantizer = Callable[[Tensor, Tensor], Tensor]
"""(weight [R, C], second moments of its input [C, C]) -> the weight as FP8 has it, float32"""


def by_amax(w: Tensor, moments: Tensor) -> Tensor:
    """Each row by its own amax."""
    quantized = fp8_quant(w, "row")
    return fp8_dequant(quantized.codes_RC, quantized.scales, "row")


def by_search(w: Tensor, moments: Tensor) -> Tensor:
    """Each row by the searched and fitted scale."""
    fitted = range_search(w, moments.diagonal().contiguous())
    return fp8_dequant(fitted.codes_RC, fitted.scales_R1, "row")


def by_feedback(w: Tensor, moments: Tensor) -> Tensor:
    """With error feedback between columns."""
    fitted = error_feedback(w, moments)
    return fp8_dequant(fitted.codes_RC, fitted.scales_R1, "row")


class _Products(TorchFunctionMode):
    """Hands each product of the forward pass to `product`, with the name of its place: "layer.kind"."""

    def __init__(self, num_layers: int) -> None:
        super().__init__()
        kinds = ("qkv", "out", "gate", "gate_up", "down")
        self._sites = [f"{layer}.{kind}" for layer in range(num_layers) for kind in kinds] + ["head"]
        self._calls = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in (F.linear, torch._grouped_mm):  # what F.grouped_mm calls
            return func(*args, **kwargs)
        site = self._sites[self._calls % len(self._sites)]
        self._calls += 1
        x, w = args[:2]
        if func is F.linear:
            return self.product(site, x, w.unsqueeze(0), [len(x)])
        return self.product(site, x, w.transpose(1, 2), kwargs["offs"].tolist())

    def product(self, site: str, x: Tensor, w_ERC: Tensor, ends: Sequence[int]) -> Tensor:
        """x [T, C], sorted by matrix, times its matrix."""
        raise NotImplementedError


class Moments(_Products):
    """Sums x x^T at every site, for each matrix."""

    def __init__(self, num_layers: int) -> None:
        super().__init__(num_layers)
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}

    def product(self, site: str, x: Tensor, w_ERC: Tensor, ends: Sequence[int]) -> Tensor:
        sums = self._sums.setdefault(site, torch.zeros(len(w_ERC), x.shape[1], x.shape[1], dtype=torch.float64))
        counts = self._counts.setdefault(site, torch.zeros(len(w_ERC), dtype=torch.float64))
        for expert, rows in enumerate(_parts(x, ends)):
            sums[expert] += rows.double().t() @ rows.double()
            counts[expert] += len(rows)
        return _multiply(x, w_ERC, ends)

    def means(self) -> dict[str, Tensor]:
        """Site -> E[x x^T] of each matrix, float32 [E, C, C]; the mean over all counts as one more row of each."""
        means = {}
        for site, sums in self._sums.items():
            prior = sums.sum(0) / self._counts[site].sum()
            means[site] = ((sums + prior) / (self._counts[site] + 1).reshape(-1, 1, 1)).float()
        return means


class Policy(_Products):
    """The model with bf16 weights, or those of `quantizer` where there is one; keeps the router's logits."""

    def __init__(
        self,
        num_layers: int,
        quantizer: Quantizer | None = None,
        moments: dict[str, Tensor] | None = None,
        *,
        fp8_inputs: bool = False,
    ) -> None:
        super().__init__(num_layers)
        self._quantizer = quantizer
        self._moments = moments or {}
        self._fp8_inputs = fp8_inputs
        self._weights: dict[str, Tensor] = {}
        self.router: list[Tensor] = []
        """Logits of every layer and pass, in order: [T, E]"""

    def product(self, site: str, x: Tensor, w_ERC: Tensor, ends: Sequence[int]) -> Tensor:
        kept = self._quantizer is None or site.endswith(KEPT)
        if site not in self._weights:
            self._weights[site] = w_ERC.bfloat16().float() if kept else self._quantized(site, w_ERC)
        x = x.bfloat16().float()
        if self._fp8_inputs and not kept:
            inputs = fp8_quant(x.contiguous(), "1x128")
            x = fp8_dequant(inputs.codes_RC, inputs.scales, "1x128")
        y = _multiply(x, self._weights[site], ends)
        if site.endswith(".gate"):
            self.router.append(y)
        return y

    def _quantized(self, site: str, w_ERC: Tensor) -> Tensor:
        assert self._quantizer is not None
        moments = self._moments[site]
        return torch.stack([self._quantizer(w.contiguous(), m) for w, m in zip(w_ERC, moments, strict=True)])


def run(model: Qwen3Moe, sequences: Sequence[Tensor], mode: _Products) -> Tensor:
    """Log-probabilities after every token of all sequences, [tokens, vocabulary]."""
    found = []
    with torch.no_grad():
        for batch in _batches(sequences):
            positions = torch.cat([torch.arange(len(sequence)) for sequence in batch])
            with mode:
                out = model(torch.cat(batch), positions, [len(sequence) for sequence in batch])
                found.append(model.logits(out.hidden).log_softmax(-1))
    return torch.cat(found)


def divergence(a: Tensor, b: Tensor) -> Tensor:
    """KL(a || b) of each row, in nats, from log-probabilities."""
    return (a.exp() * (a - b)).sum(-1)


def router_agreement(a: Sequence[Tensor], b: Sequence[Tensor], k: int) -> float:
    """Share of the chosen experts that both chose, over tokens and layers."""
    same = total = 0
    for one, other in zip(a, b, strict=True):
        chosen = [torch.zeros_like(x).scatter_(1, x.topk(k).indices, 1.0) for x in (one, other)]
        same += int((chosen[0] * chosen[1]).sum())
        total += k * len(one)
    return same / total


def _batches(sequences: Sequence[Tensor]) -> list[list[Tensor]]:
    batches: list[list[Tensor]] = [[]]
    for sequence in sequences:
        if sum(map(len, batches[-1])) + len(sequence) > TOKENS_PER_PASS:
            batches.append([])
        batches[-1].append(sequence)
    return batches


def _multiply(x: Tensor, w_ERC: Tensor, ends: Sequence[int]) -> Tensor:
    return torch.cat([rows @ w.t() for rows, w in zip(_parts(x, ends), w_ERC, strict=True)])


def _parts(x: Tensor, ends: Sequence[int]) -> list[Tensor]:
    return [x[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]
