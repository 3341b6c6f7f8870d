"""Plans of weight exchanges against brute force: whole arrays, sliced by numpy and by hand."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.actors.model.config import ModelConfig
from headrace.actors.model.shards import engine_holding, trainer_holding
from headrace.runtime.errors import BadWeights
from headrace.runtime.exchange.boxes import Box, cut
from headrace.runtime.exchange.header import stored
from headrace.runtime.exchange.holding import Held, Holding, Part, Shard, Split, Whole
from headrace.runtime.exchange.mesh import Mesh, chunk
from headrace.runtime.exchange.plan import make_plan

Arrays = dict[int, dict[str, np.ndarray]]


def whole_arrays(holding: Holding) -> dict[str, np.ndarray]:
    """Every element of every tensor is a different number."""
    arrays, next_ = {}, 1
    for whole in holding.wholes.values():
        size = int(np.prod(whole.shape))
        arrays[whole.name] = (
            np.arange(next_, next_ + size, dtype=np.float64).astype(stored(whole.dtype)).reshape(whole.shape)
        )
        next_ += size
    return arrays


def ways(extent: int, length: int) -> list[slice]:
    """How torch.chunk cuts, in plain Python."""
    step = -(-length // extent)
    return [slice(min(i * step, length), min((i + 1) * step, length)) for i in range(extent)]


def held_by(holding: Holding, wholes: Mapping[str, np.ndarray], row: int) -> dict[str, np.ndarray]:
    """What the rank at `row` of the mesh holds, one array after the other, by slicing and concatenating."""
    mesh = holding.mesh
    place = dict(zip(mesh.axes, np.unravel_index(row, tuple(mesh.axes.values())), strict=True))

    def index(axes: tuple[str, ...]) -> tuple[int, int]:
        number, extent = 0, 1
        for axis in axes:
            number, extent = number * mesh.axes[axis] + int(place[axis]), extent * mesh.axes[axis]
        return number, extent

    result = {}
    for held in holding.held:
        if any(place[axis] != at for axis, at in held.where):
            continue
        parts = []
        for part in held.parts:
            mask = np.zeros(part.whole.shape, bool)
            mask[(part.box or Box((0,) * mask.ndim, part.whole.shape)).slices] = True
            for split in part.splits:
                number, extent = index(split.axes)
                grains = part.whole.shape[split.dim] // split.grain
                if split.repeat and extent > grains:
                    number, extent = number * grains // extent, grains
                mine = ways(extent, grains)[number]
                keep = np.zeros(part.whole.shape[split.dim], bool)
                keep[mine.start * split.grain : mine.stop * split.grain] = True
                mask &= keep.reshape([-1 if d == split.dim else 1 for d in range(mask.ndim)])
            if mask.any():
                rows = np.ix_(*(mask.any(tuple(set(range(mask.ndim)) - {d})) for d in range(mask.ndim)))
                parts.append(wholes[part.whole.name][rows])
        if not parts:
            continue
        array = np.concatenate(parts, held.fuse)
        for shard in held.shards:
            number, extent = index(shard.axes)
            array = array[(slice(None),) * shard.dim + (ways(extent, array.shape[shard.dim])[number],)]
        if array.size:
            result[held.name] = array.reshape(array.shape[array.ndim - held.dims :])
    return result


def arrays_of(holding: Holding, wholes: Mapping[str, np.ndarray]) -> Arrays:
    return {int(rank): held_by(holding, wholes, row) for row, rank in enumerate(holding.mesh.ranks)}


def require_right(source: Holding, dest: Holding) -> None:
    """Does what the plan says with arrays, and compares with slicing the whole tensors; each element comes once."""
    wholes = whole_arrays(source)
    have, want = arrays_of(source, wholes), arrays_of(dest, wholes)
    for side, arrays in ((source, have), (dest, want)):
        for rank, held in arrays.items():
            assert side.local(rank) == {n: (_dtype(side, n), a.shape) for n, a in held.items()}
        assert side.nbytes().tolist() == [sum(a.nbytes for a in held.values()) for held in arrays.values()]
    got = {rank: {name: np.zeros_like(array) for name, array in held.items()} for rank, held in want.items()}
    times = {rank: {name: np.zeros(array.shape, int) for name, array in held.items()} for rank, held in want.items()}
    plan = make_plan(source, dest)
    sent, received, kept = Counter[int](), Counter[int](), Counter[int]()
    for copy in plan.copies():
        values = have[copy.source][copy.source_name][copy.source_box.slices]
        assert values.size
        got[copy.dest][copy.dest_name][copy.dest_box.slices] = values.reshape(copy.dest_box.shape)
        times[copy.dest][copy.dest_name][copy.dest_box.slices] += 1
        if copy.source == copy.dest:
            kept[copy.dest] += values.nbytes
        else:
            sent[copy.source] += values.nbytes
            received[copy.dest] += values.nbytes
            assert copy.dest not in have or not _has(have[copy.dest], values)
    for rank, held in want.items():
        for name, array in held.items():
            np.testing.assert_array_equal(got[rank][name], array)
            assert (times[rank][name] == 1).all()
    for counted, by_rank, ranks in (
        (sent, plan.traffic.sent, source.mesh.ranks),
        (received, plan.traffic.received, dest.mesh.ranks),
        (kept, plan.traffic.kept, dest.mesh.ranks),
    ):
        assert [counted[int(rank)] for rank in ranks] == by_rank.tolist()
    for rank in source.mesh.ranks.tolist():
        assert plan.copies(source=rank) == [copy for copy in plan.copies() if copy.source == rank]
    for rank in dest.mesh.ranks.tolist():
        assert plan.copies(dest=rank) == [copy for copy in plan.copies() if copy.dest == rank]


def _dtype(side: Holding, name: str) -> str:
    return next(held.parts[0].whole.dtype for held in side.held if held.name == name)


def _has(held: Mapping[str, np.ndarray], values: np.ndarray) -> bool:
    """Whether a rank has the first of these values; all numbers are different."""
    return any((array == values.flat[0]).any() for array in held.values())


TINY = ModelConfig(
    vocab_size=24,
    hidden_size=8,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    num_experts=8,
    moe_intermediate_size=8,
)


@pytest.mark.parametrize(
    ("trainer", "engine"),
    [
        ({}, {}),
        ({"fsdp": 3}, {"tp": 2}),
        ({"fsdp": 4, "ep": 2, "tp": 2}, {"engines": 2, "tp": 4, "ep": 4, "fuse_qkv": True}),
        ({"fsdp": 2, "ep": 4, "tp": 2, "folded": False}, {"engines": 3, "tp": 2, "ep": 4, "fuse_qkv": True}),
        ({"fsdp": 16, "ep": 2}, {"engines": 2, "tp": 4, "ep": 1}),
    ],
)
def test_a_model_comes_from_trainer_to_engines(trainer: dict[str, int], engine: dict[str, int]) -> None:
    source = trainer_holding(TINY, **trainer)  # type: ignore[arg-type]
    dest = engine_holding(TINY, **engine, first=source.mesh.size)  # type: ignore[arg-type]
    require_right(source, dest)


@pytest.mark.parametrize(("t", "t_g"), [(4, 2), (8, 2), (8, 1)])
def test_hybridflow_stays_in_its_micro_groups_and_keeps_nothing_twice(t: int, t_g: int) -> None:
    """arXiv 2409.19256, section 5.3, train 1-t-2 -> generate 1-t_g-d_g-2. For 1-4-2 -> 1-2-2-2: generation TP groups
    [G1 G3] [G2 G4] [G5 G7] [G6 G8], micro-DP groups of neighbours; a rank receives (t - t_g) / (t_g t) of the model."""
    whole = Whole("w", "<f4", (16, 6))
    d_g = t // t_g
    source = Holding(Mesh({"d": 2, "t": t}), [Held("w", (Part(whole, (Split(0, ("t",)),)),))])
    dest = Holding(Mesh({"d": 2, "t": t_g, "micro": d_g}), [Held("w", (Part(whole, (Split(0, ("t",)),)),))])
    require_right(source, dest)
    plan = make_plan(source, dest)
    pairs = {(c.source, c.dest) for c in plan.copies() if c.source != c.dest}
    assert pairs == {(a, b) for a in range(2 * t) for b in range(2 * t) if a != b and a // d_g == b // d_g}
    model = whole.nbytes
    assert plan.traffic.received.tolist() == [model * (t - t_g) // (t_g * t)] * 2 * t == plan.traffic.sent.tolist()
    assert dest.nbytes().tolist() == [model // t_g] * 2 * t


@st.composite
def layouts(draw: st.DrawFn) -> tuple[Holding, Holding]:
    """Two sides with different meshes, fusings, splits and shards of the same tensors; ranks may be common."""
    num, rows, columns = draw(st.integers(1, 5)), draw(st.integers(1, 6)), draw(st.integers(1, 5))
    dtype = draw(st.sampled_from(["<f4", "bfloat16"]))
    stacks = [Whole(f"s{i}", dtype, (num, rows * 2, columns)) for i in range(draw(st.integers(1, 3)))]
    heads = [Whole(f"h{i}", dtype, (2 * draw(st.integers(1, 4)), columns)) for i in range(draw(st.integers(1, 3)))]

    def side(first: int) -> Holding:
        axes = {name: draw(st.integers(1, 3)) for name in draw(st.permutations(["a", "b", "c"]))}
        mesh = Mesh(axes, first=first)
        free = draw(st.permutations(list(axes)))
        split = Split(draw(st.integers(0, 2)), (free[0],), repeat=draw(st.booleans()))
        shard = (
            [Shard(draw(st.integers(0, 2)), tuple(free[1 : draw(st.integers(1, 3))]))] if draw(st.booleans()) else []
        )
        parts = [Part(whole, (split,)) for whole in stacks]
        held = []
        if draw(st.booleans()):
            held.append(Held("stack", tuple(parts), tuple(shard), fuse=draw(st.integers(0, 2))))
        elif draw(st.booleans()):
            for whole, e in itertools.product(stacks, range(num)):
                box = Box((e, 0, 0), (e + 1, rows * 2, columns))
                held.append(Held(f"{whole.name}.{e}", (Part(whole, (split,), box),), num_dims=2))
        else:
            held += [Held(part.whole.name, (part,), tuple(shard)) for part in parts]
        by_head = Split(0, tuple(free[1:]), grain=2, repeat=True)
        fused = draw(st.booleans())
        groups = [heads] if fused else [[whole] for whole in heads]
        for group in groups:
            stage = draw(st.sampled_from([(), ((free[0], 0),)]))
            held.append(Held("+".join(w.name for w in group), tuple(Part(w, (by_head,)) for w in group), where=stage))
        return Holding(mesh, held)

    source = side(0)
    return source, side(draw(st.sampled_from([0, 1, source.mesh.size])))


@given(layouts())
@settings(max_examples=60, deadline=None)
def test_any_layout_comes_to_any_other(sides: tuple[Holding, Holding]) -> None:
    require_right(*sides)


def test_holders_of_the_same_box_share_the_sending() -> None:
    wholes = [Whole(f"w{i}", "<f4", (4, 4)) for i in range(12)]
    source = Holding(Mesh({"copies": 3}), [Held(w.name, (Part(w),)) for w in wholes])
    for engines in (1, 2, 3, 5, 6):
        dest = Holding(Mesh({"engine": engines}, first=3), [Held(w.name, (Part(w),)) for w in wholes])
        assert make_plan(source, dest).traffic.sent.tolist() == [4 * engines * 64] * 3


def test_both_sides_are_shown_what_differs() -> None:
    def side(*wholes: Whole) -> Holding:
        return Holding(Mesh({}), [Held(w.name, (Part(w),)) for w in wholes])

    a = side(Whole("gate", "<f4", (4, 4)), Whole("down", "<f4", (4, 8)), Whole("bias", "<f4", (4,)))
    b = side(Whole("gate", "<f4", (4, 4)), Whole("down", "bfloat16", (4, 8)), Whole("norm", "<f4", (4,)))
    with pytest.raises(BadWeights) as caught:
        make_plan(a, b)
    text = str(caught.value)
    assert "disagree about 3 tensors" in text
    assert "down: <f4 [4, 8] at the source, bfloat16 [4, 8] at the destination" in text
    assert "bias: <f4 [4] at the source, missing at the destination" in text
    assert "norm: missing at the source, <f4 [4] at the destination" in text
    with pytest.raises(BadWeights, match=r"w: <f4 \[4, 4\] at the source, <f4 \[4, 5\] at the dest"):
        make_plan(side(Whole("w", "<f4", (4, 4))), side(Whole("w", "<f4", (4, 5))))


def test_what_nobody_has_is_refused() -> None:
    whole = Whole("w", "<f4", (8, 4))
    half = Held("w", (Part(whole, box=Box((0, 0), (4, 4))),))
    with pytest.raises(BadWeights, match=r"rank 0 needs .* of w <f4 \[8, 4\].* have 16 of its 32 elements"):
        make_plan(Holding(Mesh({}), [half]), Holding(Mesh({}), [Held("w", (Part(whole),))]))


def test_wrong_layouts_are_refused() -> None:
    a, b = Whole("a", "<f4", (4, 6)), Whole("b", "<f4", (4, 5))
    with pytest.raises(ValueError, match=r"b <f4 \[4, 5\].*can't lie beside a <f4 \[4, 6\].* dimension 0"):
        Holding(Mesh({}), [Held("ab", (Part(a), Part(b)))]).local(0)
    with pytest.raises(ValueError, match="no multiple of the grain 4"):
        Holding(Mesh({"tp": 2}), [Held("a", (Part(a, (Split(1, ("tp",), grain=4),)),))]).local(0)
    with pytest.raises(ValueError, match=r"held twice under one name: \['a'\]"):
        Holding(Mesh({}), [Held("a", (Part(a),)), Held("a", (Part(a),))])
    with pytest.raises(ValueError, match="a is said to be"):
        Holding(Mesh({}), [Held("a", (Part(a),)), Held("c", (Part(Whole("a", "<f4", (9, 6))),))])
    with pytest.raises(ValueError, match=r"must be different ones of \['tp'\]"):
        Mesh({"tp": 2}).extent(("ep",))
    with pytest.raises(ValueError, match="tp must divide num_heads, got tp 3"):
        engine_holding(TINY, tp=3)
    with pytest.raises(ValueError, match="ep must divide fsdp"):
        trainer_holding(TINY, fsdp=3, ep=2)


def test_digests_are_equal_only_for_equal_layouts() -> None:
    def digest(**sizes: int) -> str:
        return make_plan(trainer_holding(TINY, fsdp=2), engine_holding(TINY, first=2, **sizes)).digest

    assert digest(tp=2) == digest(tp=2)
    assert len({digest(tp=2), digest(ep=2), digest(tp=2, ep=2), digest(tp=2, engines=2)}) == 4


@given(
    st.lists(st.lists(st.integers(1, 9), min_size=3, max_size=3), min_size=1, max_size=5),
    st.lists(st.integers(1, 60), min_size=5, max_size=5),
)
def test_cut_gives_each_element_once_and_in_order(shapes: list[list[int]], limits: list[int]) -> None:
    limit = np.array(limits[: len(shapes)])
    row, start, stop = cut(np.array(shapes), limit)
    assert (np.diff(row) >= 0).all()
    for index, shape in enumerate(shapes):
        numbers = np.arange(np.prod(shape)).reshape(shape)
        pieces = [
            numbers[Box(tuple(a), tuple(b)).slices]
            for a, b in zip(start[row == index], stop[row == index], strict=True)
        ]
        assert all(0 < piece.size <= limit[index] for piece in pieces)
        assert np.concatenate([piece.ravel() for piece in pieces]).tolist() == numbers.ravel().tolist()


@pytest.mark.parametrize("shares", [1, 2, 3, 5, 8])
def test_chunk_is_torch_chunk(shares: int) -> None:
    torch = pytest.importorskip("torch")
    for length in range(1, 12):
        start, stop = chunk(length, np.arange(shares), shares)
        sizes = [len(piece) for piece in torch.arange(length).chunk(shares)]
        assert (stop - start).tolist() == sizes + [0] * (shares - len(sizes))
