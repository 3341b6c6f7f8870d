"""Engines side by side on the same work, each in a process of its own with both cores.

    python -P _engine_peers.py (headrace|static|continuous) FOLDER
    python -P _engine_peers.py compare FOLDER

Prepares, prints "ready", then for each line of its input writes all responses greedily and prints seconds as JSON.
Before that, and once, it saves the tokens that it wrote in FOLDER/NAME.npz. `compare` prints how far those of all three
are the same, and how far headrace's log-probabilities are from those of transformers' model.

static        transformers' generate: batches in the order of the prompts, each until its longest response ends; of
              SLOTS responses or of half as many, whichever is faster
continuous    transformers' continuous batching
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _engine_work import EOS_ID, GROUP_SIZE, MAX_NEW, MAX_PROMPT, MODEL, Work, make_work

Answers = list[np.ndarray]
"""int32 [length] for each response"""

SLOTS = 128
"""Responses at once, for all of them."""


def headrace(work: Work, folder: Path) -> Callable[[], tuple[Answers, list[np.ndarray]]]:
    from headrace.actors.rollout.engine import Engine
    from headrace.actors.rollout.requests import Request

    engine = Engine(
        MODEL, work.weights, version=1, num_slots=SLOTS, max_prompt_tokens=MAX_PROMPT, max_new_tokens=MAX_NEW,
        eos_id=EOS_ID, seed=0,
    )  # fmt: skip

    def run() -> tuple[Answers, list[np.ndarray]]:
        tokens: list[list[np.ndarray]] = [[] for _ in work.lengths]
        logprobs: list[list[np.ndarray]] = [[] for _ in work.lengths]
        for index, length in enumerate(work.lengths.tolist()):
            prompt = index // GROUP_SIZE
            engine.submit(
                Request(
                    key=index, ordinal=prompt, prompt=work.prompts[prompt], members=[index % GROUP_SIZE],
                    max_new_tokens=length, temperature=0.0,
                )
            )  # fmt: skip
        while engine.num_live or engine.num_waiting:
            for chunk in engine.step():
                tokens[chunk.key].append(chunk.tokens)
                logprobs[chunk.key].append(chunk.logprobs)
        return [np.concatenate(parts) for parts in tokens], [np.concatenate(parts) for parts in logprobs]

    return run


def _peer(folder: Path, attention: str) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def static(work: Work, folder: Path) -> Callable[[], tuple[Answers, list[np.ndarray]]]:
    from transformers import StoppingCriteria, StoppingCriteriaList

    model = _peer(folder, "sdpa")

    class Lengths(StoppingCriteria):  # type: ignore[misc]
        """A row has ended when it has its own length."""

        def __init__(self, num_prompt: int, lengths: np.ndarray) -> None:
            self.ends = torch.from_numpy(num_prompt + lengths)

        def __call__(self, input_ids: torch.Tensor, scores: Any, **more: Any) -> torch.Tensor:
            return input_ids.shape[1] >= self.ends

    def batch(indices: np.ndarray) -> Answers:
        prompts = [work.prompts[i // GROUP_SIZE] for i in indices]
        width = max(map(len, prompts))
        tokens = torch.zeros(len(indices), width, dtype=torch.int64)
        mask = torch.zeros_like(tokens)
        for row, prompt in enumerate(prompts):
            tokens[row, width - len(prompt) :] = torch.from_numpy(prompt)
            mask[row, width - len(prompt) :] = 1
        lengths = work.lengths[indices]
        out = model.generate(
            tokens, attention_mask=mask, do_sample=False, max_new_tokens=int(lengths.max()),
            stopping_criteria=StoppingCriteriaList([Lengths(width, lengths)]),
        )  # fmt: skip
        return [row[width : width + n].numpy().astype(np.int32) for row, n in zip(out, lengths, strict=True)]

    def all_of(size: int) -> Answers:
        rows = np.arange(len(work.lengths))
        return [answer for part in np.split(rows, range(size, len(rows), size)) for answer in batch(part)]

    def seconds(size: int) -> float:
        begun = time.perf_counter()
        all_of(size)
        return time.perf_counter() - begun

    batch(np.arange(SLOTS // 8))
    best = min(SLOTS, SLOTS // 2, key=seconds)
    return lambda: (all_of(best), [])


def continuous(work: Work, folder: Path) -> Callable[[], tuple[Answers, list[np.ndarray]]]:
    from transformers import ContinuousBatchingConfig, GenerationConfig

    model = _peer(folder, "sdpa")
    settings = GenerationConfig(do_sample=False, max_new_tokens=MAX_NEW, eos_token_id=-1, pad_token_id=0)
    # A page of 32 tokens and room for all slots at their longest: nothing is ever preempted.
    pages = SLOTS * -(-(MAX_PROMPT + MAX_NEW) // 32)
    config = ContinuousBatchingConfig(
        page_size=32, num_blocks=pages, max_batch_tokens=4 * SLOTS, max_requests_per_batch=SLOTS,
    )  # fmt: skip

    def run() -> tuple[Answers, list[np.ndarray]]:
        answers: Answers = [np.zeros(0, np.int32)] * len(work.lengths)
        with model.continuous_batching_context_manager(
            generation_config=settings, continuous_batching_config=config
        ) as manager:
            for index, length in enumerate(work.lengths.tolist()):
                prompt = work.prompts[index // GROUP_SIZE].tolist()
                manager.add_request(prompt, request_id=str(index), max_new_tokens=length)
            for _ in answers:
                result = manager.get_result(timeout=120)
                answers[int(result.request_id)] = np.array(result.generated_tokens, np.int32)
        return answers, []

    return run


def compare(work: Work, folder: Path) -> dict[str, float]:
    ours, *theirs = (np.load(folder / f"{name}.npz") for name in ENGINES)
    equal = [
        float(np.mean(other["tokens"] == ours["tokens"])) if np.array_equal(other["lengths"], ours["lengths"]) else 0.0
        for other in theirs
    ]
    ends = np.cumsum(ours["lengths"])[:-1]
    model, worst = _peer(folder, "sdpa"), 0.0
    answers = zip(np.split(ours["tokens"], ends), np.split(ours["logprobs"], ends), strict=True)
    for index, (tokens, logprobs) in enumerate(answers):
        if index % GROUP_SIZE:
            continue  # One of each group: they are greedy, so the others say the same.
        prompt = work.prompts[index // GROUP_SIZE]
        with torch.inference_mode():
            logits = model(torch.from_numpy(np.concatenate([prompt, tokens])[None].astype(np.int64))).logits[0]
        expected = torch.log_softmax(logits, -1)[np.arange(len(tokens)) + len(prompt) - 1, tokens].numpy()
        worst = max(worst, float(np.abs(expected - logprobs).max()))
    return {"greedy_equal_ratio": min(equal), "logprob_difference_millionths": 1e6 * worst}


ENGINES = {"headrace": headrace, "static": static, "continuous": continuous}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=[*ENGINES, "compare"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("threads", type=int, nargs="?", default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.engine == "compare":
        print(json.dumps(compare(make_work(), options.folder)))
        return
    run = ENGINES[options.engine](make_work(), options.folder)
    answers, logprobs = run()
    np.savez(
        options.folder / f"{options.engine}.npz",
        tokens=np.concatenate(answers), lengths=[len(answer) for answer in answers],
        logprobs=np.concatenate(logprobs) if logprobs else np.zeros(0),
    )  # fmt: skip
    print("ready", flush=True)
    for _line in sys.stdin:
        begun = time.perf_counter()
        run()
        print(json.dumps({"seconds": time.perf_counter() - begun}), flush=True)


if __name__ == "__main__":
    main()
