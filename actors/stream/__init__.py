"""The stream between rollout and trainer: what may be started, what is trained next, and where every group is."""

from .pool import StreamPool as StreamPool
