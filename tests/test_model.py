"""The model against transformers; the cached decoder against the full forward; files both ways."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.actors.model import checkpoint
from headrace.actors.model.attention import PackedAttention
from headrace.actors.model.config import ModelConfig
from headrace.actors.model.decode import Decoder, KvCache
from headrace.actors.model.qwen3_moe import Qwen3Moe

transformers = pytest.importorskip("transformers")

TINY = ModelConfig(
    vocab_size=23, hidden_size=24, num_layers=3, num_heads=6, num_kv_heads=2, head_dim=8, num_experts=5,
    num_experts_per_tok=2, moe_intermediate_size=12, max_positions=64, initializer_range=0.3,
)  # fmt: skip

VARIANTS = {
    "grouped queries": TINY,
    "own head width": replace(TINY, head_dim=10, rope_theta=500.0),
    "one expert of many": replace(TINY, num_experts=16, num_experts_per_tok=1),
    "all experts": replace(TINY, num_experts=3, num_experts_per_tok=3, norm_topk_prob=False),
    "weights not renormalized": replace(TINY, norm_topk_prob=False, rms_norm_eps=1e-3),
    "tied embeddings": replace(TINY, tie_word_embeddings=True, num_kv_heads=6),
}


def weights(model: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: p.detach().numpy().copy() for name, p in model.named_parameters()}


def random_model(config: ModelConfig, seed: int = 0) -> Qwen3Moe:
    """A model whose norms are random too."""
    model = Qwen3Moe(config, seed=seed)
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5, generator=random)
    return model


def run(model: Qwen3Moe, sequences: list[np.ndarray]) -> list[torch.Tensor]:
    """Logits of each sequence, computed in one packed pass."""
    lengths = [len(s) for s in sequences]
    positions = torch.from_numpy(np.concatenate([np.arange(n) for n in lengths]))
    out = model(torch.from_numpy(np.concatenate(sequences)), positions, lengths)
    return list(model.logits(out.hidden).split(lengths))


def peer(model: Qwen3Moe) -> torch.nn.Module:
    """The same weights in transformers' model."""
    config = transformers.Qwen3MoeConfig(**checkpoint.to_hugging_face(model.config))
    other = transformers.Qwen3MoeForCausalLM(config).eval()
    missing, unexpected = other.load_state_dict(model.state_dict(), strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    other.tie_weights()
    return other


def sequences(config: ModelConfig, lengths: list[int], seed: int = 0) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [random.integers(0, config.vocab_size, n) for n in lengths]


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())
def test_logits_and_gradients_equal_transformers(config: ModelConfig) -> None:
    model = random_model(config)
    other = peer(model)
    texts = sequences(config, [17, 1, 40, 5, 18])
    ours = run(model, texts)
    theirs = [other(torch.from_numpy(s)[None]).logits[0] for s in texts]
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0)
    sum(a.logsumexp(-1).sum() for a in ours).backward()  # type: ignore[union-attr]
    sum(b.logsumexp(-1).sum() for b in theirs).backward()
    gradients = dict(other.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name].grad, atol=2e-3, rtol=2e-3, msg=name)


def test_parameter_names_and_shapes_are_those_of_transformers() -> None:
    model = Qwen3Moe(TINY)
    theirs = {name: tuple(p.shape) for name, p in peer(model).named_parameters()}
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == theirs


def test_balance_loss_equals_transformers() -> None:
    from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

    model = random_model(replace(TINY, num_layers=1))
    text = sequences(TINY, [33])[0]
    out = model(torch.from_numpy(text), torch.arange(33), [33])
    router = peer(model)(torch.from_numpy(text)[None], output_router_logits=True).router_logits
    expected = load_balancing_loss_func(router, TINY.num_experts, TINY.num_experts_per_tok)
    torch.testing.assert_close(out.aux_loss * TINY.num_experts_per_tok, expected)
    assert out.load.sum() == 33 * TINY.num_experts_per_tok


