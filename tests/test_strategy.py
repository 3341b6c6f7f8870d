"""Who is stopped and started when something fails: the tree's decisions against their definition, without any loop."""

from math import prod

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.runtime import RestartPolicy
from headrace.runtime.errors import RestartBudgetExceeded
from headrace.runtime.exits import Exit
from headrace.runtime.strategy import GiveUp, NewEpoch, Retire, Start, Stop, Supervisor

CRASH = Exit(kind="exception", detail="ValueError: x")
ORDERLY = Exit(kind="stopped", detail="stopped by itself")
PLENTY = RestartPolicy(max_restarts=10**6)
STRATEGIES = ["one_for_one", "one_for_all", "rest_for_one"]


class World:
    """Does what the supervisor says, as slowly as the test wants, and checks that each action may happen now."""

    def __init__(self, seed=0):
        self.supervisor = Supervisor(seed)
        self.now = 0.0
        self.up, self.starting, self.stopping, self.retired = [], [], [], []
        self.actions, self.error = [], None

    def act(self):
        """Takes orders; returns them."""
        actions = self.supervisor.decide(self.now)
        for action in actions:
            match action:
                case Start(name):
                    assert self.error is None
                    assert name not in self.up + self.starting + self.stopping, name
                    self.retired = [other for other in self.retired if other != name]
                    self.check_order(name)
                    self.starting.append(name)
                case Stop(name):
                    (self.up if name in self.up else self.starting).remove(name)
                    self.stopping.append(name)
                case Retire(name):
                    assert name not in self.up + self.starting
                    self.retired.append(name)
                case GiveUp(error):
                    assert self.error is None
                    self.error = error
        self.actions += actions
        return actions

    def check_order(self, name):
        """By the definition: in groups with an order, all before it are up and nothing is stopping."""
        entry = self.supervisor.children[name]
        group = entry.group
        while group is not None:
            if group.strategy != "one_for_one":
                leaves = [leaf for other in group.children for leaf in names_in(other)]
                before = [leaf for other in list(group.children)[: index(group, entry)] for leaf in names_in(other)]
                assert not set(leaves) & set(self.stopping), f"{name} starts while {self.stopping} stop"
                assert set(before) <= set(self.up) | set(self.retired), f"{name} starts before {before}"
            entry, group = group, group.parent

    def add(self, name, group="root", policy=PLENTY):
        self.supervisor.add(name, policy, group, self.now)
        self.settle()

    def fail(self, *names, why=CRASH):
        for name in names:
            (self.up if name in self.up else self.starting).remove(name)
        self.supervisor.ended(names, why, self.now)
        return self.act()

    def stopped(self, name):
        self.stopping.remove(name)
        self.supervisor.ended([name], CRASH, self.now)
        self.act()

    def started(self, name):
        self.starting.remove(name)
        self.up.append(name)
        self.supervisor.up(name)
        self.act()

    def settle(self):
        """Everything that was ordered comes to pass. Returns the names in the order in which they came up."""
        came = []
        self.act()
        while True:
            if self.stopping:
                self.stopped(self.stopping[0])
            elif self.starting:
                came.append(self.starting[0])
                self.started(self.starting[0])
            elif (due := self.supervisor.due(self.now)) is not None:
                self.now = due
                self.act()
            else:
                return came


def index(group, entry):
    return list(group.children).index(entry)


def names_in(entry):
    return [entry.name] if not hasattr(entry, "children") else [n for inner in entry.children for n in names_in(inner)]


def family(strategy, *names, policy=PLENTY):
    world = World()
    world.supervisor.add_group("g", strategy, policy)
    for name in names:
        world.add(name, "g", policy)
    return world


@pytest.mark.parametrize(
    ("strategy", "stopped", "started"),
    [("one_for_one", "", "b"), ("one_for_all", "dca", "abcd"), ("rest_for_one", "dc", "bcd")],
)
def test_who_shares_the_fate_of_the_second_of_four(strategy, stopped, started):
    world = family(strategy, *"abcd")
    world.actions.clear()
    world.fail("b")
    assert "".join(world.settle()) == started
    assert "".join(a.name for a in world.actions if isinstance(a, Stop)) == stopped, "last started, first stopped"
    assert world.supervisor.groups["g"].epoch == (2 if strategy == "one_for_all" else 1)


def test_a_group_starts_when_all_have_stopped_and_one_after_the_other():
    world = family("one_for_all", *"abc")
    world.fail("b")
    assert world.stopping == ["c", "a"] and not world.starting
    world.stopped("c")
    assert not world.starting
    world.stopped("a")
    assert world.starting == ["a"]
    world.started("a")
    assert world.starting == ["b"] and world.supervisor.children["b"].state == "starting"


