"""How many responses may be live at once: as many as the KV memory has shown to bear. Knows nothing of pages."""

from __future__ import annotations

SHRINK = 0.75
"""Of the responses that were live when one had to give way, so many may be live after it."""

GROW_STEPS = 32
"""Steps without that, after which an eighth more may be."""


class LiveCap:
    """Shrinks at once when a response had to give its pages back, and grows slowly again."""

    def __init__(self, num_slots: int) -> None:
        self._num_slots = num_slots
        self._calm_steps = 0
        self.limit = num_slots
        """Live responses, at most; at least 1"""

    def preempted(self, num_live: int) -> None:
        """A response gave way; `num_live` are left."""
        self.limit = max(1, min(self.limit, int(num_live * SHRINK)))
        self._calm_steps = 0

    def stepped(self) -> None:
        """A step has been made."""
        self._calm_steps += 1
        if self._calm_steps >= GROW_STEPS and self.limit < self._num_slots:
            self._calm_steps = 0
            self.limit = min(self._num_slots, self.limit + max(1, self.limit // 8))
