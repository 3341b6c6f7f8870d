"""Whether this machine can make sandboxes, and tests that need one without it are skipped with the reason."""

import asyncio
from functools import cache

import pytest

from headrace.actors.verifier.sandbox import SandboxPool, SandboxUnavailable
from headrace.actors.verifier.sandbox.bubble import Isolation


@cache
def why_not() -> str:
    """ "" where sandboxes work."""

    async def tried() -> None:
        pool = SandboxPool(Isolation(), warm=1)
        await pool.start()
        await pool.close()

    try:
        asyncio.run(tried())
    except SandboxUnavailable as error:
        return str(error)
    return ""


def needed() -> None:
    """Skips the tests of the module that calls it."""
    if why_not():
        pytest.skip(why_not(), allow_module_level=True)
