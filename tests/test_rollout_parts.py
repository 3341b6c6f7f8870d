"""How a model is divided over ranks: by brute force over all of it; and what is refused, in one clear error."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headrace.actors.job import load_job
from headrace.actors.model.config import ModelConfig
from headrace.actors.model.decode import shapes
from headrace.actors.rollout.parallel.mesh import Mesh
from headrace.actors.rollout.parallel.part import HEAD, cut, first_placements, fuse_part
from headrace.actors.rollout.parallel.shares import share_of
from headrace.actors.rollout.runner import Batch
from headrace.kernels.placement import Placement
from headrace.runtime.toml import ConfigError

CLUSTER = Path(__file__).parent.parent / "cluster.toml"
CONFIG = ModelConfig(
    vocab_size=29, hidden_size=8, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=2, num_experts=8,
    moe_intermediate_size=16, max_positions=64,
)  # fmt: skip
SHAPES = shapes(CONFIG)
CPU = torch.device("cpu")


def numbered() -> dict[str, np.ndarray]:
    """Every number of the model is another one."""
    ends = np.cumsum([np.prod(shape) for shape in SHAPES.values()])
    return {
        name: np.arange(end - np.prod(shape), end, dtype=np.float32).reshape(shape)
        for (name, shape), end in zip(SHAPES.items(), ends, strict=True)
    }


@st.composite
def placed(draw: st.DrawFn) -> tuple[Mesh, list[Placement]]:
    ep = draw(st.sampled_from([1, 2, 4]))
    spare = draw(st.integers(0, 8 - 8 // ep))
    mesh = Mesh(tp=draw(st.sampled_from([1, 2])), ep=ep, sp=draw(st.sampled_from([1, 2])), spare_experts=spare)
    more = ep * spare
    layers = [
        draw(st.permutations([*range(8), *draw(st.lists(st.integers(0, 7), min_size=more, max_size=more))]))
        for _ in range(CONFIG.num_layers)
    ]
    return mesh, [Placement(np.array(layer), 8, ep) for layer in layers]


@given(placed())
def test_ranks_hold_every_number_as_often_as_the_mesh_says(drawn: tuple[Mesh, list[Placement]]) -> None:
    mesh, placements = drawn
    whole, held = numbered(), Counter[float]()
    for rank in range(mesh.size):
        part = cut(CONFIG, mesh.place(rank), placements, whole)
        for name, array in part.items():
            if name != HEAD:
                held.update(array.reshape(-1).tolist())
            else:
                held.update(array[array.any(1)].reshape(-1).tolist())
    for name, array in whole.items():
        times = np.vectorize(held.get)(array)
        if "experts" in name:
            layer = int(name.split(".")[2])
            replicas = np.bincount(placements[layer].experts_P, minlength=8) * mesh.sp
            assert (times == replicas[:, None, None]).all()
        elif name == HEAD:
            assert (times == 1).all()
        elif "_proj" in name:
            assert (times == mesh.ep * mesh.sp).all()
        else:
            assert (times == mesh.size).all()


def test_a_rank_has_whole_heads_and_matching_widths() -> None:
    whole = numbered()
    part = cut(CONFIG, Mesh(tp=2, ep=2).place(3), first_placements(Mesh(tp=2, ep=2), CONFIG), whole)
    mine, all_of_it = (
        {name.removeprefix("model.layers.1."): array for name, array in tensors.items()} for tensors in (part, whole)
    )
    gate_up = all_of_it["mlp.experts.gate_up_proj"]
    for name, expected in {
        "self_attn.k_proj.weight": all_of_it["self_attn.k_proj.weight"][2:],
        "self_attn.o_proj.weight": all_of_it["self_attn.o_proj.weight"][:, 4:],
        "mlp.experts.gate_up_proj": np.concatenate((gate_up[4:, 8:16], gate_up[4:, 24:32]), 1),
        "mlp.experts.down_proj": all_of_it["mlp.experts.down_proj"][4:, :, 8:],
    }.items():
        np.testing.assert_array_equal(mine[name], expected)


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    decode = draw(st.lists(st.integers(0, 60), max_size=5))
    chunks = draw(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 40)), max_size=4))
    spans = [*((at, 1) for at in decode), *chunks] or [(0, 9)]
    counts = np.array([count for _, count in spans])
    positions = np.concatenate([np.arange(at, at + count) for at, count in spans])
    tables = np.arange(len(spans) * 9, dtype=np.int32).reshape(-1, 9)
    return Batch(np.arange(len(positions)) * 7, positions, counts, tables, len(decode), np.arange(len(spans)))


@given(batches(), st.sampled_from([Mesh(sp=2), Mesh(sp=3), Mesh(ep=2), Mesh(ep=2, sp=2), Mesh(tp=2, sp=2)]))
def test_shares_of_a_batch_are_all_of_it_once(batch: Batch, mesh: Mesh) -> None:
    shares = [share_of(batch, mesh.place(rank), 2) for rank in range(mesh.size)]
    num, total = mesh.sp * mesh.ep, len(batch.tokens)
    if total < 2 * num:
        assert shares == [None] * mesh.size
        return
    owner = np.repeat(np.arange(len(batch.counts)), batch.counts)
    seen: dict[int, np.ndarray] = {}
    for rank, share in enumerate(shares):
        assert share is not None
        place, rows = mesh.place(rank), share.rows.numpy()
        seen[place.row] = rows
        own = share.batch
        np.testing.assert_array_equal(own.tokens, batch.tokens[rows])
        np.testing.assert_array_equal(own.positions, batch.positions[rows])
        assert (own.counts >= 1).all() and own.counts.sum() == len(rows) <= share.width
        ends = np.cumsum(own.counts)
        for table, begin, end in zip(own.tables, ends - own.counts, ends, strict=True):
            (sequence,) = set(owner[rows[begin:end]].tolist())
            assert np.array_equal(table, batch.tables[sequence])
            assert (np.diff(own.positions[begin:end]) == 1).all()
        assert own.num_decode == (rows < batch.num_decode).sum()
        assert (own.counts[: own.num_decode] == 1).all()
        np.testing.assert_array_equal(share.order.numpy()[rows], place.row * share.width + np.arange(len(rows)))
    assert sorted(np.concatenate(list(seen.values())).tolist()) == list(range(total))
    together = [s.expert_rows.numpy() for rank, s in enumerate(shares) if s and rank % (mesh.tp * mesh.ep) == 0]
    assert sorted(np.concatenate(together).tolist()) == list(range(total))


def test_weights_of_another_model_or_not_finite_are_refused() -> None:
    place = Mesh(tp=2).place(1)
    part = cut(CONFIG, place, first_placements(place.mesh, CONFIG), numbered())
    part["model.layers.0.self_attn.o_proj.weight"][0, 0] = np.nan
    with pytest.raises(FloatingPointError, match=r"layers.0.self_attn.o_proj.weight is not finite"):
        fuse_part(CONFIG, place, part, CPU)
    del part["model.norm.weight"]
    with pytest.raises(ValueError, match=r"model.norm.weight has shape None, expected \(8,\)"):
        fuse_part(CONFIG, place, part, CPU)


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        (["ranks=2"], r"ranks: must be tp \* ep \* sp = 1 \* 1 \* 1, got 2; set it to 1"),
        (["tp=2"], r"ranks: must be tp \* ep \* sp = 2 \* 1 \* 1, got 1; set it to 2"),
        (["tp=3", "ranks=3"], r"num_heads must be a multiple of 3 for tp = 3, got 4"),
        (["tp=4", "ranks=4"], r"num_kv_heads must be a multiple of 4 for tp = 4, got 2"),
        (["ep=3", "ranks=3"], r"ep: must divide \[model\] num_experts \(8\), got 3"),
        (["sp=2", "ranks=2", "spare_experts=1"], r"spare_experts: are replicas on other ranks, so they need ep > 1"),
        (["ep=2", "ranks=2", "spare_experts=5"], r"spare_experts: must be at most 4"),
        (["ep=2", "ranks=2", 'precision.decode="fp8"'], r'precision must be "full" on several ranks'),
        (["ep=2", "ranks=2", "fixed_shapes=true"], r"fixed_shapes: are of a worker of one rank"),
        (["ep=2", "ranks=2", 'engine="openai"', 'base_url="http://127.0.0.1:1"'], r"divide our own engine over ranks"),
    ],
)
def test_ranks_that_do_not_fit_the_model_are_refused_with_the_configuration(settings: list[str], error: str) -> None:
    with pytest.raises(ConfigError, match=error):
        load_job(CLUSTER, [f"actors.rollout.{setting}" for setting in settings])
    load_job(CLUSTER, ["actors.rollout.ranks=4", "actors.rollout.tp=2", "actors.rollout.ep=2"])
