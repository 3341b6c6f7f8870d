"""Trainer ranks and engine ranks as processes: resharded over ZeroMQ, with one of them killed in the middle."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
from exchange_ranks import Rank, plan_for, served

from headrace.runtime import System
from headrace.runtime.errors import ActorDied, TransferFailed
from headrace.runtime.ref import Ref
from headrace.runtime.supervisor import RestartPolicy


async def transfer(ranks: dict[int, Ref], version: int, epoch: int, engines: int) -> list[int | BaseException]:
    """One epoch over these ranks; the first that is lost has the others abort it."""
    peers = {rank: await ref.address() for rank, ref in ranks.items()}
    tasks = [asyncio.create_task(ref.transfer(version, epoch, engines, peers)) for ref in ranks.values()]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
    if any(task.done() and task.exception() for task in tasks):
        for ref, task in zip(ranks.values(), tasks, strict=True):
            if not task.done():
                await ref.abort(epoch)
    return await asyncio.gather(*tasks, return_exceptions=True)


async def require_version(ranks: dict[int, Ref], version: int, engines: int) -> None:
    plan = plan_for(engines)
    for rank in plan.dest.mesh.ranks.tolist():
        held, wanted = await ranks[rank].held(), served(plan, rank, version)
        assert held.keys() == wanted.keys()
        for name, array in wanted.items():
            np.testing.assert_array_equal(held[name], array)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [1, 7])
async def test_ranks_in_processes_reshard_and_go_on_without_a_dead_one(victim: int) -> None:
    """A dying rank of an engine costs its own engine; one of the trainer, the publish: all keep what they had."""
    async with System() as system:
        plan = plan_for(engines=2)
        numbers = [*plan.source.mesh.ranks.tolist(), *plan.dest.mesh.ranks.tolist()]
        spawned = [
            system.spawn(
                Rank(rank=rank, dies_at=2 if rank == victim else -1), name=f"rank_{rank}", node=f"rank_{rank}",
                policy=RestartPolicy(restart="temporary"),
            )
            for rank in numbers
        ]  # fmt: skip
        ranks = dict(zip(numbers, await asyncio.gather(*spawned), strict=True))
        assert all(isinstance(count, int) and count for count in await transfer(ranks, 1, 0, engines=2))
        await require_version(ranks, 1, engines=2)
        async with asyncio.timeout(20):
            ended = await transfer(ranks, 2, 1, engines=2)
        by_rank = dict(zip(numbers, ended, strict=True))
        assert isinstance(by_rank.pop(victim), ActorDied)
        assert all(isinstance(end, int | TransferFailed) for end in by_rank.values())
        assert any(isinstance(end, TransferFailed) for end in by_rank.values())
        if victim < plan.dest.mesh.first:
            holders = [await ranks[rank].held() for rank in plan.dest.mesh.ranks.tolist()]
            for rank, held in zip(plan.dest.mesh.ranks.tolist(), holders, strict=True):
                old, new = (served(plan, rank, version) for version in (1, 2))
                assert any(all((held[n] == a).all() for n, a in whole.items()) for whole in (old, new))
        else:
            survivors = {rank: ref for rank, ref in ranks.items() if rank not in (6, 7)}
            assert all(isinstance(count, int) for count in await transfer(survivors, 2, 2, engines=1))
            await require_version(survivors, 2, engines=1)
