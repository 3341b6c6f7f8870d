"""A whole job whose rollout is a completions server: it is given every version, and its faults make no rewards."""

from __future__ import annotations

from pathlib import Path

import pytest
from openai_server import serving
from tiny_job import CLUSTER, SETTINGS, check_rows, launch

from headrace.actors.job import load_job
from headrace.actors.model import checkpoint
from headrace.actors.model.qwen3_moe import Qwen3Moe


@pytest.mark.slow
def test_a_job_on_a_completions_server(tmp_path: Path) -> None:
    job = load_job(CLUSTER, [f"{key}={value}" for key, value in SETTINGS.items()])
    folder = tmp_path / "base"
    weights = {name: p.detach().numpy() for name, p in Qwen3Moe(job.model, seed=9).named_parameters()}
    checkpoint.save(folder, job.model, weights)
    with serving(folder, job.task.eos_id) as server:
        settings = {
            "actors.rollout.engine": "openai", "actors.rollout.base_url": server.url,
            "actors.rollout.server.dialect": "sglang", "actors.rollout.server.backoff_s": 0.01,
            "rl.min_group_size": 4,
        }  # fmt: skip
        with launch(tmp_path, settings) as launched:
            launched.wait_for_step(1)
            server.misbehave("NaN", times=3, after=1)
            server.misbehave("truncated", times=3, after=2)
            assert launched.finish(120) == 0, launched.errors
        log = server.log()
    check_rows(launched, 6)
    assert launched.summary["ok"]
    assert log["version"] == "7" and log["POST /update_weights_from_disk"] >= 7
    assert log.get("while paused", 0) == 0
    assert launched.summary["restarts"] == {}
    (failed,) = launched.events("group_failed")
    assert failed["reason"].startswith("bad_logprobs: ")
    assert launched.rows()[-1]["failed_groups"] >= 1
    assert launched.left_behind() == []
