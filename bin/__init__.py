"""headrace: reinforcement learning for mixture-of-experts reasoning models, on supervised actors.

    from headrace import Actor, System, message      the actor runtime, usable alone
    from headrace import open_cluster, run           a training job, or any cluster, inside your own program
    headrace.actors                                  what a training run is made of
    headrace.kernels                                 operations for balancing tokens over experts

The names below are loaded when they are first used: importing the package loads nothing else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .cluster import Cluster as Cluster
    from .cluster import Config as Config
    from .cluster import open_cluster as open_cluster
    from .cluster import run as run
    from .runtime import Actor as Actor
    from .runtime import Lane as Lane
    from .runtime import NodeSpec as NodeSpec
    from .runtime import Ref as Ref
    from .runtime import RestartPolicy as RestartPolicy
    from .runtime import Status as Status
    from .runtime import System as System
    from .runtime import message as message
    from .runtime import timeout as timeout
    from .runtime import wire as wire

__version__ = "0.1.0"

_OF_RUNTIME = (
    "Actor", "Lane", "NodeSpec", "Ref", "RestartPolicy", "Status", "System", "message", "timeout", "wire",
)  # fmt: skip
_OF_CLUSTER = ("Cluster", "Config", "open_cluster", "run")

__all__ = [*_OF_RUNTIME, *_OF_CLUSTER]


def __getattr__(name: str) -> Any:
    if name in _OF_RUNTIME:
        from . import runtime

        return getattr(runtime, name)
    if name in _OF_CLUSTER:
        from . import cluster

        return getattr(cluster, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
