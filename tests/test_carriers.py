"""What a cluster file says about the way of the weights, before anything is started."""

from __future__ import annotations

from pathlib import Path

import pytest

from headrace.actors.job import load_job
from headrace.runtime.exchange.carrier import choose
from headrace.runtime.exchange.header import Seat
from headrace.runtime.toml import ConfigError

CLUSTER = Path(__file__).parent.parent / "cluster.toml"


def test_check_names_the_carrier_of_each_worker():
    lines = load_job(CLUSTER).describe().splitlines()
    assert "  weights trainer -> rollout: shm, the memory of this host" in lines
    lines = load_job(CLUSTER, ["actors.controller.carrier=tree"]).describe().splitlines()
    assert "  weights trainer -> rollout: tree, ZeroMQ, from member to member" in lines


@pytest.mark.parametrize("carrier", ("nccl", "ipc"))
def test_a_carrier_that_can_not_serve_is_refused_before_anything_is_started(carrier: str):
    with pytest.raises(ConfigError, match=rf"carrier.*'{carrier}' does not serve .*possible: shm"):
        load_job(CLUSTER, [f"actors.controller.carrier={carrier}"])


def test_the_best_carrier_is_chosen_for_each_pair():
    every = ("shm", "tree", "ipc", "nccl")
    trainer = Seat(host="a", gpu="1", carriers=every, address="tcp://a")
    assert choose(trainer, Seat(host="a", gpu="1", carriers=every)) == "ipc"
    assert choose(trainer, Seat(host="a", gpu="2", carriers=every)) == "nccl"
    assert choose(trainer, Seat(host="b", gpu="3", carriers=every)) == "nccl"
    assert choose(trainer, Seat(host="a", carriers=every)) == "shm"
    assert choose(trainer, Seat(host="b", carriers=every)) == "tree"
    assert choose(trainer, Seat(host="a", gpu="1", carriers=("shm", "tree"))) == "shm"
