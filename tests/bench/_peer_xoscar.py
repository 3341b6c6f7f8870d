"""The actor that _peers.py asks in xoscar: its processes import it by name."""

import xoscar


class Echo(xoscar.Actor):  # type: ignore[misc]
    """Says everything back."""

    async def echo(self, payload: bytes) -> bytes:
        return payload
