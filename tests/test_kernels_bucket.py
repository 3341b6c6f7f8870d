"""Weight buckets: what goes in comes out, the checksum sees a change, and the kernels make the reference's bytes."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import plant
from shim import KernelFault, ShimBackend, needs_shim
from torch import Tensor

from headrace.kernels import bucket, launch, reference
from headrace.kernels.bucket import Plan, pack_weights, plan_bucket, unpack_weights

F32, BF16, U8, E4M3 = torch.float32, torch.bfloat16, torch.uint8, torch.float8_e4m3fn
CASTS = [(F32, F32), (BF16, BF16), (U8, U8), (torch.int64, torch.int64), (F32, BF16), (F32, E4M3), (BF16, E4M3)]
"""dtype of the tensor, in the bucket"""

Packable = tuple[list[Tensor], Plan, list[Tensor | None]]


STRANGER = 77
NUM_STRANGERS = 16


def among_others(x: Tensor) -> Tensor:
    """The same numbers with others right behind them: kernels find tensors by address, where no guard page is."""
    room = torch.full((x.numel() + NUM_STRANGERS,), STRANGER, dtype=x.dtype)
    room[: x.numel()] = x.flatten()
    return room[: x.numel()].view(x.shape)


def others_untouched(x: Tensor) -> bool:
    assert x._base is not None
    return bool((x._base.flatten()[x.numel() :] == STRANGER).all())


class Case(NamedTuple):
    seed: int
    parts: list[tuple[list[int], tuple[torch.dtype, torch.dtype]]]
    """Shape and cast of each tensor"""

    def make(self) -> Packable:
        random = torch.Generator().manual_seed(self.seed)
        tensors: list[Tensor] = []
        scales: list[Tensor | None] = []
        for shape, (dtype, inside) in self.parts:
            x = 100 * torch.randn(shape, generator=random)
            tensors.append(among_others((x.abs() if dtype == U8 else x).to(dtype)))
            rows = x.numel() // max(shape[-1] if shape else 1, 1)
            scales.append(torch.rand(rows, generator=random) + 0.1 if dtype != inside and inside == E4M3 else None)
        return tensors, plan_bucket(tensors, [inside for _, (_, inside) in self.parts]), scales


cases = st.builds(
    Case,
    seed=st.integers(0, 10**6),
    parts=st.lists(
        st.tuples(
            st.lists(st.sampled_from([0, 1, 2, 3, 5, 16, 33]), max_size=3),
            st.sampled_from(CASTS),
        ),
        max_size=6,
    ),
)


def checksum_by_hand(data: bytes) -> int:
    """As the docstring of reference.checksum says, with Python's integers."""

    def mix(index: int) -> int:
        z = (index + 1) * 0x9E3779B97F4A7C15 % 2**64
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        return z ^ z >> 31 | 1

    words = np.frombuffer(data, "<u4").tolist()
    return (sum(word * mix(i) for i, word in enumerate(words)) + mix(-1 - len(data))) % 2**64


@given(cases)
def test_a_bucket_holds_every_tensor_in_its_place(case: Case) -> None:
    tensors, plan, scales = case.make()
    packed, checksum = pack_weights(tensors, plan, scales)
    data, seen = packed.numpy().tobytes(), 0
    for tensor, place, scale in zip(tensors, plan.places, scales, strict=True):
        assert place.offset % 16 == 0 and place.offset >= seen
        assert not any(data[seen : place.offset])
        seen = place.offset + place.num_bytes
        values = tensor.to(torch.float64).numpy()
        if scale is not None and tensor.numel():
            inverse = np.float32(1) / scale.numpy().reshape((*tensor.shape[:-1], 1) if tensor.ndim else ())
            values = np.clip(values.astype(np.float32) * inverse, -448, 448)
        kinds = {BF16: ml_dtypes.bfloat16, E4M3: ml_dtypes.float8_e4m3fn, F32: np.float32, U8: np.uint8}
        assert data[place.offset : seen] == values.astype(kinds.get(place.dtype, np.int64)).tobytes()
    assert not any(data[seen:])
    assert checksum.item() % 2**64 == checksum_by_hand(data)


@given(cases)
def test_what_comes_out_is_what_went_in_up_to_the_cast(case: Case) -> None:
    tensors, plan, scales = case.make()
    packed, checksum = pack_weights(tensors, plan, scales)
    copies = [torch.full_like(tensor, 7) for tensor in tensors]
    assert torch.equal(unpack_weights(packed, plan, copies, scales), checksum)
    for tensor, place, scale, copy in zip(tensors, plan.places, scales, copies, strict=True):
        wanted = tensor.to(place.dtype).to(tensor.dtype)
        if scale is not None and tensor.numel():
            by_row = scale.reshape(*tensor.shape[:-1], 1) if tensor.ndim else scale.reshape(())
            codes = (tensor.float() * (1 / by_row)).clamp(-448, 448).to(E4M3)
            wanted = (codes.float() * by_row).to(tensor.dtype)
        assert torch.equal(copy, wanted)


@given(st.integers(1, 40), st.data())
def test_the_checksum_sees_a_change_and_a_swap(units: int, data: st.DataObject) -> None:
    original = torch.randint(0, 256, (16 * units,), dtype=U8, generator=torch.Generator().manual_seed(units))
    before = reference.checksum(original)
    changed = original.clone()
    at = data.draw(st.integers(0, 16 * units - 1))
    changed[at] ^= 1 << data.draw(st.integers(0, 7))
    assert reference.checksum(changed) != before
    words = original.view(torch.int32).clone()
    a, b = (data.draw(st.integers(0, 4 * units - 1)) for _ in range(2))
    words[[a, b]] = words[[b, a]]
    assert (reference.checksum(words.view(U8)) != before).item() == (not torch.equal(words, original.view(torch.int32)))
    longer = torch.cat([original, torch.zeros(16, dtype=U8)])
    assert reference.checksum(longer) != before


