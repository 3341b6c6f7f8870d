"""What a live setting changes: updates of the trainer, just as if it had been configured so; the order of the pool."""

import asyncio
from dataclasses import replace

import pytest
from test_trainer_learner import CONFIG, RL, SFT, assert_equal, copied, dapo_update, groups

from headrace.actors.controller import Controller
from headrace.actors.data import RunningSum
from headrace.actors.rollout import Rollout
from headrace.actors.stream import StreamPool
from headrace.actors.stream.stories import NUM_KEPT, Stories
from headrace.actors.trainer.learner import Learner
from headrace.actors.trainer.settings import RlSettings
from headrace.runtime.children import Member
from headrace.runtime.entries import Entry
from headrace.runtime.events import EventLog
from headrace.runtime.mailbox import Lane, Mailbox
from headrace.runtime.repl.live import LiveSettings
from headrace.runtime.rundir import RunSpec
from headrace.runtime.supervisor import RestartPolicy


@pytest.mark.parametrize("correction", ["none", "decoupled"])
def test_an_update_with_its_own_rate_and_temperature_is_that_of_a_trainer_configured_so(correction):
    muon = replace(RL, muon_learning_rate=0.01, correction=correction)
    configured = replace(muon, learning_rate=RL.learning_rate / 2, muon_learning_rate=0.005, temperature=0.7)
    changed, wanted = Learner(CONFIG, SFT, muon, seed=3), Learner(CONFIG, SFT, configured, seed=3)
    untouched = Learner(CONFIG, SFT, muon, seed=3)
    update = dapo_update(groups(4))
    row = changed.rl_step(replace(update, learning_rate=configured.learning_rate, temperature=0.7))
    assert row["learning_rate"] == configured.learning_rate
    wanted.rl_step(update)
    assert_equal(copied(changed.weights()), copied(wanted.weights()))
    changed.load_state(*untouched.state())
    changed.rl_step(update)
    untouched.rl_step(replace(update, learning_rate=RL.learning_rate, temperature=1.0))
    assert_equal(copied(changed.weights()), copied(untouched.weights()))


def pool_of(**rl):
    settings = RlSettings(**{"groups_per_step": 2, "mini_batches": 1, "max_running": 8, **rl})
    return StreamPool(run=RunSpec(name="x"), rl=settings, capacity=8)


def test_a_staleness_bound_that_lets_in_more_than_the_pool_holds_is_refused():
    pool_of(max_staleness=3).fits()
    with pytest.raises(ValueError, match="capacity = 10 or more"):
        pool_of(max_staleness=4).fits()
    pool_of(max_staleness=4, alpha=1.0).fits()


async def test_a_lower_bound_drops_what_is_too_old_now_and_wakes_who_waits(tmp_path):
    pool = pool_of(max_staleness=3)
    pool.run = RunSpec(name="x", directory=str(tmp_path))
    await pool.start()
    for id, started in enumerate((0, 0, 3)):
        await pool.put(Entry(id=id, key=(float(started),), started=started, payload=None))
    pool.rl = replace(pool.rl, max_staleness=0)
    await pool.changed()
    leasing = asyncio.create_task(pool.lease(2, 3))
    await asyncio.sleep(0)
    await pool.put(Entry(id=3, key=(3.0,), started=3, payload=None))
    assert [entry.id for entry in (await leasing).entries] == [2, 3]
    assert [line["event"] for line in await pool.explain(0)] == ["put", "dropped"]
    pool.rl = replace(pool.rl, max_staleness=3)
    await pool.changed()
    await pool.stop(None)


async def test_names_rules_and_values_of_settings():
    live = LiveSettings(None, None, EventLog(None))  # It asks no node before something is changed.
    pool = Member("pool", pool_of(), "root", RestartPolicy(), "root")
    rows = {row["name"]: row for row in live.rows([pool])}
    assert list(rows) == ["max_staleness", "alpha", "log_level"]
    assert rows["alpha"]["rule"] == "float >= 0 and <= 1" and rows["max_staleness"]["value"] == 4
    live.changed = {"rl.alpha": 1.0, "other.x": 3}
    applied = live.applied(pool.actor)
    assert applied.rl.alpha == 1.0 and applied.rl.max_staleness == 4 and pool.actor.rl.alpha == 0.0


async def test_a_mailbox_that_holds_back_loses_nothing_and_keeps_the_order():
    mailbox: Mailbox[int] = Mailbox(10)
    mailbox.open_until(Lane.CONTROL)
    for item, lane in enumerate((Lane.BULK, Lane.NORMAL, Lane.CONTROL, Lane.NORMAL, Lane.SYSTEM)):
        mailbox.put(item, lane)
    assert [mailbox.take() for _ in range(3)] == [4, 2, None] and len(mailbox) == 3
    waiting = asyncio.create_task(mailbox.get())
    await asyncio.sleep(0)
    mailbox.open_until(Lane.BULK)
    assert [await waiting, mailbox.take(), mailbox.take(), mailbox.take()] == [1, 3, 0, None]


def test_stories_are_told_and_bounded():
    stories = Stories()
    (group,) = groups(1)
    stories.tell(group, "trained", step=7, staleness=2)
    told = stories.of(0, 5)
    assert told[0]["event"] == "trained" and told[0]["step"] == 7 and len(told) == 5
    tokens = [len(segment.tokens) for segment in group.trajectories[1].segments]
    assert (
        told[2]["tokens"] == f"{tokens[0]} by version 0, {tokens[1]} by version 1" and told[2]["verdict"] == "correct"
    )
    for ordinal, reason in ((9, "there are 0 to 4"), (-1, "there is no group"), (3, "0 to 0 trained")):
        with pytest.raises(LookupError, match=reason):
            stories.of(ordinal, 5)
    for ordinal in range(1, NUM_KEPT + 1):
        group.prompt.ordinal = ordinal
        stories.tell(group, "trained")
    with pytest.raises(LookupError, match="forgotten"):
        stories.of(0, NUM_KEPT + 1)


def test_a_temperature_that_a_server_can_not_answer_for_is_refused():
    """Its log-probabilities are those of temperature 1: the workers are asked, not the controller alone."""
    assert "rl.temperature" in Rollout.live and "rl.temperature" in Controller.live
    table = {"run": RunSpec(name="x"), "model": CONFIG, "task": RunningSum(), "rl": RlSettings()}
    worker = Rollout(**table, engine="openai", base_url="http://127.0.0.1:1")
    with pytest.raises(ValueError, match="temperature 1"):
        replace(worker, rl=replace(worker.rl, temperature=0.9))
