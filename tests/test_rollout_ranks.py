"""A model over several ranks against the same model on one: logits of the same batches, and whole greedy answers."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from ranked import gang

from headrace.actors.model.config import ModelConfig
from headrace.actors.model.qwen3_moe import Qwen3Moe
from headrace.actors.rollout.engine import Engine
from headrace.actors.rollout.parallel.balance import Balance, Balancing
from headrace.actors.rollout.parallel.lost import RankLost
from headrace.actors.rollout.parallel.mesh import Mesh
from headrace.actors.rollout.parallel.part import first_placements
from headrace.actors.rollout.requests import Request
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


TIED = replace(CONFIG, tie_word_embeddings=True)


@cache
def weights(config: ModelConfig = CONFIG) -> dict[str, np.ndarray]:
    return {name: tensor.detach().numpy() for name, tensor in Qwen3Moe(config).named_parameters()}


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


def single(config: ModelConfig = CONFIG) -> SingleRunner:
    runner = SingleRunner(config, routes=True, **PAGES)
    runner.load(runner.prepare(weights(config)))
    return runner


def outputs(runner: Runner) -> tuple[list[torch.Tensor], list[np.ndarray]]:
    forwards = [runner.run(batch) for batch in batches()]
    assert all(forward.routes is not None for forward in forwards)
    return [torch.log_softmax(f.logits, -1) for f in forwards], [f.routes for f in forwards if f.routes is not None]


@pytest.mark.parametrize(("mesh", "config"), [*((m, CONFIG) for m in MESHES), (Mesh(tp=2), TIED)])
def test_logits_and_routes_are_those_of_one_rank(mesh: Mesh, config: ModelConfig, tmp_path: Path) -> None:
    expected, expected_routes = outputs(single(config))
    with gang(config, mesh, tmp_path / "meeting", routes=True, split_tokens=6, **PAGES) as ranks:
        ranks.runner.load(ranks.runner.prepare(ranks.part(weights(config))))
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


def answers(engine: Engine) -> dict[tuple[int, int], tuple[list[int], list[float]]]:
    """Of some greedy requests and a sampled one, prompts of up to 40 tokens."""
    random = np.random.default_rng(4)
    for key, length in enumerate((3, 40, 17)):
        prompt = random.integers(1, CONFIG.vocab_size, length).astype(np.int32)
        temperature = 0.0 if key < 2 else 1.0
        engine.submit(
            Request(
                key=key, ordinal=key, prompt=prompt, members=[0, 1], max_new_tokens=30, temperature=temperature
            )
        )  # fmt: skip
    found: dict[tuple[int, int], tuple[list[int], list[float]]] = {}
    while engine.num_live or engine.num_waiting:
        for chunk in engine.step():
            tokens, logprobs = found.setdefault((chunk.key, chunk.member), ([], []))
            tokens += chunk.tokens.tolist()
            logprobs += chunk.logprobs.tolist()
    return found


@pytest.mark.parametrize("mesh", [Mesh(tp=2), Mesh(ep=2), Mesh(sp=2), Mesh(tp=2, ep=2)])
def test_an_engine_over_ranks_writes_what_one_writes_alone(mesh: Mesh, tmp_path: Path) -> None:
    limits = {"num_slots": 6, "max_prompt_tokens": 40, "max_new_tokens": 30, "eos_id": 0, "seed": 5, "version": 1}
    expected = answers(Engine(CONFIG, weights(), **limits))
    with gang(CONFIG, mesh, tmp_path / "meeting", split_tokens=6, **PAGES) as ranks:
        given = answers(Engine(CONFIG, ranks.part(weights()), runner=ranks.runner, **limits))
    assert given.keys() == expected.keys()
    for key, (tokens, logprobs) in expected.items():
        assert given[key][0] == tokens
        assert given[key][1] == pytest.approx(logprobs, abs=1e-4)


def test_new_weights_count_for_all_ranks_from_the_same_step_on(tmp_path: Path) -> None:
    other = {name: np.roll(array, 1, -1) for name, array in weights().items()}
    alone = single()
    first, *rest = batches()
    with gang(CONFIG, Mesh(tp=2, ep=2), tmp_path / "meeting", **PAGES) as ranks:
        for given in (weights(), other):
            # The others hold the next version long before the first rank says that it counts.
            prepared = ranks.runner.prepare(ranks.part(given))
            ranks.part(weights())
            alone.load(alone.prepare(given))
            ranks.runner.load(prepared)
            for batch in (first, *rest):
                assert (ranks.runner.run(batch).logits - alone.run(batch).logits).abs().max() < 1e-4


def test_pages_are_copied_and_cleared_at_all_ranks(tmp_path: Path) -> None:
    first, second, *_ = batches()
    moved = replace(second, tables=second.tables + 20)
    alone = single()
    with gang(CONFIG, Mesh(tp=2), tmp_path / "meeting", **PAGES) as ranks:
        ranks.runner.load(ranks.runner.prepare(ranks.part(weights())))
        for runner in (alone, ranks.runner):
            unwanted = runner.run(replace(first, wanted=np.zeros(0, np.int64)))
            assert unwanted.logits.shape == (0, CONFIG.vocab_size)
            runner.copy_pages(np.arange(20), np.arange(20, 40))
            runner.clear_pages(np.arange(20))
        assert (ranks.runner.run(moved).logits - alone.run(moved).logits).abs().max() < 1e-4
        assert (ranks.runner.run(second).logits - alone.run(second).logits).abs().max() < 1e-4


@pytest.mark.parametrize("victim", [1, 3])
def test_a_rank_that_is_gone_is_an_error_for_the_others_at_once(tmp_path: Path, victim: int) -> None:
    with gang(CONFIG, Mesh(tp=2, ep=2), tmp_path / "meeting", **PAGES) as ranks:
        ranks.runner.load(ranks.runner.prepare(ranks.part(weights())))
        first, *_ = batches()
        ranks.runner.run(first)
        ranks.leave(victim)
        began = time.monotonic()
        with pytest.raises(RankLost, match=r"can't go on|takes no orders"):
            for _ in range(10):
                ranks.runner.run(first)
        assert time.monotonic() - began < 15
