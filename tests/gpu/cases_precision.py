"""Cases of kernels/precision.py, kernels/gemv.py and kernels/bucket.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from case import Case
from torch import Tensor

from headrace.kernels import bucket, gemv, precision, reference
from headrace.kernels.reference.precision import Block

E4M3 = torch.float8_e4m3fn
SPECS = {"row": precision.ROW, "1x128": precision.GROUP, "128x128": precision.TILE}


def _matrix(size: tuple[int, int], random: torch.Generator) -> tuple[Tensor]:
    """bf16, rows of very different sizes."""
    x = torch.randn(size, generator=random, device=random.device)
    return ((x * torch.exp(2 * torch.randn(size[0], 1, generator=random, device=random.device))).bfloat16(),)


def _amax_div_cast(block: Block) -> Callable[[Tensor], Any]:
    def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
        tall, wide = {"row": (1, x.shape[1]), "1x128": (1, 128), "128x128": (128, 128)}[block]
        if x.shape[0] % tall or x.shape[1] % wide:
            return reference.fp8_quant(x, block)[:2]
        tiles = x.unflatten(1, (-1, wide)).unflatten(0, (-1, tall)).float()
        scales = tiles.abs().amax((1, 3), keepdim=True) / 448
        codes = (tiles / scales).clamp(-448, 448).to(E4M3)
        return codes.flatten(2, 3).flatten(0, 1), scales.squeeze(3).squeeze(1)

    return quantize


def _layer(size: tuple[int, int], random: torch.Generator) -> tuple[Tensor, Tensor]:
    w = torch.randn(size, generator=random, device=random.device)
    return w, torch.rand(size[1], generator=random, device=random.device)


def _search_in_torch(w: Tensor, moment: Tensor) -> tuple[Tensor, Tensor]:
    """The search as one would write it."""
    widest = w.abs().amax(1, keepdim=True) / 448
    best, scale = torch.full_like(widest, torch.inf), widest
    for candidate in range(33):
        now = widest * (1 - candidate / 64)
        error = (moment * (w - (w / now).clamp(-448, 448).to(E4M3).float() * now).square()).sum(1, keepdim=True)
        scale, best = torch.where(error < best, now, scale), torch.minimum(error, best)
    q = (w / scale).clamp(-448, 448).to(E4M3).float()
    return q.to(E4M3), (moment * w * q).sum(1, keepdim=True) / (moment * q * q).sum(1, keepdim=True)


def _decode(size: tuple[int, int, int, int], random: torch.Generator) -> tuple[Tensor, ...]:
    """Rows of each expert, experts, features, columns; bf16."""
    rows, experts, features, columns = size
    x = torch.randn(rows * experts, columns, generator=random, device=random.device).bfloat16()
    ends = (rows * torch.arange(1, experts + 1, device=random.device)).int()
    w = 0.05 * torch.randn(experts, features, columns, generator=random, device=random.device)
    return x, ends, w.bfloat16()


def _decode_fp8(size: tuple[int, int, int, int], random: torch.Generator) -> tuple[Tensor, ...]:
    x, ends, w = _decode(size, random)
    codes, scales, _ = reference.fp8_quant(w.flatten(0, 1), "row")
    return x, ends, codes.view(w.shape), scales.reshape(w.shape[:2]).contiguous()


def _by_expert(x: Tensor, ends: Tensor, w: Tensor, scales: Tensor | None = None) -> Tensor:
    """In float64."""
    weights = w.double() if scales is None else w.double() * scales.double().unsqueeze(2)
    parts = torch.diff(ends.long(), prepend=ends.new_zeros(1).long()).tolist()
    return torch.cat([rows.double() @ m.t() for rows, m in zip(x.split(parts), weights, strict=True)])


def _loads(x: Tensor, ends: Tensor, *_: Tensor) -> Sequence[int]:
    return torch.diff(ends.long(), prepend=ends.new_zeros(1).long()).tolist()


def _weights(size: tuple[int, int], random: torch.Generator) -> tuple[Tensor, ...]:
    """So many matrices of so many columns, fp32, and a small odd one behind each."""
    num, columns = size
    shapes = [shape for _ in range(num) for shape in ((columns, columns), (columns + 1,))]
    return tuple(torch.randn(shape, generator=random, device=random.device) for shape in shapes)


def _pack(*tensors: Tensor) -> tuple[Tensor, Tensor]:
    return bucket.pack_weights(tensors, bucket.plan_bucket(tensors, [torch.bfloat16] * len(tensors)))


def _pack_plain(*tensors: Tensor) -> tuple[Tensor, Tensor]:
    plan = bucket.plan_bucket(tensors, [torch.bfloat16] * len(tensors))
    return reference.pack_weights(tensors, plan, [None] * len(tensors))


def _round_trip(*tensors: Tensor) -> tuple[Tensor, ...]:
    plan = bucket.plan_bucket(tensors, [torch.bfloat16] * len(tensors))
    packed, sent = bucket.pack_weights(tensors, plan)
    copies = [torch.empty_like(tensor) for tensor in tensors]
    return (sent - bucket.unpack_weights(packed, plan, copies), *copies)


def cases() -> Iterator[Case]:
    for block in precision.BLOCKS:
        yield Case(
            name=f"fp8_quant {block}",
            small=((0, 128), (3, 200), (130, 256)),
            large=(65_536, 2048),
            make=_matrix,
            run=lambda x, block=block: precision.fp8_quant(x, block),
            exact=lambda x, block=block: reference.fp8_quant(x, block),
            eager=_amax_div_cast(block),
            moved_bytes=lambda x: x.nbytes + x.numel(),
            bars={"copy": 0.8, "eager": 3.0, "compiled": 1.1},
            spec=SPECS[block],
            tuned=tuple((1 << n, 2048) for n in range(4, 16, 2)),
        )
    yield Case(
        name="range_search",
        small=((3, 50), (4, 256)),
        large=(8192, 4096),
        make=_layer,
        run=precision.range_search,
        exact=reference.range_search,
        eager=_search_in_torch,
        moved_bytes=lambda w, _: w.nbytes + w.numel(),
        spec=precision.SEARCH,
        tuned=((768, 2048), (2048, 768)),
    )
    yield Case(
        name="moe_gemv bf16",
        small=((1, 3, 16, 64), (8, 2, 8, 128), (0, 2, 8, 64)),
        large=(2, 128, 1536, 2048),
        make=_decode,
        run=gemv.moe_gemv,
        exact=_by_expert,
        rtol=2.0**-8,
        atol=1e-3,
        eager=lambda x, ends, w: torch.nn.functional.grouped_mm(x, w.mT, offs=ends),
        moved_bytes=lambda x, ends, w: w.nbytes,
        bars={"eager": 2.0},
        spec=gemv.GEMV,
        tuned=tuple((rows, 128, 1536, 2048) for rows in (1, 4, 8)),
        load=_loads,
    )
    yield Case(
        name="moe_gemv fp8",
        small=((1, 3, 16, 64), (8, 2, 8, 128)),
        large=(2, 128, 1536, 2048),
        make=_decode_fp8,
        run=gemv.moe_gemv,
        exact=_by_expert,
        rtol=2.0**-8,
        atol=1e-3,
        moved_bytes=lambda x, ends, w, scales: w.nbytes,
        spec=gemv.GEMV,
        load=_loads,
    )
    yield Case(
        name="pack_weights",
        small=((2, 5), (1, 130)),
        large=(16, 4096),
        make=_weights,
        run=_pack,
        exact=_pack_plain,
        eager=lambda *tensors: torch.cat([tensor.bfloat16().flatten() for tensor in tensors]),
        moved_bytes=lambda *tensors: sum(tensor.nbytes * 3 // 2 for tensor in tensors),
        bars={"copy": 0.85, "eager": 1.0},
        spec=bucket.PACK,
    )
    yield Case(
        name="pack and unpack",
        small=((2, 5), (1, 130)),
        large=(16, 4096),
        make=_weights,
        run=_round_trip,
        exact=lambda *tensors: (
            torch.zeros(1, dtype=torch.int64, device=tensors[0].device),
            *(tensor.bfloat16().float() for tensor in tensors),
        ),
        moved_bytes=lambda *tensors: sum(tensor.nbytes * 3 for tensor in tensors),
        spec=bucket.UNPACK,
    )
