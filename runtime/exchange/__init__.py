"""Weights from the process that makes them to the processes that use them.

header.py        what is said of them: manifests, routes      payload.py      how they are laid out, and verified
coordinator.py   brings each version to each member           intake.py       a member's end: receives, prepares
carrier.py       the contract of carriers, who serves whom    convoy.py       leads those that all take part in
shm.py           one host: memory that both sides have mapped (mapped.py)
tree.py          hosts without GPUs: over ZeroMQ, from member to member (shelf.py serves)
ipc.py           two processes on one GPU, by CUDA IPC (device.py, cuda.py)
nccl.py          between GPUs, each end under a watchdog (communicator.py, lane.py, device_transfer.py)
plan.py          from the ranks that hold to the ranks that want (mesh.py, holding.py), box by box (boxes.py, family.py)
transfer.py      does it bucket by bucket (buckets.py, staging.py, fp8.py), over any link; zmq_link.py is one
"""

from .coordinator import Exchange as Exchange
from .header import Manifest as Manifest
from .header import Route as Route
from .header import Seat as Seat
from .header import TensorSpec as TensorSpec
from .header import together as together
from .intake import Intake as Intake
from .member import Patience as Patience
from .shm import Publisher as Publisher
from .shm import Receiver as Receiver
