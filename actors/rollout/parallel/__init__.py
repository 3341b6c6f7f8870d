"""A rollout worker over several ranks. Importing this package imports no torch."""
