"""Training: the learner, its algorithms, and the actor around it. Importing this package imports no torch."""

from .actor import Trainer as Trainer
