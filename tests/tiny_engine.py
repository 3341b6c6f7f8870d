"""A tiny engine, requests for it, and what they should give: by a full forward pass for every token."""

from functools import cache

import numpy as np
import pytest
import torch
from scipy import special

from headrace.actors.model.config import ModelConfig
from headrace.actors.model.qwen3_moe import Qwen3Moe
from headrace.actors.philox import Stream, uniforms
from headrace.actors.rollout.engine import Engine
from headrace.actors.rollout.requests import Request

EOS, SEED, MAX_PROMPT, MAX_NEW = 0, 11, 10, 24
CONFIG = ModelConfig(
    vocab_size=13,
    hidden_size=16,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    num_experts=4,
    moe_intermediate_size=8,
    max_positions=MAX_PROMPT + MAX_NEW,
    initializer_range=0.3,
)


@cache
def model(seed=0):
    return Qwen3Moe(CONFIG, seed=seed)


@cache
def weights(seed=0):
    return {name: tensor.detach().numpy() for name, tensor in model(seed).named_parameters()}


def engine(num_slots=8, **changes):
    limits = {"num_slots": num_slots, "max_prompt_tokens": MAX_PROMPT, "max_new_tokens": MAX_NEW}
    return Engine(
        CONFIG, weights(), **(limits | {"version": 0, "eos_id": EOS, "seed": SEED, "chunk_tokens": 5} | changes)
    )


def request(key, *, members=4, temperature=1.0, max_new_tokens=MAX_NEW, prefixes=()):
    prompt = np.random.default_rng(key).integers(1, CONFIG.vocab_size, 1 + key % MAX_PROMPT).astype(np.int32)
    return Request(
        key=key,
        ordinal=100 + key,
        prompt=prompt,
        members=list(range(members)),
        prefixes=list(prefixes),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
    )


def full_forward_logits(tokens):
    tokens = torch.tensor(np.asarray(tokens, np.int64))
    with torch.no_grad():
        out = model()(tokens, torch.arange(len(tokens)), [len(tokens)])
        return model().logits(out.hidden).numpy().astype(np.float64)


@cache
def expected(key, member, temperature=1.0, max_new_tokens=MAX_NEW):
    """Tokens and log-probabilities of a response, one full forward pass for each."""
    asked = request(key)
    u = uniforms(SEED, Stream.SAMPLING, asked.ordinal, member, MAX_NEW)
    tokens, logprobs = [], []
    while len(tokens) < max_new_tokens and EOS not in tokens:
        logprob = special.log_softmax(full_forward_logits([*asked.prompt, *tokens])[-1] / (temperature or 1.0))
        tokens.append(
            int(np.searchsorted(np.exp(logprob).cumsum(), u[len(tokens)])) if temperature else int(logprob.argmax())
        )
        logprobs.append(logprob[tokens[-1]])
    return tokens, logprobs


def finish(running, chunks=()):
    """Steps until nothing is left; all chunks in order."""
    chunks = list(chunks)
    while running.num_live or running.num_waiting:
        chunks += running.step()
    return chunks


def collect(chunks):
    """{(key, member): (tokens, logprobs, versions, finish)}; checks that chunks end where they say."""
    responses = {}
    for chunk in chunks:
        assert chunk.tokens.dtype == np.int32 and chunk.logprobs.dtype == np.float32
        assert len(chunk.tokens) == len(chunk.logprobs)
        tokens, logprobs, versions, end = responses.get((chunk.key, chunk.member), ([], [], [], ""))
        assert not end, "a chunk after the last one"
        responses[chunk.key, chunk.member] = (
            tokens + chunk.tokens.tolist(),
            logprobs + chunk.logprobs.tolist(),
            versions + [chunk.version] * len(chunk.tokens),
            chunk.finish,
        )
    return responses


def assert_expected(responses, *, temperature=1.0, max_new_tokens=MAX_NEW, prefixes=None):
    for (key, member), (tokens, logprobs, _, end) in responses.items():
        wanted, wanted_logprobs = expected(key, member, temperature, max_new_tokens)
        done = len((prefixes or {}).get((key, member), []))
        assert tokens == wanted[done:]
        assert logprobs == pytest.approx(wanted_logprobs[done:], abs=1e-4)
        assert end == ("stop" if wanted[-1] == EOS else "length")
