"""Weights from the process that makes them to the processes that use them.

shm.py   one host: buffers that both sides have mapped
"""

from .shm import Manifest as Manifest
from .shm import Publisher as Publisher
from .shm import Receiver as Receiver
from .shm import TensorSpec as TensorSpec
