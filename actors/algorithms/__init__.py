"""Reinforcement learning as in the papers: one file each, run by the controller over the roles that it needs.

    dapo  vapo  ppo  grpo      what a step does: values, advantages, updates        (a page each)
    batch  advantages          what they compute with: responses, returns, GAE      (numpy)
    updates  losses            what a policy or a critic is asked to minimise       (losses: torch)

Importing this package imports no torch.
"""

from .advantages import adaptive_lambda as adaptive_lambda
from .advantages import gae as gae
from .advantages import group_advantages as group_advantages
from .advantages import returns_to_go as returns_to_go
from .advantages import whiten as whiten
from .algorithm import Algorithm as Algorithm
from .algorithm import Critic as Critic
from .algorithm import Metrics as Metrics
from .algorithm import Policy as Policy
from .algorithm import gather as gather
from .batch import Batch as Batch
from .updates import Objective as Objective
