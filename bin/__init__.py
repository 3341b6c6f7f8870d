"""headrace: reinforcement learning for mixture-of-experts reasoning models, on supervised actors.

    from headrace import Actor, System, message      the actor runtime, usable alone
    headrace.actors                                  what a training run is made of
    headrace.kernels                                 operations for balancing tokens over experts

The names below are loaded when they are first used: importing the package loads nothing else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

__all__ = [
    "Actor", "Lane", "NodeSpec", "Ref", "RestartPolicy", "Status", "System", "message", "timeout", "wire",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import runtime

    return getattr(runtime, name)
