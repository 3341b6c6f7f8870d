"""HTTP to one server: events of a streamed answer, and single calls. Every failure is a Fault, every wait has an end.

Knows nothing of tokens, retries or versions. The key goes into a header and nowhere else.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import orjson

from .faults import Fault
from .protocol import shown
from .settings import ServerSettings

if TYPE_CHECKING:
    import aiohttp

MAX_EVENT_BYTES = 16 << 20
"""An event that is longer is none: a prompt of a million tokens fits."""

MAX_WAIT_S = 30.0
"""Longest Retry-After that is honoured."""

LINGER_S = 0.5
"""What the end of an answer's last bytes is waited for."""

SPARE_CONNECTIONS = 4
"""Beside those of requests: for calls that steer the server."""


class Client:
    """Connections to the server at `root`. `open` before use, on the loop that uses it."""

    def __init__(self, root: str, settings: ServerSettings) -> None:
        self._root = root
        self._settings = settings
        self._key = ""
        self._session: aiohttp.ClientSession | None = None

    def open(self) -> None:
        """Raises ValueError if the variable that should hold the key is not set."""
        import aiohttp

        settings, headers = self._settings, {}
        if settings.key_variable:
            self._key = os.environ.get(settings.key_variable, "")
            if not self._key:
                raise ValueError(f"key_variable names {settings.key_variable}, which is not set; export it to the node")
            headers["Authorization"] = f"Bearer {self._key}"
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=settings.max_requests + SPARE_CONNECTIONS),
            timeout=aiohttp.ClientTimeout(
                total=None, sock_connect=settings.connect_s, connect=None, sock_read=settings.silence_s
            ),
            headers=headers,
            cookie_jar=aiohttp.DummyCookieJar(),
        )

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def events(self, path: str, body: Mapping[str, Any]) -> AsyncGenerator[bytes, None]:
        """The data of each event of a streamed answer, until its "[DONE]". An answer in one JSON is one event.

        Closing it tells the server to stop. Raises Fault, also "truncated" if the answer ends before.
        """
        assert self._session is not None
        with self._faults():
            async with self._session.post(
                self._root + path, data=orjson.dumps(body), headers={"Content-Type": "application/json"},
                allow_redirects=False,
            ) as response:  # fmt: skip
                await self._check(response)
                if response.content_type == "application/json":
                    yield await _whole(response)
                    return
                begun = bytearray()
                async for piece in response.content.iter_any():
                    for line in whole_lines(begun, piece):
                        field, _, value = line.partition(b":")
                        if field == b"data":
                            if value.strip() == b"[DONE]":
                                await _finish_reading(response)
                                return
                            yield value
        raise Fault("truncated", "the answer ended before its end")

    async def call(self, method: str, path: str, body: Mapping[str, Any] | None, deadline_s: float) -> Any:
        """One call; its answer as JSON, None if it is none. Raises Fault, "silent" after `deadline_s`."""
        assert self._session is not None
        with self._faults():
            async with (
                asyncio.timeout(deadline_s),
                self._session.request(
                    method, self._root + path, json=body, allow_redirects=False, timeout=self._unlimited()
                ) as response,
            ):
                await self._check(response)
                data = await _whole(response)
        try:
            return orjson.loads(data)
        except orjson.JSONDecodeError:
            return None

    def _unlimited(self) -> aiohttp.ClientTimeout:
        """But for the connection: the caller bounds the whole."""
        import aiohttp

        return aiohttp.ClientTimeout(total=None, sock_connect=self._settings.connect_s)

    async def _check(self, response: aiohttp.ClientResponse) -> None:
        """Raises Fault unless the status is 200."""
        status = response.status
        if status == 200:
            return
        said = shown(await response.content.read(4096))
        if self._key:
            said = said.replace(self._key, "(key)")
        why = f"status {status}: {said or response.reason}"
        if status in (429, 503):
            raise Fault("busy", why, wait_s=_retry_after(response.headers.get("Retry-After", "")))
        raise Fault("server_error" if status >= 500 else "rejected", why)

    @contextmanager
    def _faults(self) -> Iterator[None]:
        """Turns what the library raises into Faults."""
        import aiohttp

        try:
            yield
        except aiohttp.ConnectionTimeoutError as error:
            raise Fault("unreachable", shown(str(error).encode())) from None
        except TimeoutError as error:  # Those of the library among them: they are ClientErrors, too.
            raise Fault("silent", f"no answer in time: {error or 'deadline'}") from None
        except aiohttp.ClientPayloadError as error:
            raise Fault("truncated", f"the answer ended before its end: {shown(str(error).encode())}") from None
        except (aiohttp.ClientError, OSError) as error:
            raise Fault("unreachable", f"{type(error).__name__}: {shown(str(error).encode())}") from None
        except ValueError as error:
            raise Fault("bad_answer", f"no HTTP: {shown(str(error).encode())}") from None


def whole_lines(begun: bytearray, piece: bytes) -> list[bytes]:
    """The lines that end in `piece`; the first began with `begun`, which then is the line that has not ended.

    Looks for ends in `piece` alone: a long line costs what it is long. Raises Fault if it is too long.
    """
    first, *others = piece.split(b"\n")
    begun += first
    if len(begun) > MAX_EVENT_BYTES:
        raise Fault("bad_answer", f"an event of more than {MAX_EVENT_BYTES} bytes")
    if not others:
        return []
    lines = [bytes(begun), *others[:-1]]
    begun[:] = others[-1]
    return lines


async def _finish_reading(response: aiohttp.ClientResponse) -> None:
    """So that the connection can be used again; if that takes long, it is not."""
    with suppress(TimeoutError):
        async with asyncio.timeout(LINGER_S):
            await response.content.readany()


async def _whole(response: aiohttp.ClientResponse) -> bytes:
    data = bytearray()
    async for piece in response.content.iter_any():
        data += piece
        if len(data) > MAX_EVENT_BYTES:
            raise Fault("bad_answer", f"an answer of more than {MAX_EVENT_BYTES} bytes")
    return bytes(data)


def _retry_after(text: str) -> float:
    """Seconds; the form with a date is not read."""
    return min(float(text), MAX_WAIT_S) if text.isdecimal() else 0.0
