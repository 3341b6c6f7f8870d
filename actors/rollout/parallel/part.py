"""The weights of one rank: which boxes of the whole tensors it takes, and where it keeps them.

    q, k, v, gate and up of experts   rows of its heads or widths     out, down   columns of them
    experts of a layer                one after the other, by slot    head        rows of its words
    everything else                   whole

Names are Hugging Face's, with the experts of a layer fused. Knows nothing of how boxes travel.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ....kernels.placement import Placement
from ...model.block import LayerWeights, fuse
from ...model.config import ModelConfig
from ...model.decode import DecoderWeights, shapes
from .mesh import Mesh, Place

HEAD = "lm_head.weight"
EMBED = "model.embed_tokens.weight"

_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_BY_ROWS = {"self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"}
_GATE_UP, _DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"


class Box(NamedTuple):
    """A part of an array."""

    slices: tuple[slice, ...]


class Cut(NamedTuple):
    """What becomes of one box of a whole tensor. (The `Copy` of a carrier of weights.)"""

    source_name: str
    source_box: Box
    dest_name: str
    dest_box: Box


class Part(dict[str, np.ndarray]):
    """The tensors of a rank, of the shapes that `local_shapes` gives; `Runner.prepare` takes them."""

    ticket: int = 0
    """Counts the weights that were handed to the ranks of a worker: all load the same."""
    placements: Sequence[Placement] = ()
    """Of the experts in the slots of all ranks, by layer."""


def first_placements(mesh: Mesh, config: ModelConfig) -> list[Placement]:
    """Experts in order; spare slots hold those after them."""
    slots, experts = mesh.slots_per_rank(config.num_experts), config.num_experts
    begins = np.arange(mesh.ep) * (experts // mesh.ep)
    held = (begins[:, None] + np.arange(slots)) % experts
    return [Placement(held.reshape(-1), experts, mesh.ep) for _ in range(config.num_layers)]


def head_rows(config: ModelConfig, place: Place) -> tuple[int, int, int]:
    """The words whose logits a rank computes: the first, one past the last, and how many the first rank has."""
    width = -(-config.vocab_size // place.mesh.size)
    first = min(place.rank * width, config.vocab_size)
    return first, min(first + width, config.vocab_size), width


def local_shapes(config: ModelConfig, place: Place) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of a rank."""
    found, slots = shapes(place.mesh.local(config)), place.mesh.slots_per_rank(config.num_experts)
    for name, shape in found.items():
        if name.endswith((_GATE_UP, _DOWN)):
            found[name] = (slots, *shape[1:])
    return {**found, HEAD: (head_rows(config, place)[2], config.hidden_size)}


def cuts(config: ModelConfig, place: Place, placements: Sequence[Placement]) -> Iterator[Cut]:
    """Every box that a rank takes."""
    mesh, t = place.mesh, place.t
    width = config.moe_intermediate_size
    share = slice(t * width // mesh.tp, (t + 1) * width // mesh.tp)
    mine, every = slice(0, width // mesh.tp), slice(None)
    for name, shape in shapes(config).items():
        match = _LAYER.fullmatch(name)
        layer, tail = (int(match[1]), match[2]) if match else (0, name)
        if tail in _BY_ROWS or tail == "self_attn.o_proj.weight":
            axis = int(tail not in _BY_ROWS)
            rows = shape[axis] // mesh.tp
            box = [every, every]
            box[axis] = slice(t * rows, (t + 1) * rows)
            yield Cut(name, Box(tuple(box)), name, _whole(2))
        elif tail in (_GATE_UP, _DOWN):
            slots = mesh.slots_per_rank(config.num_experts)
            held = placements[layer].experts_P[place.e * slots : (place.e + 1) * slots].tolist()
            for slot, expert in enumerate(held):
                source, dest = slice(expert, expert + 1), slice(slot, slot + 1)
                if tail == _DOWN:
                    yield Cut(name, Box((source, every, share)), name, Box((dest, every, every)))
                    continue
                up = slice(width + share.start, width + share.stop)
                yield Cut(name, Box((source, share, every)), name, Box((dest, mine, every)))
                mine_up = slice(mine.stop, 2 * mine.stop)
                yield Cut(name, Box((source, up, every)), name, Box((dest, mine_up, every)))
        elif name != HEAD:
            yield Cut(name, _whole(len(shape)), name, _whole(len(shape)))
    first, end, _ = head_rows(config, place)
    source_name = EMBED if config.tie_word_embeddings else HEAD
    yield Cut(source_name, Box((slice(first, end), every)), HEAD, Box((slice(0, end - first), every)))


def empty_part(config: ModelConfig, place: Place, placements: Sequence[Placement]) -> Part:
    """Room for a rank's tensors, fp32, zero where nothing is to come."""
    part = Part({name: np.zeros(shape, np.float32) for name, shape in local_shapes(config, place).items()})
    part.placements = placements
    return part


def cut(config: ModelConfig, place: Place, placements: Sequence[Placement], tensors: Mapping[str, np.ndarray]) -> Part:
    """A rank's part of tensors that are whole."""
    part = empty_part(config, place, placements)
    for one in cuts(config, place, placements):
        part[one.dest_name][one.dest_box.slices] = tensors[one.source_name][one.source_box.slices]
    return part


@torch.inference_mode()
def fuse_part(config: ModelConfig, place: Place, part: Part, device: torch.device) -> DecoderWeights:
    """The form that computing wants; `head` has the rows of this rank's words. Raises FloatingPointError for numbers
    that are not finite, ValueError for shapes of another model."""
    check_shapes(local_shapes(config, place), {name: array.shape for name, array in part.items()})
    for name, array in part.items():
        if not np.isfinite(array).all():
            raise FloatingPointError(f"{name} is not finite; these weights are refused")
    local = place.mesh.local(config)

    def tensor(name: str) -> Tensor:
        return torch.tensor(part[name], device=device)

    def layer(index: int) -> LayerWeights:
        return fuse(local, lambda name: tensor(f"model.layers.{index}.{name}"))

    layers = tuple(layer(index) for index in range(config.num_layers))
    return DecoderWeights(layers, tensor(EMBED), tensor(HEAD) * tensor("model.norm.weight"))


def check_shapes(wanted: Mapping[str, tuple[int, ...]], given: Mapping[str, tuple[int, ...]]) -> None:
    """Raises ValueError for tensors of other names or shapes."""
    wrong = sorted(name for name in wanted.keys() | given.keys() if wanted.get(name) != given.get(name))
    if wrong:
        raise ValueError(
            f"weights are of another model: {wrong[0]} has shape {given.get(wrong[0])}, expected "
            f"{wanted.get(wrong[0])} ({len(wrong)} tensors differ); check the [model] table"
        )


def _whole(dimensions: int) -> Box:
    return Box((slice(None),) * dimensions)


def as_arrays(placements: Sequence[Placement]) -> NDArray[np.int64]:
    """The expert of each slot, [layers, P]: as placements travel."""
    return np.stack([placement.experts_P for placement in placements]).astype(np.int64)


def from_arrays(experts_LP: np.ndarray, mesh: Mesh, config: ModelConfig) -> list[Placement]:
    """Inverse of `as_arrays`. Raises ValueError for what is no placement."""
    return [Placement(np.array(experts), config.num_experts, mesh.ep) for experts in experts_LP]
