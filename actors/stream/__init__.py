"""The stream between rollout and trainer: who may start, who is trained next, and where every group is."""
