"""What holds for all tests: one thread per process, no network, properties that are checked the same way each time."""

import os

# Read when torch and transformers are first imported, here and in the processes that tests start.
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["PYTHONSAFEPATH"] = "1"

import hypothesis

# The same examples each time; `bin/test --hypothesis-profile explore` looks for others.
hypothesis.settings.register_profile("headrace", deadline=None, derandomize=True)
hypothesis.settings.register_profile("explore", deadline=None, derandomize=False, max_examples=300)
hypothesis.settings.load_profile("headrace")
