"""An actor runtime on asyncio and ZeroMQ: typed messages between supervised actors in supervised processes.

    what you write   actor.py the contract: fields, start, @message, stop  ref.py call / cast / stream
                     deadline.py timeouts that travel                      codec.py what may travel
    on the way       node.py one process: sends, delivers, answers         routes.py where to, on whose credit
                     waits.py who waits for whom                           doors.py where messages come in
                     mailbox.py bounded lanes, credits                     cell.py one actor at work
    the wire         protocol.py, frame.py what a message looks like       transport.py what carries it
                     zmq_transport.py, outlet.py, inbox.py over ZeroMQ     memory_transport.py in memory, for tests
                     curve.py keys, for tcp
    large arrays     lending.py, borrow.py to nodes of this host           arena.py, memfd.py the memory they share
    supervision      system.py the root                                    strategy.py who restarts with whom
                     children.py, hosting.py carry it out                  supervisor.py policies and budgets
                     directory.py who lives where                          memory.py what a restart keeps
    processes        nodes.py all nodes of a system                        launcher.py, zygote.py start them
                     process.py, agent.py inside a node                    exits.py how they end
    watching         vigil.py, liveness.py loops that hang                 detector.py, heartbeat.py hosts out of reach
                     inspector.py, stacks.py look into a blocked process   survey.py asks all nodes
    worker groups    worker_group.py ranks addressed as one                worker.py one rank    gang.py from files
                     dispatch.py protocols, layout.py, batches.py          remote_batch.py what stays with the ranks
    looking          repl/ what bin/attach asks of all this
    beside           pool.py leased priority queue with a journal          exchange/ weights to who uses them

It knows nothing of models, rewards or training, and imports no torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .actor import Actor as Actor
    from .actor import message as message
    from .codec import wire as wire
    from .curve import Keys as Keys
    from .deadline import timeout as timeout
    from .detector import HeartbeatPolicy as HeartbeatPolicy
    from .directory import Status as Status
    from .exits import Exit as Exit
    from .group import ActorGroup as ActorGroup
    from .inspector import inspect_node as inspect_node
    from .launcher import NodeSpec as NodeSpec
    from .mailbox import Lane as Lane
    from .ref import Ref as Ref
    from .supervisor import RestartPolicy as RestartPolicy
    from .system import System as System

_MODULES = {
    "Actor": "actor", "ActorGroup": "group", "Exit": "exits", "HeartbeatPolicy": "detector", "Keys": "curve",
    "Lane": "mailbox", "NodeSpec": "launcher", "Ref": "ref", "RestartPolicy": "supervisor", "Status": "directory",
    "System": "system", "inspect_node": "inspector", "message": "actor", "timeout": "deadline", "wire": "codec",
}  # fmt: skip
"""Imported when they are asked for: a node needs not all of them, and what attaches to a run needs none."""


def __getattr__(name: str) -> Any:
    module = _MODULES.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{module}", __name__), name)
