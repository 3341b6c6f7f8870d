"""Muon for hidden matrices, AdamW for everything else, one learning-rate schedule. Knows nothing of losses.

Muon (Jordan et al. 2024): the momentum of a matrix, made nearly orthogonal by five Newton-Schulz steps, is the update,
so that all its directions learn alike. The experts of a layer are one tensor [E, out, in] and E matrices.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

BETAS = (0.9, 0.95)
"""AdamW: decay of the first and second moments."""
MUON_MOMENTUM = 0.95

_ADAMW_ONLY = ("embed_tokens.weight", "lm_head.weight", "mlp.gate.weight")
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


class Schedule(NamedTuple):
    """Linear warm-up, constant, linear decay over the last share of the steps."""

    steps: int
    warmup_steps: int
    decay_ratio: float
    final_ratio: float

    def scale(self, step: int) -> float:
        """Factor of the learning rates at `step` (from 0); past the end it stays at final_ratio."""
        rise = min(1.0, (step + 1) / max(1, self.warmup_steps))
        decay_steps = self.decay_ratio * self.steps
        left = min(1.0, max(0.0, self.steps - step) / decay_steps) if decay_steps else 1.0
        return rise * (self.final_ratio + (1 - self.final_ratio) * left)


class Optimizer:
    """Updates named parameters from their gradients. `muon_learning_rate` 0 leaves all of them to AdamW."""

    def __init__(
        self,
        parameters: Iterable[tuple[str, nn.Parameter]],
        *,
        learning_rate: float,
        muon_learning_rate: float,
        weight_decay: float,
        clip_norm: float,
    ) -> None:
        self._parameters = dict(parameters)
        self._learning_rate = learning_rate
        self._muon_learning_rate = muon_learning_rate
        self._weight_decay = weight_decay
        self._clip_norm = clip_norm
        self._muon = [n for n, p in self._parameters.items() if muon_learning_rate and is_hidden_matrix(n, p)]
        self._momentum = {n: torch.zeros_like(self._parameters[n]) for n in self._muon}
        adamw = [p for n, p in self._parameters.items() if n not in self._momentum]
        self._adamw = torch.optim.AdamW(adamw, lr=learning_rate, betas=BETAS, weight_decay=weight_decay, fused=True)

    @torch.no_grad()
    def step(self, scale: float) -> float:
        """Clips the gradients, applies them with the learning rates times `scale`, drops them; returns their norm.

        Raises FloatingPointError, with nothing changed and the gradients dropped, if the norm is not finite.
        """
        gradients = [p.grad for p in self._parameters.values() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if not norm.isfinite():
            self.drop_gradients()
            raise FloatingPointError(f"the gradient norm is {norm.item()}; no weight was changed")
        torch.nn.utils.clip_grads_with_norm_(self._parameters.values(), self._clip_norm, norm)
        for group in self._adamw.param_groups:
            group["lr"] = self._learning_rate * scale
        self._adamw.step()
        for name in self._muon:
            self._muon_step(self._parameters[name], self._momentum[name], self._muon_learning_rate * scale)
        self.drop_gradients()
        return float(norm)

    def drop_gradients(self) -> None:
        for parameter in self._parameters.values():
            parameter.grad = None

    def _muon_step(self, parameter: Tensor, momentum: Tensor, learning_rate: float) -> None:
        if parameter.grad is None:
            return
        momentum.lerp_(parameter.grad, 1 - MUON_MOMENTUM)
        update = orthogonalize(torch.lerp(parameter.grad, momentum, MUON_MOMENTUM))
        num_out, num_in = parameter.shape[-2:]
        parameter.mul_(1 - learning_rate * self._weight_decay)
        parameter.add_(update, alpha=-learning_rate * max(1.0, num_out / num_in) ** 0.5)

    def state(self) -> dict[str, np.ndarray]:
        """Moments by `kind:parameter`, as copies: what `load_state` needs to go on bit for bit."""
        arrays = {f"momentum:{name}": m.numpy().copy() for name, m in self._momentum.items()}
        for name, parameter in self._parameters.items():
            for kind, value in self._adamw.state.get(parameter, {}).items():
                arrays[f"{kind}:{name}"] = value.numpy().copy()
        return arrays

    @torch.no_grad()
    def load_state(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Takes what `state` gave. Raises ValueError, with nothing changed, if it is of another optimizer."""
        adamw = {name for name in self._parameters if name not in self._momentum}
        kinds: dict[str, dict[str, Tensor]] = {}
        for key, array in arrays.items():
            kind, _, name = key.partition(":")
            kinds.setdefault(kind, {})[name] = torch.tensor(array)
        for kind, values in kinds.items():
            if values.keys() != (self._momentum.keys() if kind == "momentum" else adamw):
                raise ValueError(
                    f"the optimizer state has {kind} for other parameters; it was saved with other settings"
                )
            for name, value in values.items():
                if kind != "step" and value.shape != self._parameters[name].shape:
                    raise ValueError(
                        f"the optimizer state of {name} has shape {tuple(value.shape)}; it is of another model"
                    )
        for kind, values in kinds.items():
            for name, value in values.items():
                if kind == "momentum":
                    self._momentum[name] = value
                else:
                    self._adamw.state[self._parameters[name]][kind] = value


def is_hidden_matrix(name: str, parameter: Tensor) -> bool:
    """Whether Muon may train it: a matrix between hidden layers, or a stack of them."""
    return parameter.ndim >= 2 and not name.endswith(_ADAMW_ONLY)


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """Brings the singular values of each matrix [..., m, n] near 1 (0.7 to 1.2), keeping its singular vectors.

    Newton-Schulz iteration X <- a X + (b A + c A^2) X with A = X X^T, from X / |X|; zero stays zero.
    """
    a, b, c = _NEWTON_SCHULZ
    shape = matrices.shape
    x = matrices.reshape(-1, *shape[-2:])
    tall = shape[-2] > shape[-1]
    x = x.mT if tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
    for _ in range(steps):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).reshape(shape)
