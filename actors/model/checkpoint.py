"""Model folders as Hugging Face has them: `config.json` and `model.safetensors`. Knows nothing of training state.

On disk every expert is its own three matrices; in memory the experts of a layer are fused. Both forms load.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from .config import ModelConfig

_EXPERT = re.compile(r"(model\.layers\.\d+\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")

_NAMES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "num_experts_per_tok": "num_experts_per_tok",
    "moe_intermediate_size": "moe_intermediate_size",
    "rms_norm_eps": "rms_norm_eps",
    "max_positions": "max_position_embeddings",
    "tie_word_embeddings": "tie_word_embeddings",
    "norm_topk_prob": "norm_topk_prob",
    "initializer_range": "initializer_range",
}
"""Our field -> key of config.json, where the meaning is the same."""


def save(folder: Path, config: ModelConfig, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes config.json and model.safetensors; each appears whole or not at all. The folder is made if needed."""
    folder.mkdir(parents=True, exist_ok=True)
    weights, settings = folder / "model.safetensors", folder / "config.json"
    save_file(split_experts(tensors), f"{weights}.new", metadata={"format": "pt"})
    os.replace(f"{weights}.new", weights)
    Path(f"{settings}.new").write_text(json.dumps(to_hugging_face(config), indent=2) + "\n")
    os.replace(f"{settings}.new", settings)


def load(folder: Path) -> tuple[ModelConfig, dict[str, np.ndarray]]:
    """Reads config.json and model*.safetensors; weights come fused, fp32, by name.

    Raises ValueError if a file is missing, unreadable, of another kind of model, or lacks a part of an expert.
    """
    try:
        config = from_hugging_face(json.loads((folder / "config.json").read_text()))
        tensors: dict[str, np.ndarray] = {}
        paths = sorted(folder.glob("model*.safetensors"))
        if not paths:
            raise FileNotFoundError("model.safetensors is missing")
        for path in paths:
            with safe_open(path, "pt") as file:  # numpy could not read bfloat16
                names: list[str] = list(file.keys())
                tensors |= {name: file.get_tensor(name).float().numpy() for name in names}
    except (OSError, json.JSONDecodeError, SafetensorError) as error:
        raise ValueError(f"{folder} holds no readable model: {error}; give a folder as Hugging Face has them") from None
    if config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    return config, fuse_experts(tensors)


def split_experts(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Fused experts to one matrix per expert and projection; other tensors stay as they are."""
    result: dict[str, np.ndarray] = {}
    for name, tensor in tensors.items():
        if name.endswith(".mlp.experts.gate_up_proj"):
            for index, (gate, up) in enumerate(np.split(expert, 2) for expert in tensor):
                stem = f"{name.removesuffix('.gate_up_proj')}.{index}"
                result |= {f"{stem}.gate_proj.weight": gate.copy(), f"{stem}.up_proj.weight": up.copy()}
        elif name.endswith(".mlp.experts.down_proj"):
            for index, down in enumerate(tensor):
                result[f"{name.removesuffix('.down_proj')}.{index}.down_proj.weight"] = down.copy()
        else:
            result[name] = np.ascontiguousarray(tensor)
    return result


def fuse_experts(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Inverse of `split_experts`; what is fused already stays. Raises ValueError if a part is missing."""
    result: dict[str, np.ndarray] = {}
    experts: dict[str, dict[int, dict[str, np.ndarray]]] = {}
    for name, tensor in tensors.items():
        match = _EXPERT.fullmatch(name)
        if match is None:
            result[name] = tensor
        else:
            experts.setdefault(match[1], {}).setdefault(int(match[2]), {})[match[3]] = tensor
    for stem, parts in experts.items():
        try:
            ordered = [parts[index] for index in range(len(parts))]
            result[f"{stem}.gate_up_proj"] = np.stack([np.concatenate((p["gate"], p["up"])) for p in ordered])
            result[f"{stem}.down_proj"] = np.stack([p["down"] for p in ordered])
        except KeyError as error:
            raise ValueError(f"{stem}: expert or projection {error} is missing; the checkpoint is incomplete") from None
    return result


def to_hugging_face(config: ModelConfig) -> dict[str, Any]:
    """What config.json says of `config`; `transformers` builds the same model from it."""
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_act": "silu",
        "attention_bias": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "use_sliding_window": False,
        "torch_dtype": "float32",
        "num_experts": config.num_experts,
        "intermediate_size": config.moe_intermediate_size,
        "rope_theta": config.rope_theta,
        **{key: getattr(config, field) for field, key in _NAMES.items()},
    }


def from_hugging_face(settings: Mapping[str, Any]) -> ModelConfig:
    """Reads the content of a config.json. Raises ValueError for what this model family does not cover here."""
    rope = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    for key, value, allowed in (
        ("model_type", settings.get("model_type"), ("qwen3_moe",)),
        ("hidden_act", settings.get("hidden_act", "silu"), ("silu",)),
        ("attention_bias", settings.get("attention_bias", False), (False,)),
        ("decoder_sparse_step", settings.get("decoder_sparse_step", 1), (1,)),
        ("mlp_only_layers", settings.get("mlp_only_layers") or [], ([],)),
        ("use_sliding_window", settings.get("use_sliding_window", False), (False,)),
        ("rope_type", rope.get("rope_type", "default"), ("default",)),
    ):
        if value not in allowed:
            raise ValueError(f"config.json: {key} must be {allowed[0]!r}, got {value!r}; no other is implemented")
    try:
        return ModelConfig(
            num_experts=settings["num_local_experts"] if "num_local_experts" in settings else settings["num_experts"],
            rope_theta=float(rope.get("rope_theta", settings.get("rope_theta", 10000.0))),
            **{field: settings[key] for field, key in _NAMES.items()},
        )
    except KeyError as error:
        raise ValueError(f"config.json lacks {error}; it is no complete Qwen3-MoE configuration") from None