def test_greedy_decoding_equals_transformers() -> None:
    model = random_model(TINY)
    prompts = sequences(TINY, [4, 9, 1])
    decoder, cache = Decoder(TINY, weights(model)), KvCache(TINY, num_slots=3, max_len=40)
    packed = torch.from_numpy(np.concatenate(prompts))
    logits = decoder.prefill(cache, packed, [4, 9, 1], torch.arange(3))
    answers = [logits.argmax(-1)]
    for i in range(20):
        answers.append(decoder.step(cache, answers[-1], torch.tensor([4, 9, 1]) + i).argmax(-1))
    ours = torch.stack(answers, 1)
    for prompt, answer in zip(prompts, ours, strict=True):
        theirs = peer(model).generate(
            torch.from_numpy(prompt)[None], max_new_tokens=21, do_sample=False, eos_token_id=-1
        )
        assert theirs[0, len(prompt) :].tolist() == answer.tolist()


def test_decoding_with_cache_equals_the_full_forward() -> None:
    """Prompts in arbitrary slots, copied to others, rows at different positions, dead rows, weights loaded again."""
    model = random_model(TINY)
    decoder, cache = Decoder(TINY, weights(random_model(TINY, seed=9))), KvCache(TINY, num_slots=6, max_len=50)
    decoder.load(weights(model))
    texts = sequences(TINY, [30, 41])
    full = [logits.detach() for logits in run(model, texts)]
    first = decoder.prefill(
        cache, torch.from_numpy(np.concatenate((texts[0][:7], texts[1][:20]))), [7, 20], torch.tensor([4, 1])
    )
    torch.testing.assert_close(first, torch.stack((full[0][6], full[1][19])), atol=1e-5, rtol=1e-5)
    cache.copy(4, slice(0, 1), 7)
    cache.copy(4, slice(2, 4), 7)
    for i in range(20):
        tokens = torch.tensor([texts[0][7 + i], texts[1][20 + i], 0, texts[0][7 + i]])
        logits = decoder.step(cache, tokens, torch.tensor([7 + i, 20 + i, 0, 7 + i]))
        for row, expected in ((0, full[0][7 + i]), (1, full[1][20 + i]), (3, full[0][7 + i])):
            torch.testing.assert_close(logits[row], expected, atol=1e-5, rtol=1e-5)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.integers(0, 99))
def test_packed_attention_equals_one_sequence_at_a_time(lengths: list[int], seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(sum(lengths), heads, 4, generator=random) for heads in (4, 2, 2))
    expected = []
    for a, b, c in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True):
        scores = torch.einsum("ihd,jhd->hij", a, b.repeat_interleave(2, 1)) / 2
        scores = scores.masked_fill(torch.ones_like(scores[0]).triu(1).bool(), -torch.inf)
        expected.append(torch.einsum("hij,jhd->ihd", scores.softmax(-1), c.repeat_interleave(2, 1)).flatten(1))
    torch.testing.assert_close(PackedAttention(lengths)(0, q, k, v), torch.cat(expected), atol=1e-5, rtol=1e-5)


def test_experts_without_tokens() -> None:
    """A router that sends all tokens to the same two of five experts: others get no rows and no gradient."""
    model = random_model(TINY)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight.zero_()  # equal scores: the lower ids win
    out = model(torch.arange(10), torch.arange(10), [10])
    assert out.load.tolist() == [[10, 10, 0, 0, 0]] * TINY.num_layers
    model.logits(out.hidden).sum().backward()
    gradient = model.model.layers[0].mlp.experts.gate_up_proj.grad
    assert gradient[:2].abs().amax() > 0 and gradient[2:].abs().amax() == 0


