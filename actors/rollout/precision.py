"""Which phase of generation computes in FP8, and what happens when that moves the policy: settings, schedule, watch.

    [actors.rollout]
    precision = { prefill = "fp8", decode = "fp8", kl_bound = 1e-2 }

    new version --> some new answers are followed to their end --> both policies read them --> token KL(fp8 || full)
      above the bound: every phase in full precision, from the next step on
      within it, `recover` versions in a row: FP8 again

FP8 weights are functions of a version's weights (model/linear.py), so nothing adds up over versions. Knows nothing of
how tokens are computed: reading is an argument.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from annotated_types import Ge, Gt

from ...runtime.codec import wire
from .requests import Chunk, Request

if TYPE_CHECKING:
    from torch import Tensor

Kind = Literal["full", "fp8"]
Phase = Literal["prefill", "decode", "score"]
PHASES: tuple[Phase, ...] = ("prefill", "decode", "score")

FP8_BITS, FULL_BITS = 8, 32


@wire
@dataclass(frozen=True, kw_only=True)
class Precision:
    """What the weights of experts and attention are held in; router, norms, embedding and head stay as they are."""

    prefill: Kind = "full"
    """Reading prompts, and half-written answers that go on."""
    decode: Kind = "full"
    """Writing answers: what is sampled, and its log-probabilities."""
    score: Kind = "full"
    """Log-probabilities of given sequences."""
    activations: Kind = "full"
    """Of the products with FP8 weights. On CUDA only FP8 activations save time: both sides go to the tensor cores."""
    kl_bound: Annotated[float, Gt(0)] = 1e-2
    """Largest mean token KL(fp8 || full), in nats, over a sample of the engine's own answers; past it FP8 is left. A
    token that FP8 sends to another expert may have 1 by itself, so leave room above the mean over many tokens."""
    sample: Annotated[int, Ge(0)] = 8
    """Answers per version that are measured; 0 measures none, and never falls back."""
    recover: Annotated[int, Ge(1)] = 2
    """Versions in a row that must pass before FP8 comes back."""

    def __post_init__(self) -> None:
        if self.activations == "fp8" and not self.uses_fp8:
            raise ValueError(
                'activations are "fp8", but no phase has FP8 weights to multiply them with; set prefill or decode to '
                '"fp8", or leave activations out'
            )

    @property
    def uses_fp8(self) -> bool:
        return "fp8" in (self.prefill, self.decode, self.score)


class Schedule:
    """What each phase computes in now."""

    def __init__(self, settings: Precision) -> None:
        self.settings = settings
        self.fallen = False
        """Whether all phases are in full precision because FP8 was too far from it."""
        self.token_kl: float | None = None
        """As last measured, in nats."""
        self.falls = 0
        self._passed = 0

    def of(self, phase: Phase) -> Kind:
        wanted: Kind = getattr(self.settings, phase)
        return "full" if self.fallen else wanted

    @property
    def mixes(self) -> bool:
        """Whether prefill and decode may share a pass."""
        return self.of("prefill") == self.of("decode")

    def measured(self, version: int, token_kl: float) -> dict[str, Any] | None:
        """Takes the token KL of a version, in nats; a number that is not finite is above any bound. Returns what to
        tell if the phases have changed by it."""
        self.token_kl = token_kl
        passed = math.isfinite(token_kl) and token_kl <= self.settings.kl_bound
        self._passed = self._passed + 1 if passed else 0
        fallen = not passed or (self.fallen and self._passed < self.settings.recover)
        if fallen == self.fallen:
            return None
        self.fallen = fallen
        self.falls += fallen
        return {"version": version, "token_kl": token_kl, "bound": self.settings.kl_bound, "now": self.describe()}

    def describe(self) -> str:
        """For people and for a response's origin: "full", or what each phase has."""
        now = {phase: self.of(phase) for phase in PHASES}
        if set(now.values()) == {"full"}:
            return "full"
        suffix = ", activations fp8" if self.settings.activations == "fp8" else ""
        return ", ".join(f"{phase} {kind}" for phase, kind in now.items()) + suffix

    def stats(self) -> dict[str, float]:
        """For `Rollout.stats`, by the names of actors/report.py."""
        bits = {phase: FP8_BITS if self.of(phase) == "fp8" else FULL_BITS for phase in PHASES}
        known = {} if self.token_kl is None else {"fp8_token_kl_nats": self.token_kl}
        return {**{f"precision_bits/{phase}": float(n) for phase, n in bits.items()}, **known}


Read = Callable[[Sequence[np.ndarray], Kind], "Tensor"]
"""(sequences, int [n] each; in what) -> logits after every token of all of them, [T, V]"""


class Watch:
    """Follows the first answers that are begun under a version, and measures when the last of them has ended.

    Which they are does not depend on how long they get. At most `sample` are held, and only until then.
    """

    def __init__(self, schedule: Schedule, read: Read) -> None:
        self._schedule = schedule
        self._read = read
        self._measured = -1
        self._followed: dict[tuple[int, int], list[np.ndarray]] = {}
        self._prompts: dict[int, np.ndarray] = {}
        self._ended: list[tuple[int, np.ndarray]] = []
        """Tokens of the prompt, and all tokens"""

    def begin(self, requests: Iterable[Request], version: int) -> None:
        """These were submitted, while the engine holds `version`."""
        if version == self._measured:
            return
        for request in requests:
            prefixes = request.prefixes or [request.prompt[:0]] * len(request.members)
            for member, prefix in zip(request.members, prefixes, strict=True):
                if len(self._followed) + len(self._ended) >= self._schedule.settings.sample:
                    return
                self._followed[request.key, member] = [prefix]
                self._prompts[request.key] = request.prompt

    def take(self, chunks: Iterable[Chunk]) -> None:
        """These were handed out."""
        for chunk in chunks if self._followed else ():
            tokens = self._followed.get((chunk.key, chunk.member))
            if tokens is None:
                continue
            tokens.append(chunk.tokens)
            if chunk.finish:
                prompt = self._prompts[chunk.key]
                if sum(map(len, tokens)):
                    self._ended.append((len(prompt), np.concatenate([prompt, *tokens])))
                del self._followed[chunk.key, chunk.member]

    def cancel(self, key: int) -> None:
        """The request is forgotten."""
        for followed in [name for name in self._followed if name[0] == key]:
            del self._followed[followed]
        self._prompts.pop(key, None)

    def look(self, version: int) -> dict[str, Any] | None:
        """Measures if there is something to measure and nothing to wait for; returns what `Schedule.measured` says."""
        if self._followed or not self._ended:
            return None
        answers, self._ended, self._measured = self._ended, [], version
        self._prompts.clear()
        return self._schedule.measured(version, self._token_kl(answers))

    def _token_kl(self, answers: list[tuple[int, np.ndarray]]) -> float:
        """Mean over the answers' tokens of the KL of the two distributions that they were drawn from."""
        sequences = [tokens for _, tokens in answers]
        drawn = np.concatenate([np.arange(1, len(tokens) + 1) >= prompt for prompt, tokens in answers])
        drawn[np.cumsum([len(tokens) for tokens in sequences]) - 1] = False  # What comes after the last was not drawn.
        fp8, full = (self._read(sequences, kind)[drawn].double().log_softmax(-1) for kind in ("fp8", "full"))
        return float((fp8.exp() * (fp8 - full)).sum(-1).mean())
