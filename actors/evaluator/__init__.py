"""Evaluation on fixed problems."""

from .actor import Evaluation as Evaluation
from .actor import Evaluator as Evaluator
