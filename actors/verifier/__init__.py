"""Verifiers: actors that turn a response into a verdict."""

from .actor import RuleVerifier as RuleVerifier