def test_a_failure_in_the_middle_of_a_restart_begins_it_anew():
    world = family("one_for_all", *"abc")
    world.fail("c")
    world.stopped("b")
    world.stopped("a")
    world.started("a")
    world.fail("a")
    assert world.starting == [] and world.stopping == ["b"]
    world.settle()
    assert sorted(world.up) == ["a", "b", "c"] and world.supervisor.groups["g"].epoch == 3


def test_one_node_with_many_members_is_one_failure_of_their_group():
    policy = RestartPolicy(max_restarts=1)
    for strategy in STRATEGIES:
        world = family(strategy, *"abcd", policy=policy)
        world.fail("b", "c", "d")
        world.settle()
        assert sorted(world.up) == [*"abcd"] and world.error is None
        world.fail("b", "c")
        assert isinstance(world.error, RestartBudgetExceeded)


def test_one_node_with_members_of_a_group_and_of_one_within_it_is_one_failure_of_the_outer():
    world = World()
    world.supervisor.add_group("outer", "one_for_all", RestartPolicy(max_restarts=1))
    world.supervisor.add_group("inner", "one_for_one", RestartPolicy(max_restarts=0), "outer")
    world.add("x", "inner", PLENTY)
    world.add("a", "outer", PLENTY)
    world.fail("a", "x")
    assert sorted(world.settle()) == ["a", "x"] and world.error is None


def test_a_group_above_counts_what_a_group_below_could_not_repair():
    world = World()
    supervisor = world.supervisor
    supervisor.add_group("outer", "one_for_all", RestartPolicy(max_restarts=1))
    supervisor.add_group("inner", "one_for_one", RestartPolicy(max_restarts=1), "outer")
    for name, group in (("x", "inner"), ("y", "inner"), ("a", "outer"), ("b", "outer")):
        world.add(name, group, None)
    world.actions.clear()
    world.fail("x")
    assert world.settle() == ["x"]
    world.fail("y")
    came = world.settle()
    assert {*came[:2]} == {*"xy"} and came[2:] == ["a", "b"] and supervisor.groups["inner"].epoch == 2
    new = [(a.group, a.epoch) for a in world.actions if isinstance(a, NewEpoch)]
    assert new == [("outer", 2), ("inner", 2)]
    world.fail("x")
    assert world.settle() == ["x"], "its count began anew"
    world.fail("x")
    assert "group outer failed again after 1 restarts" in str(world.error)
    assert "last reason: x failed again after 1 restarts" in str(world.error)
    assert world.settle() == [] and not world.act()


def test_a_temporary_group_stays_down_when_it_fails_and_a_temporary_member_with_its_siblings():
    world = World()
    world.supervisor.add_group("g", "one_for_all", RestartPolicy(max_restarts=1, restart="temporary"))
    world.add("a", "g", PLENTY)
    world.add("guest", "g", RestartPolicy(restart="temporary"))
    world.add("b", "g", PLENTY)
    world.add("shy", "g", RestartPolicy(restart="temporary"))
    world.fail("guest")
    assert world.settle() == [] and world.retired == ["guest"], "its own end is nobody else's"
    world.fail("a")
    assert world.settle() == ["a", "b"] and world.retired == ["guest", "shy"]
    world.fail("b")
    assert world.settle() == [] and sorted(world.retired) == ["a", "b", "guest", "shy"] and world.error is None


def test_restart_types_after_an_orderly_end_and_after_a_failure():
    for restart, after_end, after_failure in [
        ("permanent", ["a"], ["a"]), ("transient", [], ["a"]), ("temporary", [], []),
    ]:  # fmt: skip
        for why, expected in ((ORDERLY, after_end), (CRASH, after_failure)):
            world = World()
            world.add("a", policy=RestartPolicy(restart=restart))
            world.fail("a", why=why)
            assert world.settle() == expected and world.retired == [n for n in "a" if not expected]


def test_a_transient_member_that_had_finished_takes_part_in_the_restart_of_its_gang():
    world = World()
    world.supervisor.add_group("g", "one_for_all", PLENTY)
    world.add("a", "g", RestartPolicy(restart="transient"))
    world.add("b", "g", PLENTY)
    world.fail("a", why=ORDERLY)
    assert world.settle() == []
    world.fail("b")
    assert world.settle() == ["a", "b"]


