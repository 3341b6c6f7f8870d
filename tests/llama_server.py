"""llama.cpp's own server, as its package xllamacpp ships it, in a process of its own. Holds no tests.

python -P llama_server.py MODEL.gguf      serves it; prints its address
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from headrace.actors.model.config import ModelConfig

NAMES = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm", "ffn_norm": "post_attention_layernorm", "ffn_gate_inp": "mlp.gate",
}  # fmt: skip
"""Tensors of a layer that differ in nothing but their name."""


def write_gguf(path: Path, config: ModelConfig, tensors: Mapping[str, np.ndarray], eos_id: int) -> None:
    """A Qwen3-MoE model in fp32, with a vocabulary of made-up texts."""
    import gguf

    writer = gguf.GGUFWriter(str(path), "qwen3moe")
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_positions)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.moe_intermediate_size)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([f"t{i};" for i in range(config.vocab_size)])
    kinds = [gguf.TokenType.CONTROL if i == eos_id else gguf.TokenType.NORMAL for i in range(config.vocab_size)]
    writer.add_token_types(kinds)
    writer.add_token_merges(["t 1"])
    writer.add_eos_token_id(eos_id)
    writer.add_add_bos_token(False)
    writer.add_tensor("token_embd.weight", tensors["model.embed_tokens.weight"])
    writer.add_tensor("output_norm.weight", tensors["model.norm.weight"])
    writer.add_tensor("output.weight", tensors["lm_head.weight"])
    for layer in range(config.num_layers):
        theirs, ours = f"blk.{layer}", f"model.layers.{layer}"
        for name, source in NAMES.items():
            writer.add_tensor(f"{theirs}.{name}.weight", np.ascontiguousarray(tensors[f"{ours}.{source}.weight"]))
        gate, up = np.split(tensors[f"{ours}.mlp.experts.gate_up_proj"], 2, axis=1)
        writer.add_tensor(f"{theirs}.ffn_gate_exps.weight", gate.copy())
        writer.add_tensor(f"{theirs}.ffn_up_exps.weight", up.copy())
        writer.add_tensor(f"{theirs}.ffn_down_exps.weight", tensors[f"{ours}.mlp.experts.down_proj"].copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@contextmanager
def serving(path: Path) -> Iterator[str]:
    """The address of a server that does not outlive its test."""
    with (path.parent / "llama.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-P", __file__, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
            text=True,
        )  # fmt: skip
    assert process.stdin is not None and process.stdout is not None
    with process.stdin, process.stdout:
        try:
            yield process.stdout.readline().strip()
        finally:
            process.kill()
            process.wait()


def main() -> None:
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path = sys.argv[1]
    settings.n_ctx, settings.n_parallel = 2048, 4
    settings.port = 0
    settings.warmup = False
    settings.cpuparams.n_threads = 1
    settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(settings)
    sys.stdout.write(f"{server.listening_address}\n")
    sys.stdout.flush()
    sys.stdin.read()


if __name__ == "__main__":
    main()
