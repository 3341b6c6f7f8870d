"""A model over several ranks against the same model on one: logits of the same batches, and whole greedy answers."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from ranked import gang

from headrace.actors.model.config import ModelConfig
from headrace.actors.model.qwen3_moe import Qwen3Moe
from headrace.actors.rollout.parallel.balance import Balance, Balancing
from headrace.actors.rollout.parallel.mesh import Mesh
from headrace.actors.rollout.parallel.part import first_placements
from headrace.actors.rollout.runner import Batch, Runner
from headrace.actors.rollout.single import SingleRunner
from headrace.kernels.placement import Placement

CONFIG = ModelConfig(
    vocab_size=29, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, num_experts=8,
    num_experts_per_tok=2, moe_intermediate_size=16, max_positions=256, initializer_range=0.3,
)  # fmt: skip
PAGES = {"num_pages": 64, "page_tokens": 8}

MESHES = [
    Mesh(tp=2), Mesh(ep=2), Mesh(sp=2), Mesh(tp=2, ep=2), Mesh(tp=2, sp=2), Mesh(ep=2, sp=2), Mesh(ep=4),
    Mesh(ep=2, spare_experts=2), Mesh(tp=2, ep=2, spare_experts=4),
]  # fmt: skip


@cache
def weights(seed: int = 0) -> dict[str, np.ndarray]:
    return {name: tensor.detach().numpy() for name, tensor in Qwen3Moe(CONFIG, seed=seed).named_parameters()}


def batches() -> list[Batch]:
    """Four sequences: prompts in chunks, beside others that decode; the last two share the pages of a prompt."""
    random = np.random.default_rng(3)
    texts = [random.integers(0, CONFIG.vocab_size, n) for n in (70, 9, 33, 33)]
    texts[3][:32] = texts[2][:32]
    tables = np.arange(40, dtype=np.int32).reshape(4, 10)
    tables[3, :4] = tables[2, :4]
    steps = [
        [(0, 0, 40), (1, 0, 5)],
        [(1, 5, 6), (0, 40, 69)],
        [(1, 6, 7), (0, 69, 70), (2, 0, 33)],
        [(0, 69, 70), (1, 7, 8), (2, 32, 33), (3, 32, 33)],
    ]
    found = []
    for spans in steps:
        found.append(
            Batch(
                tokens=np.concatenate([texts[s][a:b] for s, a, b in spans]).astype(np.int64),
                positions=np.concatenate([np.arange(a, b) for _, a, b in spans]),
                counts=np.array([b - a for _, a, b in spans]),
                tables=tables[[s for s, _, _ in spans]],
                num_decode=next((i for i, (_, a, b) in enumerate(spans) if b - a > 1), len(spans)),
                wanted=np.arange(len(spans)) if len(spans) != 3 else np.array([0, 2]),
            )
        )
    return found


def single() -> SingleRunner:
    runner = SingleRunner(CONFIG, routes=True, **PAGES)
    runner.load(runner.prepare(weights()))
    return runner


def outputs(runner: Runner) -> tuple[list[torch.Tensor], list[np.ndarray]]:
    forwards = [runner.run(batch) for batch in batches()]
    assert all(forward.routes is not None for forward in forwards)
    return [torch.log_softmax(f.logits, -1) for f in forwards], [f.routes for f in forwards if f.routes is not None]


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_logits_and_routes_are_those_of_one_rank(mesh: Mesh, tmp_path: Path) -> None:
    expected, expected_routes = outputs(single())
    with gang(CONFIG, mesh, tmp_path / "meeting", routes=True, split_tokens=6, **PAGES) as ranks:
        ranks.runner.load(ranks.runner.prepare(ranks.part(weights())))
        given, routes = outputs(ranks.runner)
    for ours, theirs in zip(given, expected, strict=True):
        assert ours.shape == theirs.shape
        assert (ours - theirs).abs().max() < 1e-4
    for mine, others in zip(routes, expected_routes, strict=True):
        assert np.array_equal(mine, others)


def test_experts_move_between_two_steps_and_answers_stay(tmp_path: Path) -> None:
    mesh = Mesh(ep=2, tp=2, spare_experts=1)
    expected, _ = outputs(single())
    random = np.random.default_rng(5)
    with gang(CONFIG, mesh, tmp_path / "meeting", routes=True, **PAGES) as ranks:
        ranks.runner.load(ranks.runner.prepare(ranks.part(weights())))
        for batch, wanted in zip(batches(), expected, strict=True):
            given = torch.log_softmax(ranks.runner.run(batch).logits, -1)
            assert (given - wanted).abs().max() < 1e-4
            ranks.runner.place_experts([anywhere(mesh, random) for _ in range(CONFIG.num_layers)])


def anywhere(mesh: Mesh, random: np.random.Generator) -> Placement:
    """Each expert somewhere, two of them twice."""
    experts = random.permutation([*range(CONFIG.num_experts), *random.integers(0, CONFIG.num_experts, 2)])
    return Placement(experts, CONFIG.num_experts, mesh.ep)


def test_the_workers_own_load_moves_experts_that_are_busy_together(tmp_path: Path) -> None:
    """Two experts of one rank have all the load: one of them gets to the other rank."""
    mesh = Mesh(ep=2)
    balance = Balance(mesh, CONFIG, Balancing(steps=2, move_pairs=1.0))
    everyone = np.zeros((40, CONFIG.num_layers, 2), np.uint8)
    everyone[:, :, 1] = 1
    balance.placed(first_placements(mesh, CONFIG))
    with gang(CONFIG, mesh, tmp_path / "meeting", balance=balance, **PAGES) as ranks:
        ranks.runner.load(ranks.runner.prepare(ranks.part(weights())))
        before = list(ranks.runner.placements)
        expected = [ranks.runner.run(batch).logits for batch in batches()]
        for _ in range(2):
            balance.saw(everyone)
        assert balance._placing is not None
        balance._placing.result(20.0)
        again = [ranks.runner.run(batch).logits for batch in batches()]
        after = ranks.runner.placements
    assert balance.moves > 0
    for old, new in zip(before, after, strict=True):
        assert old.even_load(np.array([40, 40, 0, 0, 0, 0, 0, 0])).tolist() == [80, 0]
        assert new.even_load(np.array([40, 40, 0, 0, 0, 0, 0, 0])).tolist() == [40, 40]
    for ours, theirs in zip(again, expected, strict=True):
        assert (ours - theirs).abs().max() < 1e-4
