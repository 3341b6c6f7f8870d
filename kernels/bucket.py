"""Weight buckets (K15): many tensors into one flat run of bytes and back, in one launch, with cast and checksum.

    plan = plan_bucket(tensors, dtypes)            once
    bucket, sum = pack_weights(tensors, plan)      the sender, each time
    same = unpack_weights(bucket, plan, copies)    the receiver; equal sums: it arrived as it was sent

Nothing is read back from the GPU: a checksum is a tensor there, to be sent beside the bucket and compared. The table of
addresses is made once for each set of tensors, so that a repeated call can be captured in a CUDA graph. The meaning is
reference/bucket.py; cuda/pack.cu computes it on a GPU, to the bit.
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from . import launch, reference
from .checks import require, require_contiguous, require_device, require_dtype, require_shape
from .launch import KernelSpec
from .reference.bucket import UNIT_BYTES
from .reference.bucket import Place as Place
from .reference.bucket import Plan as Plan

_CONFIGS = ({"BLOCK": 256, "UNITS": 4}, {"BLOCK": 256, "UNITS": 8}, {"BLOCK": 128, "UNITS": 4})
PACK = KernelSpec(source="pack.cu", name="pack", configs=_CONFIGS)
UNPACK = KernelSpec(source="pack.cu", name="unpack", configs=_CONFIGS)
TOTAL = KernelSpec(source="pack.cu", name="pack_total", configs=_CONFIGS[:1])
SPECS: tuple[KernelSpec, ...] = (PACK, UNPACK, TOTAL)

_KINDS = {
    (torch.float32, torch.bfloat16): 1,
    (torch.float32, torch.float8_e4m3fn): 2,
    (torch.bfloat16, torch.float8_e4m3fn): 3,
}
"""(dtype of the tensor, dtype in the bucket) -> kind in the table; equal dtypes are 0."""

_Key = tuple[tuple[int, int | None, int], ...]
_tables: OrderedDict[tuple[torch.device, Plan, _Key], Tensor] = OrderedDict()
_MAX_TABLES = 64


def plan_bucket(tensors: Sequence[Tensor], dtypes: Sequence[torch.dtype | None] | None = None) -> Plan:
    """Lays the tensors one after the other, each at a multiple of 16 bytes.

    `dtypes` are those in the bucket; None keeps the tensor's. Raises ValueError for a cast other than float32 to
    bfloat16 or float8_e4m3fn, and bfloat16 to float8_e4m3fn.
    """
    op = "plan_bucket"
    wanted = [None] * len(tensors) if dtypes is None else list(dtypes)
    require(len(wanted) == len(tensors), op, f"{len(tensors)} tensors, but {len(wanted)} dtypes; give one for each")
    inside = [tensor.dtype if dtype is None else dtype for tensor, dtype in zip(tensors, wanted, strict=True)]
    for position, (tensor, dtype) in enumerate(zip(tensors, inside, strict=True)):
        fine = dtype == tensor.dtype or (tensor.dtype, dtype) in _KINDS
        require(fine, op, f"tensor {position} can't go from {tensor.dtype} to {dtype}; cast it before")
    return reference.plan_bucket([tensor.shape for tensor in tensors], inside)


def pack_weights(
    tensors: Sequence[Tensor], plan: Plan, scales: Sequence[Tensor | None] | None = None, *, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Fills a bucket: uint8 [plan.num_bytes], and its checksum, int64 [1].

    A tensor that becomes float8_e4m3fn needs scales: float32 [rows of its last dimension]; others None. `out`
    is a bucket to fill. Raises ValueError if tensors, scales or `out` do not fit the plan.
    """
    op = "pack_weights"
    scales = _require_fit(op, tensors, plan, scales)
    if out is not None:
        _require_bucket(op, out, plan)
    like = out if out is not None else tensors[0] if tensors else torch.empty(0)
    for position, tensor in enumerate(tensors):
        require_device(op, like, **{f"tensor {position}": tensor})
    if not launch.runs_kernels(like):
        bucket, checksum = reference.pack_weights(tensors, plan, scales)
        return (bucket if out is None else out.copy_(bucket)), checksum
    bucket = launch.empty((plan.num_bytes,), torch.uint8, like) if out is None else out
    return bucket, _run(PACK, bucket, plan, tensors, scales)


def unpack_weights(
    bucket: Tensor, plan: Plan, tensors: Sequence[Tensor], scales: Sequence[Tensor | None] | None = None
) -> Tensor:
    """Writes a bucket's contents into `tensors`, cast to their dtypes; returns the checksum of what it read, int64 [1].

    The tensors are contiguous, of the plan's shapes; those kept as float8_e4m3fn in the bucket and wanted as float32 or
    bfloat16 need the scales that they were packed with. Raises ValueError if something does not fit the plan.
    """
    op = "unpack_weights"
    scales = _require_fit(op, tensors, plan, scales)
    _require_bucket(op, bucket, plan)
    for position, tensor in enumerate(tensors):
        require_device(op, bucket, **{f"tensor {position}": tensor})
    if not launch.runs_kernels(bucket):
        return reference.unpack_weights(bucket, plan, tensors, scales)
    return _run(UNPACK, bucket, plan, tensors, scales)


