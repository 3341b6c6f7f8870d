"""The exchange over its members: coalescing, late joiners, losses, epochs, refusals. Publishers, intakes are real."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from headrace.runtime.errors import BadWeights, ExchangeFull, TransferFailed
from headrace.runtime.exchange import Exchange, Intake, Manifest, Publisher, Receiver, Route, Seat
from headrace.runtime.exchange.carrier import choose
from headrace.runtime.exchange.member import NOTHING, Patience
from headrace.runtime.exchange.tree import TreeSink, sources_of

CALM = Patience(base_s=30.0, stall_s=1.0, again_s=(60.0, 60.0))
QUICK = Patience(base_s=1.0, stall_s=0.1, again_s=(60.0, 60.0))


def weights(version: int) -> dict[str, np.ndarray]:
    return {"a": np.full((400, 700), version, np.float32), "b": np.full(9, version, np.int64)}


class Trainer:
    """Lays out the newest weights; `gate` holds it up."""

    def __init__(self, **settings: Any) -> None:
        self.publisher = Publisher("policy", **settings)
        self.laid_out: list[int] = []
        self.gate = asyncio.Event()
        self.gate.set()

    async def lay_out(self, version: int, keep: dict[int, list[str]]) -> Manifest:
        await self.gate.wait()
        self.laid_out.append(version)
        return self.publisher.publish(version, weights(version), keep=keep)


class Member:
    """Takes versions in this process. `gate` holds it up, `fault` is raised instead."""

    def __init__(self, *, tree: bool = False, schema: tuple[tuple[str, str, tuple[int, ...]], ...] = ()) -> None:
        sinks = {"tree": TreeSink("tcp://127.0.0.1:0")} if tree else {}
        self.intake: Intake[dict[str, np.ndarray]] = Intake(_copied, sinks)
        self.load_s = 0.0
        self.schema = schema
        self.taken: list[int] = []
        self.epochs: list[int] = []
        self.tensors: dict[str, np.ndarray] = {}
        self.fault: Exception | None = None
        self.gate = asyncio.Event()
        self.gate.set()

    async def seat(self) -> Seat:
        return replace(self.intake.seat(self.schema), load_s=self.load_s)

    async def load(self, manifest: Manifest, route: Route) -> int:
        self.epochs.append(route.epoch)
        await self.gate.wait()
        if self.fault is not None:
            raise self.fault
        self.tensors = await self.intake.load(manifest, route)
        assert all((x == manifest.version).all() for x in self.tensors.values())
        self.taken.append(manifest.version)
        return manifest.version


def _copied(version: int, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: x.copy() for name, x in tensors.items()}


@asynccontextmanager
async def exchange(
    *members: Member, patience: Patience = CALM, **settings: Any
) -> AsyncIterator[tuple[Exchange, Trainer]]:
    """An exchange that all `members`, named by their places, have joined."""
    trainer = Trainer()
    exchange = Exchange(trainer.lay_out, patience=patience, **settings)
    try:
        for index, member in enumerate(members):
            assert await exchange.join(str(index), member) == NOTHING
        yield exchange, trainer
    finally:
        await exchange.close()
        trainer.publisher.close()
        for member in members:
            await member.intake.close()


async def test_every_member_takes_every_version_and_a_late_one_the_newest_before_its_join_returns() -> None:
    a, b, late = Member(), Member(), Member()
    async with exchange(a, b) as (weights, _):
        for version in range(3):
            await weights.publish(version)
            assert await weights.settled() == {"0": version, "1": version}
        assert await weights.join("late", late) == 2
        assert a.taken == b.taken == [0, 1, 2] and late.taken == [2]
        weights.leave("1")
        await weights.publish(3)
        assert await weights.settled() == {"0": 3, "late": 3} and b.taken == [0, 1, 2]
        await late.intake.close()


async def test_what_is_published_meanwhile_is_coalesced_to_the_newest() -> None:
    slow, quick = Member(), Member()
    async with exchange(slow, quick) as (weights, trainer):
        await weights.publish(0)
        await weights.settled()
        slow.gate.clear()
        for version in range(1, 5):
            await weights.publish(version)
            await asyncio.sleep(0.02)
        async with asyncio.timeout(20):
            while quick.taken[-1] < 4:  # noqa: ASYNC110 (nobody tells)
                await asyncio.sleep(0.005)
        assert weights.waits()[0].startswith("0 takes version 1 by shm, for ")
        slow.gate.set()
        assert await weights.settled() == {"0": 4, "1": 4}
        assert slow.taken == [0, 1, 4], "the version that it was taking was kept for it; 2 and 3 were not offered"
        trainer.gate.clear()
        publishes = [asyncio.create_task(weights.publish(version)) for version in (5, 6, 7)]
        await asyncio.sleep(0)
        trainer.gate.set()
        assert [manifest.version for manifest in await asyncio.gather(*publishes)][-1] == 7
        assert trainer.laid_out[5:] in ([5, 7], [7])


async def test_one_that_fails_or_stops_is_lost_and_costs_the_others_nothing() -> None:
    lost: list[tuple[str, str]] = []
    stopped, failing, well = Member(), Member(), Member()
    tell = {"on_lost": lambda name, why: lost.append((name, why))}
    async with exchange(stopped, failing, well, patience=QUICK, **tell) as (weights, _):
        stopped.gate.clear()
        failing.fault = TransferFailed("the cable is loose")
        epoch = weights.epoch
        await weights.publish(1)
        assert await weights.settled() == {"0": NOTHING, "1": NOTHING, "2": 1}
        assert weights.epoch == epoch + 2
        assert sorted(name for name, _ in lost) == ["0", "1"]
        assert "TimeoutError" in weights.lost["0"] and weights.lost["1"] == "TransferFailed: the cable is loose"
        assert any("1 is lost: TransferFailed" in line for line in weights.waits())
        failing.fault = None
        stopped.gate.set()
        assert await weights.join("1", failing, 1) == 1
        await weights.publish(2)
        assert await weights.settled() == {"0": 2, "1": 2, "2": 2} and not weights.lost
        assert well.taken == [1, 2] and failing.epochs[-1] > epoch + 2


async def test_a_member_has_the_time_that_its_seat_says_beside_the_transfer() -> None:
    member, hasty = Member(), Patience(base_s=0.05, again_s=(60.0, 60.0))
    member.load_s = 60.0
    async with exchange(member, patience=hasty) as (weights, _):
        member.gate.clear()
        asyncio.get_running_loop().call_later(1.0, member.gate.set)
        await weights.publish(1)
        assert await weights.settled() == {"0": 1}, "the patience alone is over after 0.55 s"


async def test_who_is_lost_is_tried_again_though_nothing_new_is_published() -> None:
    member = Member()
    async with exchange(patience=Patience(base_s=30.0, again_s=(0.01, 0.02))) as (weights, _):
        member.fault = TransferFailed("not today")
        await weights.publish(1)
        with pytest.raises(TransferFailed, match="m has not taken version 1: TransferFailed: not today"):
            await weights.join("m", member)
        member.fault = None
        async with asyncio.timeout(10):
            while not member.taken:  # noqa: ASYNC110 (nobody tells)
                await asyncio.sleep(0.01)
    await member.intake.close()


async def test_membership_follows_the_roster_before_every_publish() -> None:
    members = {name: Member() for name in "abc"}
    incarnations = dict.fromkeys(members, 1)
    gone: set[str] = set()

    async def roster() -> Mapping[str, tuple[Member, int]]:
        return {name: (members[name], incarnations[name]) for name in members if name not in gone}

    async with exchange(roster=roster) as (weights, _):
        await weights.publish(0)
        assert await weights.settled() == {"a": 0, "b": 0, "c": 0}
        gone.add("b")
        incarnations["c"] = 2
        await weights.publish(1)
        assert await weights.settled() == {"a": 1, "c": 1}
        gone.clear()
        await weights.publish(2)
        assert await weights.settled() == {"a": 2, "b": 2, "c": 2}
    for member in members.values():
        await member.intake.close()


async def test_who_wants_other_tensors_is_refused_with_both_values() -> None:
    schema = (("a", "<f4", (400, 701)), ("c", "<f8", ()))
    odd, early = Member(schema=schema), Member(schema=schema)
    async with exchange(early) as (weights, _):
        await weights.publish(0)
        await weights.settled()
        why = r"a is <f4 \[400, 700\], wanted <f4 \[400, 701\]; c is missing, wanted <f8 \[\]; b is .*, wanted nothing"
        with pytest.raises(BadWeights, match=f"odd can't take version 0 of policy: {why}"):
            await weights.join("odd", odd)
        assert weights.holds == {"0": NOTHING} and "BadWeights" in weights.lost["0"] and not early.taken
        await odd.intake.close()


async def test_versions_never_go_back_and_old_epochs_are_refused() -> None:
    member = Member()
    async with exchange(member) as (weights, trainer):
        await weights.publish(5)
        await weights.settled()
        with pytest.raises(BadWeights, match="version 4 of policy can't follow 5: versions never go back"):
            await weights.publish(4)
        assert weights.manifest is not None and weights.manifest.version == 5
        old = Route(carrier="shm", epoch=member.epochs[-1] - 1, members=("policy", "0"))
        with pytest.raises(TransferFailed, match=r"epoch \d+ of policy is over, epoch \d+ has begun"):
            await member.intake.load(weights.manifest, old)
        trainer.publisher.rewind()
        await weights.publish(4)
        assert await weights.settled() == {"0": 4}


async def test_what_was_overwritten_is_laid_out_again() -> None:
    member = Member()
    async with exchange(member) as (weights, trainer):
        member.gate.clear()
        await weights.publish(1)
        await asyncio.sleep(0.01)
        trainer.publisher.close()
        member.gate.set()
        assert await weights.settled() == {"0": 1}
        assert trainer.laid_out == [1, 1]


def test_older_versions_stay_for_who_needs_them_within_the_budget() -> None:
    publisher = Publisher("policy", budget_bytes=3 << 20)
    keep: dict[int, list[str]] = {}
    for version in range(4):
        publisher.publish(version, weights(version), keep=keep)
        keep[version] = [f"continuation/{version}"]
    assert publisher.versions == [0, 1, 2, 3]
    with pytest.raises(
        ExchangeFull, match=r"version 4 .* older versions hold 3.2 MiB .* their budget is 3.0 MiB .*version 2"
    ):
        publisher.publish(4, weights(4), keep=keep)
    assert publisher.manifest is not None and publisher.manifest.version == 3
    del keep[1]
    publisher.publish(4, weights(4), keep=keep)
    assert publisher.versions == [0, 2, 3, 4]
    publisher.close()


async def test_the_tree_serves_members_through_each_other() -> None:
    members = [Member(tree=True) for _ in range(7)]
    async with exchange(*members, carrier="tree") as (weights, trainer):
        trainer.publisher.serve("tcp://127.0.0.1:0")
        for version in range(3):
            await weights.publish(version)
            assert await weights.settled() == {str(index): version for index in range(7)}
        assert not weights.lost


class Fabric:
    """A collective carrier of one host: it copies, once all that take part have come; `broken` never come."""

    def __init__(self) -> None:
        self.waves: list[tuple[str, ...]] = []
        self.broken: set[str] = set()
        self.mad: set[str] = set()


class Led(Member):
    """A member that takes part in collective transfers, or a publisher that leads them."""

    def __init__(self, name: str, fabric: Fabric) -> None:
        super().__init__()
        self.name, self.fabric = name, fabric
        self.intake = Intake(_copied, {"nccl": Receiver()})

    async def seat(self) -> Seat:
        return replace(self.intake.seat(), gpu=self.name)

    async def retire(self, epoch: int) -> None:
        await self.intake.retire(epoch)

    async def open(self, epoch: int) -> bytes:
        return b"token"

    async def transfer(self, manifest: Manifest, route: Route) -> None:
        if self.name in self.fabric.mad:
            raise ZeroDivisionError(self.name)
        if self.fabric.broken & set(route.members):
            raise TransferFailed(f"{self.name}: not all of {route.members} came in epoch {route.epoch}")
        if route.rank == 0:
            self.fabric.waves.append(route.members)
        else:
            assert route.token == b"token"
            await self.intake.transfer(manifest, route)


async def test_members_of_a_collective_carrier_are_led_together_and_a_sick_one_costs_only_itself() -> None:
    fabric = Fabric()
    a, b, c, plain = Led("a", fabric), Led("b", fabric), Led("c", fabric), Member()
    trainer, lead = Trainer(), Led("policy", fabric)
    trainer.publisher._seat = replace(trainer.publisher._seat, gpu="policy", carriers=("shm", "nccl"))
    weights = Exchange(trainer.lay_out, leads={"policy": lead}, patience=CALM)
    for member in (a, b, c):
        assert await weights.join(member.name, member) == NOTHING
    await weights.join("plain", plain)
    await weights.publish(1)
    assert await weights.settled() == {"a": 1, "b": 1, "c": 1, "plain": 1}
    await weights.publish(2)
    await weights.settled()
    assert fabric.waves[-1] == ("policy", "a", "b", "c"), "all at once"
    fabric.broken.add("b")
    await weights.publish(3)
    assert await weights.settled() == {"a": 3, "b": 2, "c": 3, "plain": 3}
    assert "b: not all of ('policy', 'b') came" in weights.lost["b"], "with others first, then alone"
    fabric.broken.clear()
    await weights.publish(4)
    assert set((await weights.settled()).values()) == {4} and a.epochs[-1] > a.epochs[0]
    fabric.mad.add("c")
    await weights.publish(5)
    assert await weights.settled() == {"a": 5, "b": 5, "c": 4, "plain": 5}
    assert "c: c" in weights.lost["c"]
    await weights.close()
    trainer.publisher.close()
    for member in (a, b, c, plain, lead):
        await member.intake.close()


async def test_whatever_a_member_raises_or_answers_is_a_loss_with_its_reason_and_hangs_nobody() -> None:
    class Liar(Member):
        async def load(self, manifest: Manifest, route: Route) -> int:
            return manifest.version + 1

    class Gone(Member):
        async def load(self, manifest: Manifest, route: Route) -> int:
            raise asyncio.CancelledError

    class Deaf(Member):
        async def load(self, manifest: Manifest, route: Route) -> int:
            while True:
                with suppress(asyncio.CancelledError):
                    await self.gate.wait()
                    return manifest.version

    odd, liar, gone, deaf, seatless, well = Member(), Liar(), Gone(), Deaf(), Member(), Member()
    odd.fault = KeyError("lm_head")
    deaf.gate.clear()
    seatless.seat = lambda: asyncio.sleep(0, None)  # type: ignore[assignment, return-value]
    async with exchange(odd, liar, gone, deaf, seatless, well, patience=replace(QUICK, base_s=0.2)) as (weights, _):
        await weights.publish(1)
        async with asyncio.timeout(20):
            assert await weights.settled() == {**dict.fromkeys("01234", NOTHING), "5": 1}
            with pytest.raises(TransferFailed, match="0 has not taken version 1: KeyError: 'lm_head'"):
                await weights.join("0", odd)
        assert weights.lost["1"] == "TransferFailed: it says that it has version 2, and was given 1"
        assert weights.lost["2"] == "TransferFailed: it was cancelled where it ran"
        assert weights.lost["3"].startswith("TimeoutError") and weights.lost["4"].startswith("AttributeError")
        deaf.gate.set()


async def test_a_task_that_ends_is_told_to_those_who_wait_and_the_member_can_come_again() -> None:
    def held(name: str, version: int) -> None:
        if not seen:
            seen.append(name)
            raise LookupError("an owner's mistake")

    seen: list[str] = []
    member = Member()
    async with exchange(member, on_held=held) as (weights, _), asyncio.timeout(20):
        await weights.publish(1)
        await weights.settled()
        await weights.publish(2)
        assert await weights.settled() == {"0": 1}
        assert weights.lost["0"] == """its task has ended: LookupError("an owner's mistake")"""
        assert await weights.join("0", member) == 2


async def test_members_say_which_epoch_they_have_seen_and_a_clock_that_goes_back_stops_nothing() -> None:
    member = Member()
    async with exchange(member) as (before, _):
        await before.publish(1)
        await before.settled()
    epoch = member.epochs[-1]
    trainer = Trainer()
    after = Exchange(trainer.lay_out, patience=CALM)
    after.epoch = epoch - 5000  # The clock of another controller, which is behind.
    await after.publish(2)
    intake: Intake[dict[str, np.ndarray]] = Intake(_copied)
    member.intake = intake
    await intake.load(trainer.publisher.manifest, Route(carrier="shm", epoch=epoch, members=("policy", "0")))
    assert await after.join("0", member) == 2 and member.epochs[-1] > epoch
    await after.close()
    await intake.close()
    trainer.publisher.close()


def test_a_tree_leads_to_the_publisher_and_feeds_two() -> None:
    addresses = ["p", *(f"m{rank}" for rank in range(1, 30))]
    parents = [sources_of(rank, addresses) for rank in range(1, 30)]
    assert all(chain[-1] == "p" and len(set(chain)) == len(chain) <= 5 for chain in parents)
    assert max(sum(chain[0] == who for chain in parents) for who in addresses) == 2
    assert sources_of(3, ["p", "", "", "m3", ""]) == ("p",) and sources_of(4, ["p", "", "", "m3", ""])[-1] == "p"


def test_the_carrier_fits_the_pair_or_is_refused() -> None:
    all_four = ("shm", "tree", "nccl", "ipc")
    gpu = Seat(host="h", gpu="0", carriers=all_four, address="tcp://h:1")
    assert choose(gpu, gpu) == "ipc"
    assert choose(gpu, Seat(host="h", gpu="1", carriers=all_four)) == "nccl"
    assert choose(gpu, Seat(host="h")) == "shm" and choose(gpu, Seat(host="other")) == "tree"
    assert choose(gpu, Seat(host="h"), "tree") == "tree"
    with pytest.raises(ValueError, match=r"'nccl' does not serve .* possible: shm, tree"):
        choose(gpu, Seat(host="h"), "nccl")
    with pytest.raises(ValueError, match=r"'auto' does not serve .* not on one host, .* possible: none"):
        choose(Seat(host="h"), Seat(host="other"))