def test_initial_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    first = weights(Qwen3Moe(TINY, seed=5))
    torch.manual_seed(2)
    state = torch.random.get_rng_state()
    again, other = weights(Qwen3Moe(TINY, seed=5)), weights(Qwen3Moe(TINY, seed=6))
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not np.array_equal(first["lm_head.weight"], other["lm_head.weight"])
    assert abs(first["model.layers.0.mlp.experts.gate_up_proj"].std() / TINY.initializer_range - 1) < 0.05


@pytest.mark.parametrize("config", [TINY, VARIANTS["tied embeddings"]], ids=["untied", "tied"])
def test_files_go_to_transformers_and_back(tmp_path: Path, config: ModelConfig) -> None:
    model = random_model(config)
    checkpoint.save(tmp_path / "ours", config, weights(model))
    other = transformers.Qwen3MoeForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32).eval()
    text = sequences(config, [12])[0]
    torch.testing.assert_close(run(model, [text])[0], other(torch.from_numpy(text)[None]).logits[0], atol=1e-4, rtol=0)
    other.save_pretrained(tmp_path / "theirs")
    for folder in ("ours", "theirs"):
        loaded_config, tensors = checkpoint.load(tmp_path / folder)
        assert loaded_config == config
        assert tensors.keys() == weights(model).keys()
        assert all(np.array_equal(tensors[name], value) for name, value in weights(model).items())


def test_bfloat16_files_load_as_fp32(tmp_path: Path) -> None:
    model = random_model(TINY)
    peer(model).to(torch.bfloat16).save_pretrained(tmp_path)
    _, tensors = checkpoint.load(tmp_path)
    for name, value in weights(model).items():
        assert tensors[name].dtype == np.float32
        assert np.array_equal(tensors[name], torch.from_numpy(value).bfloat16().float().numpy()), name


def test_split_and_fuse_are_inverse() -> None:
    tensors = weights(random_model(TINY))
    split = checkpoint.split_experts(tensors)
    assert split["model.layers.2.mlp.experts.4.up_proj.weight"].shape == (12, 24)
    fused = checkpoint.fuse_experts(split)
    assert all(np.array_equal(fused[name], tensors[name]) for name in tensors)
    del split["model.layers.2.mlp.experts.4.up_proj.weight"]
    with pytest.raises(ValueError, match=r"model\.layers\.2\.mlp\.experts.*'up' is missing"):
        checkpoint.fuse_experts(split)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type must be 'qwen3_moe', got 'llama'"),
        ({"decoder_sparse_step": 2}, "decoder_sparse_step must be 1"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type must be 'default', got 'yarn'"),
        ({"hidden_size": None}, "lacks 'hidden_size'"),
    ],
)
def test_foreign_configurations_are_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    described = {k: v for k, v in (checkpoint.to_hugging_face(TINY) | change).items() if v is not None}
    (tmp_path / "config.json").write_text(json.dumps(described))
    with pytest.raises(ValueError, match=message):
        checkpoint.load(tmp_path)


def test_folders_without_a_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no readable model: .*config\.json"):
        checkpoint.load(tmp_path / "nowhere")
    checkpoint.save(tmp_path, TINY, weights(random_model(TINY)))
    weights_file = tmp_path / "model.safetensors"
    weights_file.rename(tmp_path / "optimizer.safetensors")  # of a trainer's checkpoint: not taken for weights
    with pytest.raises(ValueError, match=r"model\.safetensors is missing"):
        checkpoint.load(tmp_path)
    weights_file.write_bytes((tmp_path / "optimizer.safetensors").read_bytes()[:1000])
    with pytest.raises(ValueError, match="holds no readable model"):
        checkpoint.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"num_kv_heads": 4}, "multiple of num_kv_heads"), ({"head_dim": 7}, "even"), ({"num_experts": 1}, "at most")],
)
def test_contradictory_sizes_are_refused(change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TINY, **change)


def test_a_cache_longer_than_the_model_is_refused() -> None:
    with pytest.raises(ValueError, match="max_positions 64"):
        KvCache(TINY, num_slots=1, max_len=65)
