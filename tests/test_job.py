"""cluster.toml as a job: the default one, its round trip, contradictions, resuming, and what a check costs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import orjson
import pytest

from headrace.actors.job import TABLES, Job, load_job
from headrace.actors.job_checks import ROLES
from headrace.runtime.rundir import RunDirectory
from headrace.runtime.toml import ConfigError

CLUSTER = Path(__file__).parents[1] / "cluster.toml"


def message(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_job(CLUSTER, overrides)
    return str(caught.value)


def job_in(tmp_path: Path, *overrides: str) -> Job:
    return load_job(CLUSTER, [f"run.directory={tmp_path}", *overrides])


def test_the_default_job_has_every_role_in_a_process_of_its_own_where_it_matters() -> None:
    job = load_job(CLUSTER)
    homes = {name: spec.node for name, spec in job.cluster.actors.items()}
    assert set(homes) == {*ROLES, "balancer"}
    assert {homes[name] for name in ("controller", "pool", "evaluator")} == {"root"}
    assert len({homes[name] for name in ("rollout", "trainer", "verifier", "reward")} - {"root"}) == 4


def test_actors_receive_the_tables() -> None:
    job = load_job(CLUSTER, ["rl.max_new_tokens=77", "run.seed=5"])
    for spec in job.cluster.actors.values():
        for name in TABLES:
            assert getattr(spec.instance, name, getattr(job, name)) is getattr(job, name)
        assert getattr(spec.instance, "run", job.run) is job.run
    assert job.rl.max_new_tokens == 77
    assert job.run.seed == 5


@pytest.mark.parametrize(
    "overrides", [[], ["rl.learning_rate=1e-5", 'nodes.rollout.env={X="a\\"b"}', "run.name=it.s-1"]]
)
def test_the_resolved_configuration_loads_to_an_equal_job(overrides: list[str], tmp_path: Path) -> None:
    job = load_job(CLUSTER, overrides)
    path = tmp_path / "config.toml"
    path.write_text(job.to_toml())
    again = load_job(path)
    assert again == job
    assert again.to_toml() == job.to_toml()


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["rl.group_sise=4"], '--set rl.group_sise=4: [rl] group_sise: unknown key; did you mean "group_size"?'),
        (["rl.group_size=0"], "[rl] group_size: must be greater than or equal to 1, got 0"),
        (["rl.group_size=1"], "[rl] min_group_size: must be at most group_size (1), got 2"),
        (["rl.min_group_size=1"], "[rl] min_group_size: must be at least 2 for dapo, which compares the responses"),
        (["rl.algorithm=vapo"], "[actors] critic: missing; vapo needs a critic: add [actors.critic] with class = "),
        (["rl.algorithm=dappo"], '[rl] algorithm: must be a built-in algorithm or "module:Name" of your own, got'),
        (["rl.algorithm=my_own:Mine"], "[rl] algorithm: there is no module my_own; is its folder on PYTHONPATH?"),
        (["rl.algorithm=dappo"], 'got "dappo"; did you mean "dapo"?'),
        (["algorithm.clip_hi=0.3"], '[algorithm] clip_hi: unknown key; did you mean "clip_high"?'),
        (["algorithm.dual_clip=1.2"], "[algorithm] dual_clip: must be 0 or above 1 + clip_high (1.28), got 1.2"),
        (["rl.groups_per_step=0"], "[rl] groups_per_step: must be greater than or equal to 1, got 0"),
        (["rl.mini_batches=17"], "[rl] mini_batches: must be at most groups_per_step (16), got 17"),
        (["rl.min_group_size=9"], "[rl] min_group_size: must be at most group_size (8), got 9"),
        (["rl.max_staleness=-1"], "[rl] max_staleness: must be greater than or equal to 0, got -1"),
        (["actors.pool.capacity=8"], "--set actors.pool.capacity=8: [actors.pool] capacity: must hold a batch"),
        (["actors.pool.capacity=48"], "up to 64 groups in the system, and a pool of 48 could fill up"),
        (["rl.max_staleness=9"], "set capacity to 160 or more, or lower max_staleness"),
        (
            ["actors.trainer.publish_fp8=true", 'actors.rollout.engine="openai"', 'actors.rollout.base_url="http://a:1"'],
            "FP8 comes only to workers of one rank",
        ),
        (["rl.max_new_tokens=500"], "set that to 529 or more, or this to 227 or less"),
        (["model.max_positions=64"], "prompts of 29 and responses of 96 tokens don't fit into [model] max_positions"),
        (["model.vocab_size=10"], "[model] vocab_size: must be at least"),
        (["model.num_kv_heads=3"], "--set model.num_kv_heads=3: [model] num_kv_heads: num_heads must be a multiple of"),
        (["model.num_experts_per_tok=9"], "[model] num_experts_per_tok: must be at most num_experts, got 9 of 8"),
        (["actors.trainer.class=headrace.actors.trainer:Trainr"], 'has no class Trainr; did you mean "Trainer"?'),
        (["actors.trainer.class=headrace.actors.trainr:Trainer"], 'did you mean "headrace.actors.trainer"?'),
        (["actors.trainer.node=gpu"], 'there is no node "gpu"; add [nodes.gpu], or take one of root, rollout'),
        (["evaluation.num_problems=zero"], '[evaluation] num_problems: must be a valid integer, got "zero"'),
    ],
)  # fmt: skip
def test_each_contradiction_gets_one_message(overrides: list[str], expected: str) -> None:
    text = message(*overrides)
    assert expected in text
    assert "\n" not in text


def test_a_mistake_in_the_file_names_its_line(tmp_path: Path) -> None:
    lines = CLUSTER.read_text().splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("group_size"))
    lines[at] = "group_sise = 8"
    path = tmp_path / "cluster.toml"
    path.write_text("\n".join(lines))
    with pytest.raises(ConfigError) as caught:
        load_job(path)
    assert str(caught.value) == f'{path}:{at + 1}: [rl] group_sise: unknown key; did you mean "group_size"?'


def test_a_missing_role_is_named(tmp_path: Path) -> None:
    path = tmp_path / "cluster.toml"
    path.write_text(CLUSTER.read_text().replace("[actors.verifier]", "[actors.verifyer]"))
    with pytest.raises(ConfigError, match=r'verifier: missing; the controller needs .*; did you mean "verifyer"\?'):
        load_job(path)


def test_describe_names_every_actor_once() -> None:
    text = load_job(CLUSTER).describe()
    assert all(text.count(f" {role}") >= 1 for role in ROLES)
    assert "16 groups of 8" in text


def test_a_run_is_opened_resumed_and_refused(tmp_path: Path) -> None:
    job = job_in(tmp_path)
    with job.open_run() as run:
        assert load_job(run.config) == job
        with pytest.raises(ConfigError, match="in use by process"):
            job.open_run(resume=True)
    with pytest.raises(ConfigError, match="interrupted run; continue it with --resume"):
        job.open_run()
    with job.open_run(resume=True) as run:
        assert run.resumed
    run.summary.write_bytes(orjson.dumps({"ok": True, "steps": 3}))
    for resume in (False, True):
        with pytest.raises(
            ConfigError, match=r"finished.* \(3 steps\); start another run with --set run\.name=default-2"
        ):
            job.open_run(resume=resume)


def test_a_resumed_run_keeps_what_it_learns_and_may_change_who_does_it(tmp_path: Path) -> None:
    job_in(tmp_path).open_run().close()
    changed = job_in(tmp_path, "rl.steps=999", "task.bias=0.1")
    with pytest.raises(ConfigError) as caught:
        changed.open_run(resume=True)
    assert str(caught.value).startswith(f"{tmp_path}/default/config.toml: the run was started with ")
    assert "(and 1 more); resume it with the settings it had, or start another with --set run.name=NAME" in str(
        caught.value
    )
    moved = job_in(tmp_path, "actors.reward.node=verifier", "nodes.rollout.threads=2")
    with moved.open_run(resume=True) as run:
        assert load_job(run.config) == moved
    RunDirectory.resume(tmp_path / "default").close()


def test_a_check_loads_neither_torch_nor_rich() -> None:
    code = (
        "import sys; from headrace.actors.job import load_job; load_job(sys.argv[1]).describe();"
        "print({'torch', 'rich', 'tensorboard'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code, str(CLUSTER)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
