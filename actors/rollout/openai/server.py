"""One server as a policy: it holds a version, answers requests with it, and takes a newer one between requests.

    armed ------ load ------> held: open requests end early -> updated -> armed, with the next version
      | a request is lost
      '--> doubtful -- before the next request: does it still hold the version? -- no: it is given again
                                                                                '- yes: armed

Tokens are of the version that the server held when they were requested: no request is open while it changes. Knows
nothing of retries of requests, or of where weights come from.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Any

from .answer import Answer
from .client import Client
from .faults import Fault
from .protocol import COMPLETIONS, completion_body, read_event
from .settings import ServerSettings
from .weights import SHORT_S, ServerWeights

ABORT_S = 5.0
"""How long answers that the server ends early may take to say so; then their connections are closed."""

MAX_BACKOFF_S = 10.0


@dataclass(eq=False, slots=True)
class _Open:
    """A request under way."""

    scope: asyncio.Timeout
    interrupted: bool = False

    def extend(self, wait_s: float) -> None:
        """It ends in `wait_s`, unless it is ending already."""
        if not self.interrupted and not self.scope.expired():
            self.scope.reschedule(asyncio.get_running_loop().time() + wait_s)

    def interrupt(self) -> None:
        self.extend(0.0)
        self.interrupted = True


class Server:
    """`say(event, **fields)` is told what an operator should know; `counts` are for statistics."""

    def __init__(
        self, client: Client, weights: ServerWeights, settings: ServerSettings, say: Callable[..., None]
    ) -> None:
        self._client = client
        self._weights = weights
        self._settings = settings
        self._say = say
        self.version = -1
        """That the server holds; -1 before the first."""
        self.counts: Counter[str] = Counter()
        """requests, events, tokens, prefilled_tokens"""
        self._loading = asyncio.Lock()
        self._armed = asyncio.Event()
        self._doubtful = False
        self._recovery: asyncio.Task[None] | None = None
        self._open: set[_Open] = set()
        self._none_open = asyncio.Event()
        self._none_open.set()

    @property
    def num_open(self) -> int:
        """Requests under way."""
        return len(self._open)

    @property
    def load_s(self) -> float:
        """Longest time of `load`: a recovery that is under way is waited for."""
        return 2 * (self._settings.update_s + ABORT_S) + SHORT_S

    async def close(self) -> None:
        if self._recovery is not None:
            self._recovery.cancel()
            await asyncio.wait({self._recovery})

    # Weights ------------------------------------------------------------------------------------------------

    async def load(self, version: int) -> None:
        """Has the server take `version`, which was written; what is being generated goes on with it.

        Raises Fault "no_weights" if it can't be had to; nothing is asked of it then until a later version is taken.
        """
        async with self._loading:
            await self._give(version)

    def fix(self, version: int) -> None:
        """The server's weights are `version`, and never change."""
        self.version = version
        self._armed.set()

    async def _give(self, version: int) -> None:
        loop = asyncio.get_running_loop()
        self._armed.clear()
        until, wait_s = loop.time() + self._settings.update_s, self._settings.backoff_s
        while True:
            try:
                async with asyncio.timeout_at(until):
                    await self._change(version)
                break
            except TimeoutError:
                fault = Fault("silent", f"not within {self._settings.update_s:g} s")
            except Fault as caught:
                fault = caught
            pause_s = max(wait_s, fault.wait_s)
            if not fault.passing or loop.time() + pause_s > until:
                self._say("server_without_weights", version=version, reason=str(fault))
                raise Fault("no_weights", f"the server could not be given version {version}: {fault}") from None
            await asyncio.sleep(pause_s)
            wait_s = min(2 * wait_s, MAX_BACKOFF_S)
        self.version, self._doubtful = version, False
        self._armed.set()
        await asyncio.to_thread(self._weights.forget_older, version)

    async def _change(self, version: int) -> None:
        """Holds the server, has it read `version` and releases it: also where that fails, or is given up."""
        try:
            await self._weights.hold()
            await self._end_open()
            await self._weights.update(version)
            await self._weights.release()
        except BaseException:
            with suppress(Fault, TimeoutError):
                async with asyncio.timeout(ABORT_S):
                    await self._weights.release()
            raise

    async def _end_open(self) -> None:
        """Returns when no request is open: they end early, or are closed. Raises Fault if some stay."""
        with suppress(TimeoutError):
            async with asyncio.timeout(ABORT_S):
                await self._none_open.wait()
        for request in self._open:
            request.interrupt()
        try:
            async with asyncio.timeout(ABORT_S):
                await self._none_open.wait()
        except TimeoutError:
            raise Fault("silent", f"{len(self._open)} requests were closed and have not ended") from None

    async def _usable(self) -> None:
        """Returns when the server may be asked; its caller says how long that may take. Raises Fault if it can't be
        reached, or can't be given its weights."""
        while self._doubtful or not self._armed.is_set():
            if not self._doubtful:
                await self._armed.wait()
                continue
            if self._recovery is None:
                self._recovery = asyncio.create_task(self._recover(), name="recover the server")
                self._recovery.add_done_callback(self._recovered)
            await asyncio.shield(self._recovery)

    async def _recover(self) -> None:
        async with self._loading:
            if self._doubtful and (not self._armed.is_set() or await self._weights.held_version() != str(self.version)):
                self._say("server_given_weights_again", version=self.version)
                await self._give(self.version)
            self._doubtful = False

    def _recovered(self, recovery: asyncio.Task[None]) -> None:
        self._recovery = None
        if not recovery.cancelled():
            recovery.exception()  # Whoever waited for it has it, too.

    # Requests -----------------------------------------------------------------------------------------------

    async def ask(self, answer: Answer, seed: int, stall_s: float, progressed: Callable[[], None]) -> bool:
        """One request: adds to `answer` what the server writes after it. Calls `progressed` when tokens came.

        Returns False if it was interrupted for new weights, else True. Raises Fault; "stalled" if no token comes within
        `stall_s` (at first; later the setting). What `answer` has by then is valid, and of `answer.version`.
        """
        request = None
        try:
            async with asyncio.timeout(stall_s) as scope:
                await self._usable()
                answer.version = self.version
                asked = list(answer.sequence)
                request = _Open(scope)
                self._open.add(request)
                self._none_open.clear()
                self.counts["requests"] += 1
                self.counts["prefilled_tokens"] += len(asked)
                async with aclosing(self._client.events(COMPLETIONS, self._body(answer, asked, seed))) as events:
                    async for data in events:
                        event = read_event(data, asked, answer.vocab_size)
                        answer.take(event)
                        self.counts["events"] += 1
                        self.counts["tokens"] += len(event.tokens)
                        if event.tokens:
                            request.extend(self._settings.stall_s)
                            progressed()
        except TimeoutError:
            if request is None:
                raise Fault("no_weights", f"the server had no weights for {stall_s:g} s") from None
            if request.interrupted:
                return False
            raise Fault("stalled", f"no further token within {self._settings.stall_s:g} s") from None
        except Fault as fault:
            if fault.kind in ("unreachable", "truncated") and self._settings.weights == "update":
                self._doubtful = True
            raise
        finally:
            if request is not None:
                self._open.discard(request)
                if not self._open:
                    self._none_open.set()
        return self._armed.is_set()

    def _body(self, answer: Answer, asked: list[int], seed: int) -> dict[str, Any]:
        return completion_body(
            self._settings.dialect, self._settings.model, asked, max_tokens=answer.num_left,
            sampling=answer.request.sampling(), ends=answer.ends, seed=seed,
        )  # fmt: skip
