"""Rewards: actors that turn verdicts into numbers."""

from .actor import Reward as Reward
