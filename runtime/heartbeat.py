"""Heartbeats between nodes that no pidfd joins: sends them, and tells when a peer falls silent.

    every interval: a beat to each watched peer        four times as often: what to think of each -> on_change

Each side watches the other: the root its remote nodes, a remote node its root. Any message counts as a sign of life. A
loop that was itself at a standstill judges nobody by that time. What follows from a change is the owner's business.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from .detector import Detector, HeartbeatPolicy, State
from .transport import Transport

CHECKS_PER_INTERVAL = 4

OnChange = Callable[[str, State, float], None]
"""Peer, what to think of it now, seconds of silence."""


class Heartbeats:
    """Watches peers of one transport until `close`."""

    def __init__(self, transport: Transport, policy: HeartbeatPolicy, on_change: OnChange) -> None:
        self._transport = transport
        self._policy = policy
        self._on_change = on_change
        self._detectors: dict[str, Detector] = {}
        self._states: dict[str, State] = {}
        self._loop = asyncio.get_running_loop()
        self._checks = 0
        self._checked = self._loop.time()
        self._timer: asyncio.TimerHandle | None = None
        transport.on_beat = self._on_beat

    def watch(self, peer: str) -> None:
        """From now on; the transport is connected to it."""
        self._detectors[peer] = Detector(self._policy, self._loop.time())
        self._states[peer] = "alive"
        self._transport.beat(peer)
        if self._timer is None:
            self._checked = self._loop.time()
            self._again()

    def forget(self, peer: str) -> None:
        """It is gone, or was never watched."""
        self._detectors.pop(peer, None)
        self._states.pop(peer, None)

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._detectors.clear()

    def rows(self) -> list[dict[str, object]]:
        """One per watched peer: its state, its silence in seconds, phi."""
        now = self._loop.time()
        return [
            {"peer": peer, "state": self._states[peer], "silence_s": detector.silence(now), "phi": detector.phi(now)}
            for peer, detector in self._detectors.items()
        ]

    def _on_beat(self, peer: str) -> None:
        detector = self._detectors.get(peer)
        if detector is not None:
            detector.beat(self._loop.time())

    def _again(self) -> None:
        self._timer = self._loop.call_later(self._policy.interval_s / CHECKS_PER_INTERVAL, self._check)

    def _check(self) -> None:
        now = self._loop.time()
        since, self._checked = now - self._checked, now
        stalled = since > self._policy.interval_s
        self._checks += 1
        if self._checks % CHECKS_PER_INTERVAL == 0 or stalled:
            for peer in self._detectors:
                self._transport.beat(peer)
        for peer, detector in list(self._detectors.items()):
            if stalled:
                detector.forgive(since, now)
            heard = self._transport.heard(peer)
            if heard is not None:
                detector.heard(heard)
            state = detector.state(now)
            if state != self._states.get(peer):
                self._states[peer] = state
                self._on_change(peer, state, detector.silence(now))
        if self._detectors:
            self._again()
        else:
            self._timer = None
