"""The runner against full forward passes of the training model: pages in any order, shared, chunked, mixed."""

import numpy as np
import pytest
import torch

from headrace.actors.model import paged_decode
from headrace.actors.model.config import ModelConfig
from headrace.actors.model.decode import shapes
from headrace.actors.model.qwen3_moe import Qwen3Moe
from headrace.actors.rollout.runner import Batch
from headrace.actors.rollout.single import SingleRunner

CONFIG = ModelConfig(
    vocab_size=13, hidden_size=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, num_experts=4,
    moe_intermediate_size=8, max_positions=64, initializer_range=0.3,
)  # fmt: skip
MODEL = Qwen3Moe(CONFIG, seed=1)
WEIGHTS = {name: p.detach().numpy() for name, p in MODEL.named_parameters()}
PAGE = 4


def full_logits(tokens):
    tokens = torch.tensor(np.asarray(tokens, np.int64))
    with torch.no_grad():
        return MODEL.logits(MODEL(tokens, torch.arange(len(tokens)), [len(tokens)]).hidden).numpy()


def runner(num_pages=64, **changes):
    made = SingleRunner(CONFIG, num_pages=num_pages, page_tokens=PAGE, **changes)
    made.load(made.prepare(WEIGHTS))
    return made


def batch(parts, num_decode):
    """`parts`: (tokens, first position, table) of each sequence."""
    width = max(len(table) for _, _, table in parts)
    tables = np.full((len(parts), width), -1, np.int32)
    for row, (_, _, table) in zip(tables, parts, strict=True):
        row[: len(table)] = table
    return Batch(
        tokens=np.concatenate([t for t, _, _ in parts]).astype(np.int64),
        positions=np.concatenate([first + np.arange(len(t)) for t, first, _ in parts]).astype(np.int64),
        counts=np.array([len(t) for t, _, _ in parts]),
        tables=tables,
        num_decode=num_decode,
        wanted=np.arange(len(parts)),
    )


def test_shapes_are_those_of_the_model():
    assert shapes(CONFIG) == {name: p.shape for name, p in WEIGHTS.items()}


@pytest.mark.parametrize(("chunk", "safe_score"), [(1, 60), (3, 60), (4, 0), (50, 60)])
def test_mixed_chunked_batches_over_scattered_pages_equal_full_forward(chunk, safe_score, monkeypatch):
    monkeypatch.setattr(paged_decode, "SAFE_SCORE", safe_score)
    random = np.random.default_rng(chunk)
    sequences = [random.integers(1, 13, n) for n in (5, 17, 1, 30, 9, 22)]
    free = list(random.permutation(64))
    tables = [[free.pop() for _ in range(-(-len(s) // PAGE))] for s in sequences]
    running, at = runner(routes=True), [0] * len(sequences)
    while any(a < len(s) for a, s in zip(at, sequences, strict=True)):
        # The odd ones decode token by token, the even ones come in chunks; they begin at different times.
        steps = [
            (i, 1 if i % 2 else chunk) for i, s in enumerate(sequences) if at[i] < len(s) and random.random() < 0.8
        ]
        steps = [(i, min(n, len(sequences[i]) - at[i])) for i, n in steps]
        if not steps:
            continue
        steps.sort(key=lambda s: s[1] != 1)
        parts = [(sequences[i][at[i] : at[i] + n], at[i], tables[i]) for i, n in steps]
        out = running.run(batch(parts, sum(n == 1 for _, n in steps)))
        assert out.routes.shape == (sum(n for _, n in steps), 2, 2) and out.routes.max() < 4
        for row, (i, n) in zip(out.logits.numpy(), steps, strict=True):
            at[i] += n
            np.testing.assert_allclose(row, full_logits(sequences[i][: at[i]])[-1], atol=1e-4)


@pytest.mark.parametrize(("safe_score", "few_pages"), [(0, 0), (60, 0), (60, 256)])
def test_a_shared_beginning_is_read_by_all(safe_score, few_pages, monkeypatch):
    """Two prompts with 11 and 3 answers; their full pages are shared, and one of them by all."""
    monkeypatch.setattr(paged_decode, "SAFE_SCORE", safe_score)
    monkeypatch.setattr(paged_decode, "FEW_BLOCKS", few_pages)
    random = np.random.default_rng(0)
    common, answers = random.integers(1, 13, 4), random.integers(1, 13, (14, 5))
    prompts = [np.concatenate([common, random.integers(1, 13, n)]) for n in (9, 4)]
    running, free = runner(), list(random.permutation(64))
    tables = [[free.pop() for _ in range(4)], [free.pop() for _ in range(2)]]
    tables[1][0] = tables[0][0]
    for prompt, table in zip(prompts, tables, strict=True):
        running.run(batch([(prompt, 0, table)], 0))
    of_answer = [0] * 11 + [1] * 3
    own = [[*tables[p][: len(prompts[p]) // PAGE], *(free.pop() for _ in range(3))] for p in of_answer]
    running.copy_pages(np.full(11, tables[0][3]), np.array([table[3] for table in own[:11]]))
    for step in range(5):
        asked = range(14) if step < 3 else range(5, 13)
        parts = [(answers[i, step : step + 1], len(prompts[of_answer[i]]) + step, own[i]) for i in asked]
        out = running.run(batch(parts, len(parts)))
        for row, i in zip(out.logits.numpy(), asked, strict=True):
            whole = [*prompts[of_answer[i]], *answers[i, : step + 1]]
            np.testing.assert_allclose(row, full_logits(whole)[-1], atol=1e-4)


def test_bad_weights_are_refused_with_name_and_value():
    made = runner()
    with pytest.raises(FloatingPointError, match=r"lm_head\.weight is not finite"):
        made.prepare(WEIGHTS | {"lm_head.weight": np.full((13, 16), np.nan, np.float32)})
    with pytest.raises(ValueError, match=r"lm_head\.weight has shape \(13, 8\), expected \(13, 16\)"):
        made.prepare(WEIGHTS | {"lm_head.weight": np.zeros((13, 8), np.float32)})
    with pytest.raises(ValueError, match="extra has shape"):
        made.prepare(WEIGHTS | {"extra": np.zeros(1, np.float32)})
