"""Pairs sorted by expert: plain loops against plain torch, and the kernels of align.cu against both."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from shim import KernelFault, ShimBackend, needs_shim
from torch import Tensor

from headrace.kernels import reference, routing, statistics
from headrace.kernels.build import SOURCES
from headrace.kernels.launch import KernelSpec, backend, launch, picking
from headrace.kernels.reference import Rows

INDICES = [torch.int32, torch.int64]


def ids_of(seed: int, tokens: int, k: int, experts: int, kind: str, dtype: torch.dtype) -> Tensor:
    random = np.random.default_rng(seed)
    if kind == "one":
        ids = np.full((tokens, k), random.integers(experts))
    elif kind == "skewed":
        ids = np.minimum(random.geometric(0.3, (tokens, k)) - 1, experts - 1)
    elif kind == "dropped":
        ids = random.integers(-3, experts + 3, (tokens, k))
    else:
        ids = random.integers(experts, size=(tokens, k))
    return torch.from_numpy(ids).to(dtype)


@st.composite
def cases(draw: st.DrawFn, max_tokens: int, max_experts: int) -> tuple[Tensor, int, int, int]:
    """Ids, experts, tile, seed of the schedule."""
    experts = draw(st.integers(1, max_experts))
    tokens, k = draw(st.integers(0, max_tokens)), draw(st.integers(1, 4))
    kind = draw(st.sampled_from(["even", "one", "skewed", "dropped"]))
    ids = ids_of(draw(st.integers(0, 2**32)), tokens, k, experts, kind, draw(st.sampled_from(INDICES)))
    return ids, experts, draw(st.sampled_from([1, 1, 4, 7, 16])), draw(st.integers(0, 2**32))


def by_hand(ids: Tensor, experts: int, tile: int) -> Rows:
    flat = ids.flatten().tolist()
    members: list[list[int]] = [[] for _ in range(experts)]
    for pair, expert in enumerate(flat):
        if 0 <= expert < experts:
            members[expert].append(pair)
    pairs: list[int] = []
    ends, tiles, rows = [], [], [-1] * len(flat)
    for expert, mine in enumerate(members):
        for pair in mine:
            rows[pair] = len(pairs)
            pairs.append(pair)
        pairs += [-1] * (-len(mine) % tile)
        tiles += [expert] * (-(-len(mine) // tile))
        ends.append(len(pairs))
    size = routing.num_rows(len(flat), experts, tile)
    assert len(pairs) <= size and size % tile == 0
    pairs += [-1] * (size - len(pairs))
    tiles += [-1] * (size // tile - len(tiles))
    return Rows(
        torch.tensor(pairs, dtype=ids.dtype),
        torch.tensor([len(mine) for mine in members], dtype=ids.dtype),
        torch.tensor(ends, dtype=torch.int32),
        torch.tensor(rows, dtype=ids.dtype),
        torch.tensor(tiles, dtype=torch.int32) if tile > 1 else None,
    )


def assert_same(got: Rows, wanted: Rows) -> None:
    for name, mine, theirs in zip(Rows._fields, got, wanted, strict=True):
        if theirs is None:
            assert mine is None, name
        else:
            assert mine is not None and mine.dtype == theirs.dtype and torch.equal(mine, theirs), name


@given(cases(40, 9))
def test_plain_torch_does_what_loops_do(case):
    ids, experts, tile, _ = case
    assert_same(reference.align(ids, experts, tile=tile, may_drop=True), by_hand(ids, experts, tile))
    assert_same(routing.align(ids, experts, tile=tile), by_hand(ids, experts, tile))
    assert torch.equal(routing.expert_load(ids, experts), by_hand(ids, experts, 1).load_E)
    if ids.numel() and 0 <= ids.min() and ids.max() < experts:
        assert_same(
            reference.align(ids, experts)._replace(rows_P=by_hand(ids, experts, 1).rows_P), by_hand(ids, experts, 1)
        )


@needs_shim
@settings(max_examples=1000)
@given(cases(80, 20))
@example((torch.zeros(0, 2, dtype=torch.int32), 1, 1, 1))
@example((torch.full((70, 3), -1, dtype=torch.int64), 5, 4, 1))
def test_one_block(case):
    ids, experts, tile, seed = case
    shim = ShimBackend(seed)
    with backend(shim), picking(lambda spec, _: spec.configs[2]):
        assert_same(routing.align(ids, experts, tile=tile), by_hand(ids, experts, tile))
    assert shim.launches == ["align_small"]


@needs_shim
@settings(max_examples=1000)
@given(cases(80, 12), st.integers(0, 9))
@example((torch.zeros(0, 2, dtype=torch.int32), 3, 1, 1), 0)
@example((torch.zeros(300, 1, dtype=torch.int64), 2, 4, 5), 0)
def test_many_blocks(case, tiny):
    """One warp and 32 pairs a block, so that few pairs make many chunks and blocks; now and then the real sizes."""
    ids, experts, tile, seed = case
    config = {"BLOCK": 32, "ITEMS": 1} if tiny else routing.COUNT.configs[2]
    rows = Rows(*(torch.full_like(part, -9) if part is not None else None for part in by_hand(ids, experts, tile)))
    with backend(ShimBackend(seed)), picking(lambda spec, _: config):
        routing._align_by_many(ids, rows, tile)
        assert_same(rows, by_hand(ids, experts, tile))
        assert torch.equal(routing.expert_load(ids, experts), rows.load_E)


@needs_shim
@pytest.mark.parametrize("dtype", INDICES)
@pytest.mark.parametrize("spec", [routing.COUNT, routing.SMALL], ids=lambda spec: spec.name)
def test_every_configuration_gives_the_same_on_three_schedules(dtype, spec, monkeypatch):
    monkeypatch.setattr(routing, "SMALL_PAIRS", 10**6 if spec is routing.SMALL else -1)
    for config in spec.configs:
        for tokens, experts, tile in ((1037, 129, 64), (700, 1, 1)):
            ids = ids_of(7, tokens, 8, experts, "skewed", dtype)
            for seed in (0, 1, 2):
                with backend(ShimBackend(seed)), picking(lambda _, __, config=config: config):
                    assert_same(
                        routing.align(ids, experts, tile=tile), reference.align(ids, experts, tile=tile, may_drop=True)
                    )


@needs_shim
def test_the_order_is_the_same_in_a_hundred_runs():
    ids = ids_of(3, 200, 4, 6, "skewed", torch.int32)
    seen = set()
    for seed in range(100):
        with backend(ShimBackend(seed)), picking(lambda *_: {"BLOCK": 64, "ITEMS": 2}):
            rows = reference.align(ids, 6, may_drop=True)
            routing._align_by_many(ids, rows, 1)
        seen.add(tuple(rows.pairs_N.tolist()))
    assert seen == {tuple(by_hand(ids, 6, 1).pairs_N.tolist())}


@needs_shim
def test_most_experts_and_the_choice_of_the_path():
    ids = ids_of(5, 900, 2, 4096, "even", torch.int32)
    for experts, names in (
        (4096, ["align_count", "align_scan", "align_offsets", "align_scatter"]),
        (1024, ["align_small"]),
    ):
        shim = ShimBackend()
        with backend(shim), picking(lambda spec, _: {**spec.configs[-1], "ITEMS": 32}):
            assert_same(routing.align(ids, experts, tile=2), by_hand(ids, experts, 2))
        assert shim.launches == names


@needs_shim
@pytest.mark.parametrize("num_pairs", [2**29 - 77, 2**31 - 1])
def test_the_last_pairs_of_very_many(num_pairs):
    """Ids, pairs and rows have 2**31 bytes and more; only the last block runs, so hardly any of that is touched."""
    try:
        ids, pairs, rows = (torch.empty(num_pairs, dtype=torch.int32) for _ in range(3))
    except RuntimeError as error:
        pytest.skip(f"no such memory: {error}")
    ids[-5000:-500] = -1
    ids[-500:] = torch.arange(500) % 2
    starts = torch.tensor([num_pairs - 500, num_pairs - 250], dtype=torch.int32)
    config = routing.COUNT.configs[-1]
    counts = torch.full((2, -(-num_pairs // (32 * config["ITEMS"]))), -9, dtype=torch.int32)
    common = {
        "device_of": ids,
        "config": config,
        "variant": {"INDEX": "int"},
        "shared_bytes": routing._counters(2, config),
    }
    with backend(ShimBackend(1, only_blocks=lambda blocks: [blocks - 1])):
        grid = routing._blocks(num_pairs, config), config["BLOCK"]
        launch(routing.COUNT, *grid, (ids, counts, num_pairs, 2), **common)
        written = counts[:, counts[0] >= 0]
        assert written.sum(1).tolist() == [250, 250] and written.shape[1] <= config["BLOCK"] // 32
        counts.zero_()
        counts[:, -written.shape[1] :] = written.cumsum(1) - written
        launch(routing.SCATTER, *grid, (ids, counts, starts, pairs, rows, num_pairs, 2), **common)
    expected = [num_pairs - 500 + i // 2 + 250 * (i % 2) for i in range(500)]
    assert rows[-500:].tolist() == expected
    assert [pairs[row].item() for row in expected] == list(range(num_pairs - 500, num_pairs))


PLANTED = {
    "the counts are not zeroed": ("shared[i] = 0;", ";", "align_count"),
    "warps share their counters": ("shared + warp * experts);", "shared);", "align_count"),
    "no barrier after counting": (
        "experts, shared + warp * experts);\n  __syncthreads();",
        "experts, shared + warp * experts);",
        "",
    ),
    "every lane adds its group": ("&& lane == __ffs(same) - 1", "", ""),
    "rank counts the later lanes": ("((1u << lane) - 1)", "~((2u << lane) - 1)", ""),
    "no warp barrier before the update": (": 0;\n    __syncwarp();", ": 0;", ""),
    "the last chunk is not cut": ("pair < end ? ids[pair] : Index(-1)", "ids[pair]", ""),
    "no padding": ("pairs[row] = -1;\n    if", ";\n    if", ""),
    "carry is forgotten": ("carry += total;\n  }\n  if", "}\n  if", ""),
}


@needs_shim
@pytest.mark.parametrize("fault", PLANTED)
def test_planted_faults_are_seen(fault, tmp_path, monkeypatch):
    """Each fault, in a copy of align.cu, changes a result or is reported, on one of six schedules."""
    old, new, _ = PLANTED[fault]
    text = (SOURCES / "align.cu").read_text()
    assert old in text
    copy = tmp_path / "align.cu"
    copy.write_text(text.replace(old, new).replace('"common.cuh"', f'"{SOURCES}/common.cuh"'))
    for name in ("COUNT", "SCAN", "OFFSETS", "SCATTER"):
        monkeypatch.setattr(routing, name, KernelSpec(source=str(copy), name=getattr(routing, name).name))
    ids = ids_of(1, 101, 3, 5, "skewed", torch.int32)

    def right(seed: int) -> bool:
        rows = Rows(*(torch.full_like(part, -9) if part is not None else None for part in by_hand(ids, 5, 4)))
        with backend(ShimBackend(seed)), picking(lambda *_: {"BLOCK": 64, "ITEMS": 1}):
            try:
                routing._align_by_many(ids, rows, 4)
            except KernelFault:
                return False
        return all(torch.equal(a, b) for a, b in zip(rows, by_hand(ids, 5, 4), strict=True) if a is not None)

    assert not all(right(seed) for seed in range(6))


@pytest.mark.parametrize(
    ("ids", "experts", "tile", "message"),
    [
        (torch.zeros(2, 2), 4, 1, "align: ids_TK must be int32 or int64, not float32"),
        (torch.zeros(2, 2, dtype=torch.int16), 4, 1, "not int16"),
        (torch.zeros(4, dtype=torch.int64), 4, 1, r"ids_TK must have the shape \[any, any\], not \[4\]"),
        (torch.zeros(2, 3, dtype=torch.int64).t(), 4, 1, "use .contiguous()"),
        (torch.zeros(2, 2, dtype=torch.int64), 0, 1, "E must be from 1 to 4096, not 0"),
        (torch.zeros(2, 2, dtype=torch.int64), 4097, 1, "not 4097"),
        (torch.zeros(2, 2, dtype=torch.int64), 4, 0, "tile must be from 1 to 1024, not 0"),
        (torch.zeros(1, 1, dtype=torch.int32).expand(2**28, 8), 4, 1, r"T \* K must be from 0 to 2147483647"),
    ],
)
def test_bad_input_is_refused_before_any_launch(ids, experts, tile, message):
    with backend(ShimBackend()), pytest.raises(ValueError, match=message):
        routing.align(ids, experts, tile=tile)


@needs_shim
@settings(max_examples=1000)
@given(st.integers(0, 300), st.integers(1, 40), st.sampled_from([torch.float32, torch.bfloat16]), st.integers(0, 2**32))
def test_prob_sum(tokens, experts, dtype, seed):
    probs = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()
    with backend(ShimBackend(seed)):
        total = statistics.prob_sum(probs)
        total.backward(torch.arange(1.0, experts + 1))
    assert total.dtype == torch.float32
    torch.testing.assert_close(total.double(), probs.detach().double().sum(0), rtol=1e-5, atol=1e-6)
    assert torch.equal(probs.grad, torch.arange(1.0, experts + 1).to(dtype).expand(tokens, experts))
    torch.testing.assert_close(statistics.prob_sum(probs.detach()), total.detach())


@needs_shim
@settings(max_examples=1000)
@given(
    st.integers(0, 5), st.integers(1, 60), st.sampled_from(INDICES), st.floats(0, 1, width=32), st.integers(0, 2**32)
)
def test_load_ema(layers, experts, dtype, decay, seed):
    random = torch.Generator().manual_seed(seed)
    ema = torch.rand(layers, experts, generator=random) * 100
    counts = torch.randint(0, 10**6, (layers, experts), generator=random).to(dtype)
    wanted = (decay * ema.double() + (1 - decay) * counts).float()
    plain, by_kernel = ema.clone(), ema.clone()
    assert statistics.load_ema_(plain, counts, decay) is plain
    with backend(ShimBackend(seed)):
        assert statistics.load_ema_(by_kernel, counts, decay) is by_kernel
    torch.testing.assert_close(plain, wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(by_kernel, plain)


def test_bad_statistics_are_refused():
    ema, counts = torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.int64)
    for bad, message in (
        ((ema, counts, 1.5), "decay must be from 0 to 1"),
        ((ema, counts.float(), 0.5), "int32 or int64"),
        ((ema, counts[:1], 0.5), "shape"),
        ((ema.double(), counts, 0.5), "float32"),
    ):
        with pytest.raises(ValueError, match=message):
            statistics.load_ema_(*bad)
    with pytest.raises(ValueError, match="float32 or bfloat16, not float64"):
        statistics.prob_sum(torch.zeros(2, 3, dtype=torch.float64))
    assert Path(SOURCES / "expert_load.cu").read_text().count(f"ROWS = {statistics._ROWS};") == 1
