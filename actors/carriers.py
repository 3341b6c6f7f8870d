"""Which carrier will bring the weights to each rollout worker, as far as the cluster file tells: for `--check`.

The trainer lays its weights out in the memory of its host; so far no rollout worker of a job holds them on a GPU, and
all nodes are on one host. Knows nothing of how weights travel: carrier.choose decides, here as in the run.
"""

from __future__ import annotations

from ..runtime.cluster import ClusterSpec
from ..runtime.exchange.carrier import choose
from ..runtime.exchange.header import Seat

WHAT = {
    "shm": "the memory of this host",
    "tree": "ZeroMQ, from member to member",
    "ipc": "CUDA IPC, within one GPU",
    "nccl": "NCCL, between GPUs",
}
"""Carriers, in words."""


def carriers(cluster: ClusterSpec, wanted: str) -> dict[str, str]:
    """Name of each rollout worker -> carrier from the trainer, or "openai" where a server is told to load them.

    Raises ValueError, with what would be possible, if the carrier that is `wanted` does not serve one.
    """
    from .rollout.actor import Rollout

    here = Seat(host="this host", address="beside its node's")
    found = {}
    for spec in cluster.actors.values():
        if isinstance(spec.instance, Rollout):
            found[spec.name] = "openai" if spec.instance.engine == "openai" else choose(here, here, wanted)
    return found


def described(found: dict[str, str]) -> list[str]:
    """A line for each worker."""
    return [
        f"  weights trainer -> {name}: "
        + ("the server's own call" if carrier == "openai" else f"{carrier}, {WHAT[carrier]}")
        for name, carrier in found.items()
    ]