@given(st.lists(st.integers(0, 3), min_size=1, max_size=4), st.sampled_from(STRATEGIES))
def test_nested_groups_survive_exactly_as_many_failures_as_their_budgets_multiply_to(limits, strategy):
    """Oracle: each restart of a group forgets what was counted in it, so the numbers of failures multiply."""
    world, parent = World(), "root"
    for depth, limit in enumerate(limits):
        policy = RestartPolicy(max_restarts=limit, window_s=1e9, backoff_s=0.0)
        world.supervisor.add_group(f"g{depth}", strategy, policy, parent)
        parent = f"g{depth}"
    world.add("a", parent, None)
    for _ in range(prod(limit + 1 for limit in limits) - 1):
        world.fail("a")
        assert world.settle() == ["a"]
    world.fail("a")
    assert world.error is not None


@st.composite
def trees(draw):
    """Groups as (name, strategy, parent), and children as (name, group), with names in the order of adding."""
    groups = [("g0", draw(st.sampled_from(STRATEGIES)), "root")]
    for i in range(1, draw(st.integers(1, 5))):
        parent = draw(st.sampled_from(["root", *(name for name, _, _ in groups)]))
        groups.append((f"g{i}", draw(st.sampled_from(STRATEGIES)), parent))
    homes = draw(st.lists(st.sampled_from(["root", *(name for name, _, _ in groups)]), min_size=1, max_size=10))
    return groups, [(f"a{i}", home) for i, home in enumerate(homes)]


def plant(tree, policy):
    world = World()
    for name, strategy, parent in tree[0]:
        world.supervisor.add_group(name, strategy, policy, parent)
    for name, home in tree[1]:
        world.add(name, home, policy)
    return world


@given(trees(), st.data())
def test_one_failure_restarts_what_the_strategy_says(tree, data):
    """Oracle: the definition, over the tree as it was drawn."""
    world = plant(tree, PLENTY)
    name, home = data.draw(st.sampled_from(tree[1]))
    strategy = {n: s for n, s, _ in tree[0]}.get(home, "one_for_one")
    entries = list(world.supervisor.groups[home].children)
    at = entries.index(world.supervisor.children[name])
    fate = {"one_for_one": [entries[at]], "one_for_all": entries, "rest_for_one": entries[at:]}[strategy]
    expected = [leaf for entry in fate for leaf in names_in(entry)]
    world.fail(name)
    assert sorted(world.settle()) == sorted(expected)
    assert sorted(world.up) == sorted(name for name, _ in tree[1])


@settings(max_examples=150)
@given(trees(), st.data())
def test_any_storm_of_failures_ends_with_all_up_or_with_a_reason(tree, data):
    """Whatever fails, starts and stops in whatever order: World checks each action; in the end none is forgotten."""
    policies = st.builds(
        RestartPolicy, max_restarts=st.integers(0, 4), window_s=st.just(50.0), backoff_s=st.sampled_from([0.0, 1.0]),
        restart=st.sampled_from(["permanent", "permanent", "transient", "temporary"]),
    )  # fmt: skip
    world = plant(tree, data.draw(policies))
    for _ in range(data.draw(st.integers(1, 40))):
        moves = ["wait"] + ["fail"] * bool(world.up + world.starting) + ["die"] * (len(world.up) > 1)
        moves += ["stopped"] * bool(world.stopping) + ["started"] * bool(world.starting)
        match data.draw(st.sampled_from(moves)):
            case "wait":
                world.now += data.draw(st.sampled_from([0.1, 1.0, 60.0]))
                world.act()
            case "fail":
                why = data.draw(st.sampled_from([CRASH, ORDERLY]))
                world.fail(data.draw(st.sampled_from(world.up + world.starting)), why=why)
            case "die":
                world.fail(*data.draw(st.lists(st.sampled_from(world.up), min_size=1, unique=True)))
            case "stopped":
                world.stopped(data.draw(st.sampled_from(world.stopping)))
            case "started":
                world.started(data.draw(st.sampled_from(world.starting)))
    world.settle()
    if world.error is None:
        assert sorted(world.up + world.retired) == sorted(name for name, _ in tree[1])
    else:
        assert "last reason" in str(world.error)


def test_a_name_is_used_once_and_a_removed_child_holds_nobody_up():
    world = World()
    world.supervisor.add_group("g", "rest_for_one", PLENTY)
    with pytest.raises(ValueError, match="there is a group 'g' already"):
        world.supervisor.add_group("g", "one_for_all", PLENTY)
    world.supervisor.add("a", None, "g", 0.0)
    world.supervisor.add("b", None, "g", 0.0)
    world.act()
    assert world.starting == ["a"], "the second waits for the first"
    world.supervisor.remove("a")
    world.starting.clear()
    world.act()
    assert world.starting == ["b"]
