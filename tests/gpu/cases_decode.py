"""A case of actors/rollout/cuda_runner.py: a captured decode step, and the same uncaptured, against whole sequences.

What is right is the same model over each sequence at once, with torch's own attention and no pages.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from case import Case
from torch import Tensor

from headrace.actors.model.config import ModelConfig
from headrace.actors.model.decode import shapes
from headrace.actors.rollout.cuda_runner import Draws, GraphRunner
from headrace.actors.rollout.graphs import Capture, CudaGraphs, Eager
from headrace.actors.rollout.runner import Batch

BF16_STEPS = 0.06
"""Of log-probabilities: some roundings of logits that are not far from 1."""

Size = tuple[int, int, int, int]
"""Sequences, most tokens of one, hidden size, layers."""


def _make(size: Size, random: torch.Generator) -> tuple[GraphRunner, GraphRunner, list[np.ndarray]]:
    num, length, width, layers = size
    config = ModelConfig(
        vocab_size=256, hidden_size=width, num_layers=layers, num_experts=8, moe_intermediate_size=width // 2,
        max_positions=length + 1,
    )  # fmt: skip
    rng = np.random.default_rng(int(torch.randint(2**31, (), generator=random, device=random.device)))
    tensors = random_weights(config, rng)
    captures: list[Capture] = [
        CudaGraphs() if random.device.type == "cuda" else Eager(random.device), Eager(random.device)
    ]  # fmt: skip
    graph, eager = (
        GraphRunner(
            config,
            num_pages=num * -(-(length + 1) // 16),
            page_tokens=16,
            num_rows=num,
            max_pages=-(-(length + 1) // 16),
            capture=capture,
        )
        for capture in captures
    )
    for runner in (graph, eager):
        runner.load(runner.prepare(tensors))
    lengths = rng.integers(2, length + 1, num)
    return graph, eager, [rng.integers(0, config.vocab_size, n) for n in lengths]


def random_weights(config: ModelConfig, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Of a size that keeps activations near 1."""
    scales = {1: 0.0, 2: config.hidden_size**-0.5, 3: config.hidden_size**-0.5}
    return {
        name: rng.standard_normal(shape, np.float32) * np.float32(scales[len(shape)]) + np.float32(len(shape) == 1)
        for name, shape in shapes(config).items()
    }


def _tables(runner: GraphRunner, sequences: list[np.ndarray]) -> np.ndarray:
    return np.arange(runner.num_pages, dtype=np.int32).reshape(len(sequences), -1)


def _whole(runner: GraphRunner, sequences: list[np.ndarray]) -> Tensor:
    """Logits after each sequence, [S, V]; their keys and values are in their pages then."""
    counts = np.array([len(s) for s in sequences])
    batch = Batch(
        np.concatenate(sequences), np.concatenate([np.arange(n) for n in counts]), counts,
        _tables(runner, sequences), 0, np.arange(len(sequences)),
    )  # fmt: skip
    return runner.run(batch).logits


def _decode(runner: GraphRunner, sequences: list[np.ndarray]) -> Tensor:
    """Log-probabilities of the likeliest next token, the last one of each sequence having been fed on the device."""
    num = len(sequences)
    _whole(runner, [s[:-1] for s in sequences])
    lasts = torch.tensor([s[-1] for s in sequences], device=runner.device)
    one = torch.nn.functional.one_hot(lasts, runner.config.vocab_size).float()
    zeros, ones = np.zeros(num), np.ones(num)
    rows = np.arange(num)
    draws = Draws(rows, np.array([len(s) - 1 for s in sequences]), ones / 2, zeros, np.zeros(num, int), ones, zeros)
    runner.launch(draws, np.zeros((0, 1), np.int32), one).read()
    return torch.from_numpy(runner.launch(draws, _tables(runner, sequences), None).read()[1])


def _run(graph: GraphRunner, eager: GraphRunner, sequences: list[np.ndarray]) -> tuple[Tensor, Tensor]:
    return _decode(graph, sequences), _decode(eager, sequences)


def _exact(graph: GraphRunner, eager: GraphRunner, sequences: list[np.ndarray]) -> tuple[Tensor, Tensor]:
    best = torch.log_softmax(_whole(eager, sequences).double(), -1).amax(-1).cpu()
    return best, best


def cases() -> Iterator[Case]:
    yield Case(
        name="decode_step",
        small=((3, 20, 32, 2), (7, 70, 64, 3)),
        large=(256, 1500, 1024, 8),
        make=_make,
        run=_run,
        exact=_exact,
        atol=BF16_STEPS,
    )
