"""Has answers finished, whichever incarnation of the worker writes them.

    groups --those without an end, with what they have--> rollout --chunks--> groups
       ^                                                     |
       '---------------- the worker died --------------------'

Knows nothing of why answers are wanted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...runtime import Ref
from ..patience import patiently
from ..types import Group
from .requests import Request


async def finish_answers(rollout: Ref, groups: Sequence[Group], **asked: Any) -> None:
    """Returns when all trajectories of all `groups` have ended. What was received stays, across deaths and restarts.
    `asked`: further fields of the requests (max_new_tokens, temperature, ...).

    Raises RemoteError for a group that can't be generated, and ActorDied if the worker never comes back.
    """
    await patiently(lambda: write_on(rollout, groups, **asked))


async def write_on(rollout: Ref, groups: Sequence[Group], **asked: Any) -> None:
    """Has this incarnation of a worker go on with `groups` until all have ended. Raises ActorDied if it dies."""
    requests = [
        Request(
            key=key, ordinal=group.prompt.ordinal, prompt=group.prompt.tokens,
            members=[t.member for t in unfinished], prefixes=[t.tokens() for t in unfinished],
            **asked,
        )
        for key, group in enumerate(groups)
        if (unfinished := [t for t in group.trajectories if not t.finish])
    ]  # fmt: skip
    if not requests:
        return
    async for chunks in rollout.generate.stream(requests):
        for chunk in chunks:
            groups[chunk.key].trajectories[chunk.member].append(chunk)
