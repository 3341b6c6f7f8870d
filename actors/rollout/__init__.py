"""Rollout: the generation engine and the actor around it. Importing this package imports no torch."""

from .actor import Rollout as Rollout
from .requests import Chunk as Chunk
from .requests import Request as Request