def _require_fit(
    op: str, tensors: Sequence[Tensor], plan: Plan, scales: Sequence[Tensor | None] | None
) -> list[Tensor | None]:
    """The scales, None for each tensor if there are none."""
    given: list[Tensor | None] = [None] * len(tensors) if scales is None else list(scales)
    for name, num in (("tensors", len(tensors)), ("scales", len(given))):
        require(num == len(plan.places), op, f"the plan has {len(plan.places)} places, but there are {num} {name}")
    for position, (tensor, place, scale) in enumerate(zip(tensors, plan.places, given, strict=True)):
        name = f"tensor {position}"
        require_shape(op, name, tensor, *place.shape)
        require_contiguous(op, **{name: tensor})
        fine = tensor.dtype == place.dtype or (tensor.dtype, place.dtype) in _KINDS
        require(fine, op, f"{name} is {tensor.dtype}, the plan has {place.dtype}; there is no cast between them")
        quantized = tensor.dtype != place.dtype and place.dtype == torch.float8_e4m3fn
        require((scale is not None) == quantized, op, f"{name} goes to {place.dtype} {_scale_rule(quantized)}")
        if scale is not None:
            columns = tensor.shape[-1] if tensor.ndim else 1
            require_dtype(op, f"scales of {name}", scale, torch.float32)
            require_shape(op, f"scales of {name}", scale, tensor.numel() // max(columns, 1))
            require_contiguous(op, **{f"scales of {name}": scale})
            require_device(op, tensor, **{f"scales of {name}": scale})
    return given


def _scale_rule(quantized: bool) -> str:
    return "and needs scales for its rows" if quantized else "and takes no scales"


def _require_bucket(op: str, bucket: Tensor, plan: Plan) -> None:
    require_dtype(op, "bucket", bucket, torch.uint8)
    require_shape(op, "bucket", bucket, plan.num_bytes)
    require_contiguous(op, bucket=bucket)
    require(bucket.data_ptr() % UNIT_BYTES == 0, op, f"bucket must begin at a multiple of {UNIT_BYTES} bytes")


def _run(
    spec: KernelSpec, bucket: Tensor, plan: Plan, tensors: Sequence[Tensor], scales: Sequence[Tensor | None]
) -> Tensor:
    table = _table(bucket.device, plan, tensors, scales)
    units = plan.num_bytes // UNIT_BYTES
    config = launch.pick(spec, tokens=units)
    blocks = -(-units // (config["BLOCK"] * config["UNITS"]))
    partial = launch.empty((blocks,), torch.int64, bucket)
    checksum = launch.empty((1,), torch.int64, bucket)
    args = (table, bucket, partial, len(tensors), units)
    launch.launch(spec, blocks, config["BLOCK"], args, device_of=bucket, config=config)
    launch.launch(TOTAL, 1, TOTAL.configs[0]["BLOCK"], (partial, checksum, blocks, units), device_of=bucket)
    return checksum


def _table(device: torch.device, plan: Plan, tensors: Sequence[Tensor], scales: Sequence[Tensor | None]) -> Tensor:
    """The rows that pack.cu reads, on the device; kept for the next call with tensors at the same addresses."""
    key = (device, plan, tuple(
        (tensor.data_ptr(), None if scale is None else scale.data_ptr(), tensor.element_size())
        for tensor, scale in zip(tensors, scales, strict=True)
    ))  # fmt: skip
    if key not in _tables:
        rows = [_row(*entry) for entry in zip(tensors, plan.places, scales, strict=True)]
        _tables[key] = torch.tensor(rows, dtype=torch.int64).reshape(-1, 7).to(device)
        if len(_tables) > _MAX_TABLES:
            _tables.popitem(last=False)
    _tables.move_to_end(key)
    return _tables[key]


def _row(tensor: Tensor, place: Place, scale: Tensor | None) -> list[int]:
    kind = _KINDS.get((tensor.dtype, place.dtype), 0)
    elements = tensor.numel() if kind else tensor.nbytes
    columns = max(tensor.shape[-1], 1) if tensor.ndim else 1
    inverse = int.from_bytes(struct.pack("<d", 1.0 / columns), "little", signed=True)
    address = 0 if scale is None else scale.data_ptr()
    return [tensor.data_ptr(), place.offset // UNIT_BYTES, elements, columns, inverse, address, kind]
