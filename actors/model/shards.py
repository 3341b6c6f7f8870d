"""How the weights of a Qwen3-MoE model are cut over the ranks of a trainer and of engines, for the exchange's plan.

              whole tensors (each projection, experts stacked)
    trainer   TP: heads, columns; EP: experts; FSDP over all        transformers' names: gate_up = gate | up
    engine    TP: heads, columns; EP: experts                       the same, or qkv = q | k | v too

What an engine makes of its weights (folded norms, interleaved heads, FP8) is its own business. Knows nothing of torch.
"""

from __future__ import annotations

from collections.abc import Iterable

from ...runtime.exchange.holding import Held, Holding, Part, Shard, Split, Whole
from ...runtime.exchange.mesh import Mesh
from .config import ModelConfig


def trainer_holding(
    config: ModelConfig,
    *,
    fsdp: int = 1,
    ep: int = 1,
    tp: int = 1,
    folded: bool = True,
    dtype: str = "<f4",
    first: int = 0,
) -> Holding:
    """Ranks of a trainer. If `folded`, EP takes its ranks from those of FSDP, as FSDP2's users do (fsdp * tp ranks, and
    ep divides fsdp); otherwise it has its own, over which all but the experts is repeated (fsdp * ep * tp ranks).

    Raises ValueError if a size does not divide what it cuts.
    """
    if folded and fsdp % ep:
        raise ValueError(f"ep must divide fsdp, whose ranks it takes, got ep {ep} and fsdp {fsdp}")
    mesh = Mesh({"fsdp": fsdp // ep if folded else fsdp, "ep": ep, "tp": tp}, first=first)
    dense = Shard(0, ("fsdp", "ep") if folded else ("fsdp",))
    # Fewer experts than ranks: FSDP cuts inside each of them, as it would leave ranks with nothing otherwise.
    experts = Shard(0 if config.num_experts // ep >= mesh.axes["fsdp"] else 1, ("fsdp",))
    return _holding(config, mesh, dtype, tp=("tp",), ep=("ep",), dense=(dense,), experts=(experts,), fuse_qkv=False)


def engine_holding(
    config: ModelConfig,
    *,
    engines: int = 1,
    tp: int = 1,
    ep: int = 1,
    fuse_qkv: bool = False,
    dtype: str = "<f4",
    first: int = 0,
) -> Holding:
    """`engines` equal engines of max(tp, ep) ranks each, of which those of TP are also those of EP; one after another.

    Key and value heads are repeated where tp is more than there are. With ep = 1 TP cuts the experts too.
    Raises ValueError if a size does not divide what it cuts.
    """
    if max(tp, ep) % min(tp, ep):
        raise ValueError(f"tp and ep must divide one another, got tp {tp} and ep {ep}")
    inner, outer = min(tp, ep), max(tp, ep) // min(tp, ep)
    mesh = Mesh({"engine": engines, "outer": outer, "inner": inner}, first=first)
    both = ("outer", "inner")
    axes = {size: both if size == inner * outer else ("inner",) for size in (tp, ep)}
    return _holding(
        config, mesh, dtype, tp=axes[tp], ep=axes[ep] if ep > 1 else (), dense=(), experts=(), fuse_qkv=fuse_qkv
    )


def matrices(names: Iterable[str]) -> set[str]:
    """Those of the names that are matrices of attention or of experts: what FP8 hurts little. The router is none."""
    return {name for name in names if name.removesuffix(".weight").endswith("_proj")}


def _holding(
    config: ModelConfig,
    mesh: Mesh,
    dtype: str,
    *,
    tp: tuple[str, ...],
    ep: tuple[str, ...],
    dense: tuple[Shard, ...],
    experts: tuple[Shard, ...],
    fuse_qkv: bool,
) -> Holding:
    """`tp` and `ep` are the axes that cut; where they are the same ranks, TP does not cut inside experts."""
    _require(config, tp=mesh.extent(tp), ep=mesh.extent(ep))
    d, width, num, f = config.hidden_size, config.head_dim, config.num_experts, config.moe_intermediate_size
    inside = () if set(tp) & set(ep) else tp

    def whole(name: str, *shape: int) -> Whole:
        return Whole(name, dtype, shape)

    def held(name: str, *shape: int, split: Split | None = None) -> Held:
        return Held(name, (Part(whole(name, *shape), (split,) if split else ()),), dense)

    def layer(stem: str) -> list[Held]:
        heads = {"q": config.num_heads, "k": config.num_kv_heads, "v": config.num_kv_heads}
        by_head = Split(0, tp, grain=width, repeat=True)
        qkv = [held(f"{stem}.self_attn.{name}_proj.weight", n * width, d, split=by_head) for name, n in heads.items()]
        if fuse_qkv:
            qkv = [Held(f"{stem}.self_attn.qkv_proj.weight", tuple(item.parts[0] for item in qkv), dense)]
        expert = f"{stem}.mlp.experts"
        by_expert = (Split(0, ep),)
        gate_up = tuple(
            Part(whole(f"{expert}.{name}_proj", num, f, d), (*by_expert, Split(1, inside))) for name in ("gate", "up")
        )
        down = Part(whole(f"{expert}.down_proj", num, d, f), (*by_expert, Split(2, inside)))
        return [
            *qkv,
            held(f"{stem}.self_attn.o_proj.weight", d, config.num_heads * width, split=Split(1, tp, grain=width)),
            held(f"{stem}.self_attn.q_norm.weight", width),
            held(f"{stem}.self_attn.k_norm.weight", width),
            held(f"{stem}.input_layernorm.weight", d),
            held(f"{stem}.post_attention_layernorm.weight", d),
            held(f"{stem}.mlp.gate.weight", num, d),
            Held(f"{expert}.gate_up_proj", gate_up, experts, fuse=1),
            Held(f"{expert}.down_proj", (down,), experts),
        ]

    rows = Split(0, tp)
    return Holding(
        mesh,
        [
            held("model.embed_tokens.weight", config.vocab_size, d, split=rows),
            *(item for index in range(config.num_layers) for item in layer(f"model.layers.{index}")),
            held("model.norm.weight", d),
            *([] if config.tie_word_embeddings else [held("lm_head.weight", config.vocab_size, d, split=rows)]),
        ],
    )


def _require(config: ModelConfig, *, tp: int, ep: int) -> None:
    for name, value, size, size_name in (
        ("num_heads", config.num_heads, tp, "tp"),
        ("num_experts", config.num_experts, ep, "ep"),
    ):
        if value % size:
            raise ValueError(f"{size_name} must divide {name}, got {size_name} {size} and {name} {value}")
    if config.num_kv_heads % tp and tp % config.num_kv_heads:
        raise ValueError(f"tp must divide num_kv_heads, or be a multiple of it, got {tp} and {config.num_kv_heads}")
