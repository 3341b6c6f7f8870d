"""An actor runtime on asyncio and ZeroMQ: typed messages between supervised actors in supervised processes.

    actor.py      the contract: fields, start, @message, stop          mailbox.py    bounded lanes, credits
    ref.py        call / cast / stream                                 cell.py       one actor at work
    system.py     the root: actors, restarts                           supervisor.py restart or give up
    nodes.py      the root's node processes                            launcher.py   processes, pidfd
    node.py       one process: sends, delivers, answers                transport.py  ZeroMQ sockets
    frame.py      envelopes that travel together                       codec.py      what may travel
    waits.py      who waits for whom                                   process.py    what runs in a node's process
    pool.py       leased priority queue with a journal                 exchange.py   weights by shared memory

It knows nothing of models, rewards or training, and imports no torch.
"""

from .actor import Actor as Actor
from .actor import message as message
from .codec import wire as wire
from .deadline import timeout as timeout
from .directory import Status as Status
from .launcher import NodeSpec as NodeSpec
from .mailbox import Lane as Lane
from .ref import Ref as Ref
from .supervisor import RestartPolicy as RestartPolicy
from .system import System as System