@needs_shim
@pytest.mark.slow
@pytest.mark.parametrize("config", bucket.PACK.configs)
def test_the_kernels_are_the_reference_to_the_bit(config: launch.Config) -> None:
    @settings(max_examples=350, database=None)
    @given(cases, st.integers(0, 5))
    def check(case: Case, schedule: int) -> None:
        check_against_reference(case, schedule, config)

    check()


def check_against_reference(case: Case, schedule: int, config: launch.Config) -> None:
    tensors, plan, scales = case.make()
    packed, checksum = pack_weights(tensors, plan, scales)
    copies, found = ([among_others(torch.full_like(tensor, 7)) for tensor in tensors] for _ in range(2))
    unpack_weights(packed, plan, copies, scales)
    with launch.backend(ShimBackend(schedule)), launch.picking(lambda spec, _: config):
        like = torch.empty(plan.num_bytes, dtype=U8)
        mine, my_checksum = pack_weights(tensors, plan, scales, out=like)
        read = unpack_weights(mine, plan, found, scales)
    assert torch.equal(mine, packed)
    assert checksum == my_checksum == read
    assert all(torch.equal(a, b) for a, b in zip(found, copies, strict=True))
    assert all(map(others_untouched, found))


@needs_shim
def test_many_blocks() -> None:
    parts = [([300, 40], (F32, BF16)), ([7], (U8, U8)), ([100, 333], (F32, E4M3)), ([50_001], (BF16, BF16))]
    tensors, plan, scales = Case(5, parts).make()
    packed, checksum = pack_weights(tensors, plan, scales)
    for schedule in (1, 2, 3):
        with launch.backend(ShimBackend(schedule)):
            mine, my_checksum = pack_weights(tensors, plan, scales)
        assert torch.equal(mine, packed) and checksum == my_checksum


@needs_shim
def test_offsets_have_64_bits() -> None:
    tensor = torch.empty(2**31 + 100, dtype=U8)
    tensor[-100:] = torch.arange(100)
    plan = plan_bucket([tensor])
    with launch.backend(ShimBackend(1, only_blocks=lambda num: [num - 1])):
        packed, _ = pack_weights([tensor], plan)
    assert torch.equal(packed[2**31 : 2**31 + 100], tensor[-100:]) and not packed[2**31 + 100 :].any()


def test_out_is_filled_and_tensors_are_found_again_after_they_have_moved() -> None:
    tensors = [torch.ones(5), torch.zeros(3)]
    plan = plan_bucket(tensors)
    out = torch.full((plan.num_bytes,), 9, dtype=U8)
    packed, _ = pack_weights(tensors, plan, out=out)
    assert packed is out and packed[:20].view(F32).tolist() == [1.0] * 5
    again, _ = pack_weights([torch.full((5,), 2.0), tensors[1]], plan)
    assert again[:20].view(F32).tolist() == [2.0] * 5


FAULTS = [
    ("unsigned words[4] = {0, 0, 0, 0};", "unsigned words[4];"),  # gaps are not zero
    ("first + PER <= entry.elements", "first < entry.elements"),  # a vector past the end
    ("mix(4 * unit + i)", "mix(unit + i)"),
    (
        "for (int half = BLOCK / 2; half > 0; half /= 2) {\n    __syncthreads();",
        "for (int half = BLOCK / 2; half > 0; half /= 2) {",
    ),
]


@needs_shim
@pytest.mark.parametrize("fault", FAULTS, ids=range(len(FAULTS)))
def test_a_planted_fault_is_seen(fault: tuple[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plant(monkeypatch, tmp_path, bucket, "pack.cu", *fault)
    parts = [([5, 33], (F32, E4M3)), ([3], (U8, U8)), ([1200], (F32, BF16)), ([2000], (F32, F32))]
    tensors, plan, scales = Case(5, parts).make()
    packed, checksum = pack_weights(tensors, plan, scales)
    with pytest.raises((AssertionError, KernelFault)):
        for schedule in range(6):
            with launch.backend(ShimBackend(schedule)):
                mine, my_checksum = pack_weights(tensors, plan, scales)
            assert torch.equal(mine, packed) and checksum == my_checksum


X = torch.ones(4, 8)
PLAN = plan_bucket([X], [E4M3])


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        (lambda: plan_bucket([X], [torch.float16]), "tensor 0 can't go from torch.float32 to torch.float16"),
        (lambda: plan_bucket([X, X], [None]), "2 tensors, but 1 dtypes"),
        (lambda: pack_weights([X], PLAN), "and needs scales for its rows"),
        (lambda: pack_weights([X], PLAN, [torch.ones(3)]), r"scales of tensor 0 must have the shape \[4\]"),
        (lambda: pack_weights([X], plan_bucket([X]), [torch.ones(4)]), "and takes no scales"),
        (lambda: pack_weights([X, X], PLAN), "the plan has 1 places, but there are 2 tensors"),
        (lambda: pack_weights([X[:3]], PLAN, [torch.ones(3)]), r"tensor 0 must have the shape \[4, 8\]"),
        (lambda: pack_weights([torch.ones(8, 4).t()], PLAN, [torch.ones(4)]), "tensor 0 must be contiguous"),
        (lambda: unpack_weights(torch.zeros(16, dtype=U8), PLAN, [X], [torch.ones(4)]), r"bucket must have the shape"),
        (lambda: unpack_weights(torch.zeros(32), PLAN, [X], [torch.ones(4)]), "bucket must be uint8"),
    ],
)
def test_bad_input_is_refused(call, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        call()
