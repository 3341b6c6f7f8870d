"""Training: the learners of policy and critic, and the actors around them. Importing this package imports no torch."""

from .actor import Trainer as Trainer
from .critic import Critic as Critic
