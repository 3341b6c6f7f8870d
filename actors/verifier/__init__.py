"""Verifiers: actors that turn a response into a verdict."""

from .actor import RuleVerifier as RuleVerifier
from .case import Case as Case
from .text_verifier import TextVerifier as TextVerifier
