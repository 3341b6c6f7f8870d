"""tests/gpu/run's last part: the rollout engine on a GPU, beside transformers' generate, and the memory's limit.

A mixture of experts of 1.9e9 parameters with random weights in bfloat16; responses have lengths of their own with a
long tail, as if their end came there. The limit is what must be read: all weights once a step, and the keys and values
of what lives, at the rate at which this GPU copies.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from cases_decode import random_weights

from headrace.actors.model.checkpoint import to_hugging_face
from headrace.actors.model.config import ModelConfig
from headrace.actors.rollout.graphs import Capture, CudaGraphs, why_no_cuda
from headrace.actors.rollout.on_device import DeviceEngine, graph_runner
from headrace.actors.rollout.requests import Request

LARGE = ModelConfig(
    vocab_size=32_768, hidden_size=2048, num_layers=16, num_heads=16, num_kv_heads=4, head_dim=128, num_experts=32,
    num_experts_per_tok=4, moe_intermediate_size=512, max_positions=4096,
)  # fmt: skip
SLOTS, PROMPT, MEDIAN, SIGMA, MOST = 128, 64, 256, 1.0, 2048
NO_TOKEN = -1
"""The end-of-sequence token of responses that end by their length alone."""


@dataclass(frozen=True, kw_only=True)
class Work:
    config: ModelConfig
    num_slots: int
    prompts: np.ndarray
    """int32 [responses, P]"""
    lengths: np.ndarray
    """int64 [responses]"""


def make_work(config: ModelConfig, num_slots: int, prompt: int, most: int, median: int, seed: int = 0) -> Work:
    rng = np.random.default_rng(seed)
    lengths = rng.lognormal(np.log(median), SIGMA, 4 * num_slots).round().clip(1, most).astype(np.int64)
    prompts = rng.integers(1, config.vocab_size, (len(lengths), prompt)).astype(np.int32)
    return Work(config=config, num_slots=num_slots, prompts=prompts, lengths=lengths)


def measure(work: Work, capture: Capture, copy_rate: float, repeats: int = 3) -> dict[str, float]:
    """Figures of one run; `copy_rate` in bytes read and written per second."""
    ours, least = [], 0.0
    engine, run = _ours(work, capture)
    run()  # Captures the steps.
    for _ in range(repeats):
        begun = time.perf_counter()
        least = run() / copy_rate
        ours.append(time.perf_counter() - begun)
    theirs = _theirs(work, capture.device)
    num_tokens, seconds = int(work.lengths.sum()), float(np.median(ours))
    return {
        "decode_tokens_per_s": num_tokens / seconds,
        "decode_generate_tokens_per_s": num_tokens / theirs,
        "decode_to_generate_ratio": theirs / seconds,
        "decode_of_memory_floor_ratio": least / seconds,
        "decode_lengths_p99_to_mean": float(np.quantile(work.lengths, 0.99) / work.lengths.mean()),
        "decode_captured_steps": float(engine.runner.num_captured),
    }


def _ours(work: Work, capture: Capture) -> tuple[DeviceEngine, Callable[[], float]]:
    limits = {
        "num_slots": work.num_slots, "max_prompt_tokens": work.prompts.shape[1],
        "max_new_tokens": int(work.lengths.max()),
    }  # fmt: skip
    runner = graph_runner(work.config, capture, page_tokens=16, **limits)
    weights = random_weights(work.config, np.random.default_rng(1))
    engine = DeviceEngine(
        work.config, weights, version=0, eos_id=NO_TOKEN, seed=0, runner=runner, prefill_tokens=4096, **limits
    )  # fmt: skip
    weight_bytes = 2 * sum(weight.size for weight in weights.values())
    token_bytes = 2 * 2 * work.config.num_layers * work.config.num_kv_heads * work.config.head_dim

    def run() -> float:
        """Returns the bytes that had to be read."""
        for key, (prompt, length) in enumerate(zip(work.prompts, work.lengths.tolist(), strict=True)):
            engine.submit(Request(key=key, ordinal=key, prompt=prompt, members=[0], max_new_tokens=length))
        read = 0.0
        while engine.num_live or engine.num_waiting:
            engine.step()
            read += weight_bytes + token_bytes * engine.kv_use()[0]
        return read

    return engine, run


def _theirs(work: Work, device: torch.device) -> float:
    """Seconds of generate: batches in the order of the prompts, each until its longest response ends."""
    from transformers import AutoConfig, AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList

    settings = to_hugging_face(work.config)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa").eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0

    class Lengths(StoppingCriteria):  # type: ignore[misc]
        def __init__(self, ends: torch.Tensor) -> None:
            self.ends = ends

        def __call__(self, input_ids: torch.Tensor, scores: Any, **more: Any) -> torch.Tensor:
            return input_ids.shape[1] >= self.ends

    def batch(first: int, most: int) -> None:
        rows = slice(first, first + work.num_slots)
        prompts = torch.from_numpy(work.prompts[rows].astype(np.int64)).to(device)
        lengths = np.minimum(work.lengths[rows], most)
        ends = torch.from_numpy(prompts.shape[1] + lengths).to(device)
        model.generate(
            prompts, attention_mask=torch.ones_like(prompts), do_sample=True, top_k=0,
            max_new_tokens=int(lengths.max()), stopping_criteria=StoppingCriteriaList([Lengths(ends)]),
        )[0, -1].item()  # fmt: skip

    batch(0, 4)
    begun = time.perf_counter()
    for first in range(0, len(work.prompts), work.num_slots):
        batch(first, 2**31)
    return time.perf_counter() - begun


def main(copy_rate: float) -> dict[str, float]:
    """Prints and returns figures, or prints why there are none."""
    if why := why_no_cuda():
        print(f"decoding: not yet measured on a GPU: {why}")
        return {}
    figures = measure(make_work(LARGE, SLOTS, PROMPT, MOST, MEDIAN), CudaGraphs(), copy_rate)
    for name, value in figures.items():
        print(f"{name:36}{value:.4g}")
    return figures
