"""The supervision tree: which children are stopped and started when some fail, in which order, and when it is given up.

    root                    one_for_one    what fails is started again
     +- actor pool
     +- group ranks         one_for_all    all are stopped, then all are started: a gang, one epoch higher
     |   +- actor rank0
     |   +- actor rank1
     +- group chain         rest_for_one   so are what failed and all that was added after it
         +- actor source
         +- group sinks ...

    a child:  down --Start--> starting --up--> up --ended--> down (it failed: its group decides)
                                  '----Stop----> stopping --ended--> down      retired: stays down for good

Every child has a budget of restarts, every group one for its children together. Exceeding either fails the group, which
is a failure of a child in the group above and is counted there. The root has no budget of its own: a failure that
reaches it is the end.

In a group with an order nothing starts while anything is still stopping, nor before what was added earlier is up.

Pure decisions: events come in with their time, `decide` gives the actions. It starts nothing and waits for nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from .errors import RestartBudgetExceeded
from .exits import Exit
from .supervisor import RestartBudget, RestartPolicy

Strategy = Literal["one_for_one", "one_for_all", "rest_for_one"]
ChildState = Literal["down", "starting", "up", "stopping", "retired"]

ROOT_GROUP = "root"


@dataclass(frozen=True, slots=True)
class Start:
    """Start this child; report `up` or `ended`."""

    name: str
    epoch: int
    why: Exit | None
    """What it is started again for; None for the first time."""


@dataclass(frozen=True, slots=True)
class Stop:
    """Stop this child, in parallel with others; report `ended`."""

    name: str
    why: Exit


@dataclass(frozen=True, slots=True)
class Retire:
    """This child stays down."""

    name: str
    why: Exit


@dataclass(frozen=True, slots=True)
class NewEpoch:
    """This group is restarted as a whole."""

    group: str
    epoch: int
    why: Exit


@dataclass(frozen=True, slots=True)
class GiveUp:
    """The failure has reached the root. Nothing follows."""

    error: RestartBudgetExceeded


Action = Start | Stop | Retire | NewEpoch | GiveUp


class Child:
    """An actor, as its supervisor sees it."""

    __slots__ = ("budget", "due", "group", "leaving", "name", "policy", "state", "why")

    def __init__(self, name: str, policy: RestartPolicy, group: Group, due: float, seed: int) -> None:
        self.name = name
        self.policy = policy
        self.group = group
        self.budget = RestartBudget(name, policy, seed)
        self.state: ChildState = "down"
        self.due = due
        """It is not started before."""
        self.why: Exit | None = None
        self.leaving = False
        """It stays down once it has stopped."""


class Group:
    """Children that are supervised together."""

    __slots__ = ("budget", "children", "epoch", "name", "parent", "policy", "strategy")

    def __init__(self, name: str, strategy: Strategy, policy: RestartPolicy, parent: Group | None, seed: int) -> None:
        self.name = name
        self.strategy: Strategy = strategy
        self.policy = policy
        self.parent = parent
        self.children: dict[Child | Group, None] = {}
        """In the order in which they were added."""
        self.budget = RestartBudget(f"group {name}", policy, seed)
        self.epoch = 1
        """One higher whenever all of it is restarted."""

    @property
    def depth(self) -> int:
        return 0 if self.parent is None else self.parent.depth + 1


class Supervisor:
    """The tree of one system. `seed`: of the jitter."""

    def __init__(self, seed: int = 0) -> None:
        self.root = Group(ROOT_GROUP, "one_for_one", RestartPolicy(), None, seed)
        self.children: dict[str, Child] = {}
        self.groups: dict[str, Group] = {ROOT_GROUP: self.root}
        self.error: RestartBudgetExceeded | None = None
        """Why it was given up."""
        self._seed = seed
        self._waiting: dict[Child, None] = {}
        """Those that are down and shall start."""
        self._actions: list[Action] = []

    # Events -------------------------------------------------------------------------------------------------

    def add_group(self, name: str, strategy: Strategy, policy: RestartPolicy, parent: str = ROOT_GROUP) -> Group:
        """A new, empty group. Raises ValueError if there is one of that name."""
        if name in self.groups:
            raise ValueError(f"there is a group {name!r} already; names are unique")
        above = self.groups[parent]
        group = self.groups[name] = Group(name, strategy, policy, above, self._seed)
        above.children[group] = None
        return group

    def add(self, name: str, policy: RestartPolicy | None, group: str, now: float) -> Child:
        """A new child, to be started as soon as its group's order allows; without a policy it has the group's."""
        home = self.groups[group]
        child = self.children[name] = Child(name, policy or home.policy, home, now, self._seed)
        home.children[child] = None
        self._waiting[child] = None
        return child

    def remove(self, name: str) -> None:
        """The child is supervised no more."""
        child = self.children.pop(name)
        del child.group.children[child]
        self._waiting.pop(child, None)

    def remove_group(self, name: str) -> None:
        """The group, which has no children any more, is none."""
        group = self.groups.pop(name)
        assert not group.children and group.parent is not None
        del group.parent.children[group]

    def dismiss(self, names: Iterable[str], why: Exit) -> None:
        """These children shall stop, and stay down; each is retired when it has stopped."""
        self._stop([self.children[name] for name in names], why, leave=True)

    def up(self, name: str) -> None:
        """A child has started."""
        child = self.children[name]
        if child.state == "starting":
            child.state = "up"

    def ended(self, names: Iterable[str], why: Exit, now: float) -> None:
        """These children run no more: one by itself, or all of a node with it. It may be what a Stop asked for."""
        failed: dict[Group, list[Child]] = {}
        for child in (self.children[name] for name in names):
            if child.state == "stopping":
                self._has_stopped(child)
            elif child.state in ("starting", "up"):
                child.state = "down"
                again = child.policy.restart != "temporary" and (why.kind != "stopped" or child.budget.after_stop())
                if again:
                    failed.setdefault(child.group, []).append(child)
                else:
                    self._retire(child, why)
        for group in sorted(failed, key=lambda group: group.depth):
            # What a group above has decided about already needs no decision here.
            undecided = [child for child in failed[group] if child.state == "down" and child not in self._waiting]
            if undecided and self.error is None:
                self._members_failed(group, undecided, why, now)

    def restart(self, name: str, why: Exit, now: float) -> None:
        """Somebody wants a child restarted: it, and those that share its fate; no budget counts it. Raises ValueError
        if it is of those that are never restarted."""
        child = self.children[name]
        if child.policy.restart == "temporary":
            raise ValueError(f"{name} is temporary: once it has stopped it is not started again")
        if child.group.strategy == "one_for_one":
            self._again([child], why, now)
        else:
            self._again(_sharing_fate(child.group, child), why, now, child.group)

    def waiting(self, now: float) -> list[tuple[str, str, float]]:
        """Those that shall start and may not yet: name, why not, seconds until it is looked at again."""
        rows = []
        for child in self._waiting:
            why = "its back-off" if child.due > now else f"its turn in group {child.group.name}"
            rows.append((child.name, why, child.due - now))
        return rows

    # Decisions ----------------------------------------------------------------------------------------------

    def decide(self, now: float) -> list[Action]:
        """What is to be done now, in order."""
        for child in list(self._waiting):
            if child.due <= now and self._may_start(child):
                del self._waiting[child]
                child.state = "starting"
                self._actions.append(Start(child.name, child.group.epoch, child.why))
        actions, self._actions = self._actions, []
        return actions

    def due(self, now: float) -> float | None:
        """When to ask again even if nothing happens."""
        return min((child.due for child in self._waiting if child.due > now), default=None)

    def _members_failed(self, group: Group, failed: list[Child], why: Exit, now: float) -> None:
        try:
            delays = [child.budget.count(now, str(why)) for child in failed]
            together = 0.0 if group is self.root else group.budget.count(now, str(why))
        except RestartBudgetExceeded as error:
            self._group_failed(group, error, now)
            return
        if group.strategy == "one_for_one":
            for child, delay in zip(failed, delays, strict=True):
                self._again([child], why, now + delay)
        else:
            self._again(_sharing_fate(group, failed[0], also=failed[1:]), why, now + together, group)

    def _group_failed(self, group: Group, error: RestartBudgetExceeded, now: float) -> None:
        """The failure climbs."""
        why = Exit(kind="exception", detail=str(error))
        parent = group.parent
        if parent is not None and group.policy.restart == "temporary":
            self._stop(list(_leaves(group)), why, leave=True)
            return
        if parent is None or parent is self.root:
            self.error = error
            self._waiting.clear()
            self._actions.append(GiveUp(error))
            return
        try:
            delay = parent.budget.count(now, str(error))
        except RestartBudgetExceeded as exceeded:
            self._group_failed(parent, exceeded, now)
            return
        if parent.strategy == "one_for_one":
            self._again([group], why, now + delay)
        else:
            self._again(_sharing_fate(parent, group), why, now + delay, parent)

    def _again(self, entries: list[Child | Group], why: Exit, due: float, group: Group | None = None) -> None:
        """Stops what of this still runs, and has all of it started. `group`: where all this is in."""
        if group is not None and len(entries) == len(group.children):
            self._raise_epoch(group, why)
        for entry in entries:
            for inner in _groups(entry):
                self._raise_epoch(inner, why)
                inner.budget.forget()
            if isinstance(entry, Group):
                for child in _leaves(entry):
                    child.budget.forget()
        children = [child for entry in entries for child in _leaves(entry)]
        self._stop(children, why)
        for child in children:
            child.due = due
            if not child.leaving and child.state in ("down", "retired"):
                child.state = "down"
                self._waiting[child] = None

    def _stop(self, children: list[Child], why: Exit, *, leave: bool = False) -> None:
        """Last started, first stopped. `leave`: all stay down; else only those that are never restarted."""
        for child in reversed(children):
            child.why, child.leaving = why, leave or child.policy.restart == "temporary"
            if child.state in ("starting", "up"):
                child.state = "stopping"
                self._actions.append(Stop(child.name, why))
            elif child.state == "down" and child.leaving:
                self._retire(child, why)

    def _has_stopped(self, child: Child) -> None:
        child.state = "down"
        if child.leaving:
            self._retire(child, child.why or Exit(kind="stopped", detail="its group was stopped"))
        elif self.error is None:
            self._waiting[child] = None

    def _retire(self, child: Child, why: Exit) -> None:
        child.state = "retired"
        self._waiting.pop(child, None)
        self._actions.append(Retire(child.name, why))

    def _raise_epoch(self, group: Group, why: Exit) -> None:
        group.epoch += 1
        self._actions.append(NewEpoch(group.name, group.epoch, why))

    def _may_start(self, child: Child) -> bool:
        entry: Child | Group = child
        group: Group | None = child.group
        while group is not None:
            if group.strategy != "one_for_one" and not _in_turn(group, entry):
                return False
            entry, group = group, group.parent
        return True


def _sharing_fate(group: Group, failed: Child | Group, also: Iterable[Child] = ()) -> list[Child | Group]:
    """What a group with an order restarts when this fails."""
    entries = list(group.children)
    if group.strategy == "one_for_all":
        return entries
    return entries[min(entries.index(entry) for entry in (failed, *also)) :]


def _in_turn(group: Group, entry: Child | Group) -> bool:
    """Whether nothing of the group is stopping and all before `entry` is up."""
    earlier = True
    for other in group.children:
        earlier = earlier and other is not entry
        for child in _leaves(other):
            if child.state == "stopping" or (earlier and child.state in ("down", "starting")):
                return False
    return True


def _leaves(entry: Child | Group) -> Iterator[Child]:
    if isinstance(entry, Child):
        yield entry
    else:
        for inner in entry.children:
            yield from _leaves(inner)


def _groups(entry: Child | Group) -> Iterator[Group]:
    if isinstance(entry, Group):
        yield entry
        for inner in entry.children:
            yield from _groups(inner)
