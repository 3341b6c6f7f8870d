"""Weights from the process that makes them to the processes that use them.

header.py    what is said of them: manifests, routes           payload.py   how they are laid out, verified
carrier.py   the contract of carriers, and which serves whom
shm.py       one host: buffers that both sides have mapped
"""

from .header import Manifest as Manifest
from .header import Route as Route
from .header import TensorSpec as TensorSpec
from .shm import Publisher as Publisher
from .shm import Receiver as Receiver
