"""The generic schema of cluster.toml: what it builds, and one message for each mistake."""

from __future__ import annotations

import subprocess
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import pytest
from annotated_types import Ge, Le

from headrace.runtime import Actor, toml
from headrace.runtime.cluster import ClusterSpec, load_cluster, to_table
from headrace.runtime.gang import with_ranks
from headrace.runtime.layout import Layout
from headrace.runtime.toml import ConfigError


@dataclass(frozen=True, kw_only=True)
class Paint:
    """A table of the test's own."""

    colour: Literal["red", "green"]
    coats: Annotated[int, Ge(1), Le(9)] = 2
    thinner: float | None = None
    sizes: tuple[float, ...] = (1.0, 2.0)

    def __post_init__(self) -> None:
        if self.colour == "red" and self.coats > 5:
            raise ValueError("coats must be at most 5 for red paint, got too many; take green")
        if len(self.sizes) > 3:
            raise ValueError("the bucket is too small; take another")


@dataclass(frozen=True, kw_only=True)
class Brush:
    width: Annotated[int, Ge(1)] = 3


@dataclass(kw_only=True)
class Painter(Actor):
    paint: Paint
    speed: Annotated[float, Ge(0)] = 1.0
    brush: Brush = field(default_factory=Brush)
    labels: dict[str, str] = field(default_factory=dict)
    alpha: Literal["auto"] | float = "auto"
    verbose: bool = False


@dataclass(kw_only=True)
class Clash(Actor):
    node: int = 0


class Plain:
    pass


class NotConfigured(Actor):
    pass


TABLES = {"paint": Paint}

GOOD = """
[run]
name = "house"
seed = 7

[nodes.wall]
threads = 2
env = { MODE = "fast" }
[nodes.roof]

[paint]
colour = "green"

[actors.ann]
class = "village:Painter"
node = "wall"
restart = "transient"
window_s = 30
speed = 2
alpha = 0.5
brush.width = 4

[actors.bob]
class = "village:Painter"
labels = { a = "b" }
"""


@pytest.fixture(autouse=True)
def _village(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    module = types.ModuleType("village")
    module.__dict__.update(Painter=Painter, Clash=Clash, Plain=Plain, NotConfigured=NotConfigured, Actor=Actor)
    monkeypatch.setitem(sys.modules, "village", module)
    yield


def load(text: str) -> tuple[ClusterSpec, dict[str, Any]]:
    return load_cluster(toml.parse(text, "c.toml"), TABLES)


def message(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(text)
    return str(caught.value)


def test_a_good_file_builds_configured_actors() -> None:
    cluster, tables = load(GOOD)
    paint = Paint(colour="green")
    assert tables == {"paint": paint}
    assert (cluster.run.name, cluster.run.seed, str(cluster.run.path)) == ("house", 7, "runs/house")
    ann, bob = cluster.actors.values()
    assert ann.instance == Painter(paint=paint, speed=2.0, alpha=0.5, brush=Brush(width=4))
    assert isinstance(ann.instance, Painter)
    assert isinstance(ann.instance.speed, float)
    assert ann.instance.paint is tables["paint"]
    assert (ann.name, ann.node, ann.policy.restart, ann.policy.window_s) == ("ann", "wall", "transient", 30.0)
    assert (bob.name, bob.node, bob.policy.restart) == ("bob", "root", "permanent")
    assert cluster.actors_on("wall") == [ann]
    assert cluster.actors_on("roof") == []
    wall = cluster.nodes["wall"].spec("wall")
    assert (wall.name, wall.env["OMP_NUM_THREADS"], wall.env["MODE"]) == ("wall", "2", "fast")


def test_an_actor_lives_on_the_node_of_its_own_name_if_there_is_one() -> None:
    cluster, _ = load(GOOD.replace("[nodes.roof]", "[nodes.bob]"))
    assert cluster.actors["bob"].node == "bob"


def test_what_was_resolved_loads_to_the_same() -> None:
    loaded = load(GOOD)
    assert load(toml.dump(to_table(*loaded))) == loaded


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        # tables
        ("[paint]", "[pant]", 'c.toml:11: [pant]: unknown table; did you mean "paint"?'),
        ("[paint]", "[zz]\n[paint]", "c.toml:11: [zz]: unknown table; known are run, nodes, groups, actors, paint"),
        ("\n[run]", "x = 1\n[run]", "x: this key belongs into a table; tables are run, nodes, groups, actors, paint"),
        ("[paint]", "[x]", "c.toml:11: [x]: unknown table; known are run, nodes, groups, actors, paint"),
        # keys
        ("seed", "sed", 'c.toml:4: [run] sed: unknown key; did you mean "seed"?'),
        (
            "threads", "cores",
            "c.toml:7: [nodes.wall] cores: unknown key; known are launcher, threads, env, start, hang_s",
        ),
        ("speed", "sped", 'c.toml:19: [actors.ann] sped: unknown key; did you mean "speed"?'),
        ("restart =", "restat =", 'c.toml:17: [actors.ann] restat: unknown key; did you mean "restart"?'),
        ("brush.width", "brush.widht", 'c.toml:21: [actors.ann.brush] widht: unknown key; did you mean "width"?'),
        ("speed = 2", "paint = 2", "c.toml:19: [actors.ann] paint: comes from the table [paint]; set it there"),
        ('name = "house"', "", "c.toml:2: [run] name: missing; this key has no default"),
        ('colour = "green"', "", "c.toml:11: [paint] colour: missing; this key has no default"),
        # types and ranges
        ("seed = 7", 'seed = "7"', 'c.toml:4: [run] seed: must be a valid integer, got "7"'),
        ("seed = 7", "seed = 7.5", "c.toml:4: [run] seed: must be a valid integer, got 7.5"),
        ("seed = 7", "seed = true", "c.toml:4: [run] seed: must be a valid integer, got true"),
        ("seed = 7", "seed = -1", "c.toml:4: [run] seed: must be greater than or equal to 0, got -1"),
        ('"house"', "3", "c.toml:3: [run] name: must be a valid string, got 3"),
        ("speed = 2", "verbose = 1", "c.toml:19: [actors.ann] verbose: must be a valid boolean, got 1"),
        ("speed = 2", "labels.x = 1", "c.toml:19: [actors.ann.labels] x: must be a valid string, got 1"),
        ('"green"', '"blue"', "c.toml:12: [paint] colour: must be 'red' or 'green', got \"blue\""),
        ('"green"', "1979-05-27", "c.toml:12: [paint] colour: must be 'red' or 'green', got 1979-05-27"),
        ('"green"', '"green"\nsizes = [1, "a"]', 'c.toml:13: [paint] sizes: element 1 must be a valid number, got "a"'),
        ("alpha = 0.5", 'alpha = "manual"', "c.toml:20: [actors.ann] alpha: must be 'auto' or must be a valid number"),
        ("brush.width = 4", "brush = 4", "c.toml:21: [actors.ann] brush: must be a table, got 4"),
        ("[nodes.roof]", "", None),
        ("[nodes.roof]", "[nodes]\nroof = 3", "c.toml:10: [nodes] roof: must be a table, got 3"),
        # what the dataclass itself refuses, at the field that it names
        ('"green"', '"red"\ncoats = 6', "c.toml:13: [paint] coats: must be at most 5 for red paint, got too many"),
        ('"green"', '"green"\nsizes = [1, 2, 3, 4]', "c.toml:11: [paint]: the bucket is too small; take another"),
        ('"house"', '"../x"', "c.toml:3: [run] name: must be letters, digits, '.', '_', '-' (at most"),
        # nodes and supervision
        ('node = "wall"', 'node = "wal"', 'c.toml:16: [actors.ann] node: there is no node "wal"; did you mean "wall"?'),
        ('"wall"', '"x"', '[actors.ann] node: there is no node "x"; add [nodes.x], or take one of root, wall, roof'),
        ("[nodes.roof]", "[nodes.root]", '[nodes.root]: "root" is the launching process itself and has no settings'),
        ("[nodes.roof]", '[nodes."a b"]', "c.toml:9: [nodes.a b]: a name is made of letters, digits, '_' and '-'"),
        ('"transient"', '"always"', "[actors.ann] restart: must be 'permanent', 'transient' or 'temporary', got"),
        ("window_s = 30", "window_s = 0", "c.toml:18: [actors.ann] window_s: must be greater than 0, got 0"),
        # classes
        ('class = "village:Painter"\nnode', "node", "c.toml:14: [actors.ann] class: missing; name the actor's class"),
        ("village:Painter", "village.Painter", 'got "village.Painter"; did you mean "village:Painter"?'),
        ('"village:Painter"', "3", "c.toml:15: [actors.ann] class: must be module:Class, got 3, for example"),
        ("village:Painter", "vilage:Painter", "c.toml:15: [actors.ann] class: there is no module vilage"),
        ("village:Painter", "headrace.runtme.pool:X", 'no module headrace.runtme; did you mean "headrace.runtime"?'),
        ("village:Painter", "headrace.runtime.pol:X", 'headrace.runtime.pol; did you mean "headrace.runtime.pool"?'),
        ("village:Painter", "village:Paintr", 'village has no class Paintr; did you mean "Painter"?'),
        ("village:Painter", "village:Zz", "village has no class Zz; its actors are Painter, Clash"),
        ("village:Painter", "village:Plain", 'village:Plain is no actor; did you mean "Painter"?'),
        ("village:Painter", "village:NotConfigured", "NotConfigured is no actor; an actor is a dataclass derived"),
        ("village:Painter", "village:Actor", "village:Actor is no actor"),
        ("village:Painter", "village:Clash", "[actors.ann] class: Clash has a field 'node', a key of supervision"),
    ],
)  # fmt: skip
def test_each_mistake_gets_one_message(old: str, new: str, expected: str | None) -> None:
    text = GOOD.replace(old, new, 1)
    assert text != GOOD
    if expected is None:
        load(text)
    else:
        assert expected in message(text)


def test_a_job_without_actors() -> None:
    assert "there is no actor; add a table [actors.NAME]" in message('run.name = "x"\npaint.colour = "red"')


@pytest.mark.parametrize("source", ["import nothing_of_that_name", "def (", "from headrace.runtime import Nonesuch"])
def test_a_module_that_can_not_be_imported(source: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_village.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    text = message(GOOD.replace("village:Painter", "broken_village:Painter", 1))
    assert text.startswith("c.toml:15: [actors.ann] class: broken_village ")
    assert "\n" not in text


def test_set_of_a_number_for_a_string_says_how_to_quote(tmp_path: Any) -> None:
    path = tmp_path / "c.toml"
    path.write_text(GOOD)
    with pytest.raises(ConfigError) as caught:
        load_cluster(toml.read(path, ["run.name=7"]), TABLES)
    assert str(caught.value) == (
        "--set run.name=7: [run] name: must be a valid string, got 7; quote it: --set 'run.name=\"7\"'"
    )


def test_the_schema_loads_neither_torch_nor_rich() -> None:
    code = "import sys, headrace.runtime.cluster; print({'torch', 'rich', 'zmq'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() in ("set()", "{'zmq'}")


GROUPS = """
[groups.crew]
strategy = "one_for_all"
max_restarts = 3
[groups.painters]
parent = "crew"
[actors.ann]
class = "village:Painter"
group = "painters"
[actors.bob]
class = "village:Painter"
group = "crew"
[actors.eve]
class = "village:Painter"
group = "crew"
restart = "temporary"
"""


def test_groups_are_supervised_together_and_give_their_policy_to_members_that_have_none() -> None:
    cluster, tables = load(GOOD.partition("[actors.ann]")[0] + GROUPS)
    assert [(name, group.strategy, group.parent) for name, group in cluster.groups.items()] == [
        ("crew", "one_for_all", "root"), ("painters", "one_for_one", "crew"),
    ]  # fmt: skip
    ann, bob, eve = cluster.actors.values()
    assert (ann.group, bob.group) == ("painters", "crew")
    assert (bob.policy.max_restarts, bob.policy.restart) == (3, "permanent")
    assert (eve.policy.max_restarts, eve.policy.restart) == (8, "temporary")
    again, _ = load(toml.dump(to_table(cluster, tables)))
    assert again == cluster


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        ('"one_for_all"', '"one_for_al"', "[groups.crew] strategy: must be"),
        ('parent = "crew"', 'parent = "crow"', 'there is no group "crow"; did you mean "crew"?'),
        ('group = "painters"', 'group = "others"', 'there is no group "others"; add [groups.others] above, or take'),
        ("[groups.crew]", "[groups.root]", '"root" is the group of all that names no other'),
        ("max_restarts = 3", "max_restart = 3", 'unknown key; did you mean "max_restarts"?'),
    ],
)
def test_mistakes_in_groups_are_named(old: str, new: str, text: str) -> None:
    assert text in message(GOOD.partition("[actors.ann]")[0] + GROUPS.replace(old, new, 1))


RANKS = """
[run]
name = "r"
[paint]
colour = "green"
[nodes.far]
threads = 2
[nodes.ann-2]
threads = 3
[actors.ann]
class = "worker_actors:Rank"
node = "far"
ranks = 3
max_restarts = 5
[actors.bob]
class = "worker_actors:Rank"
"""


def test_ranks_become_actors_nodes_and_a_gang() -> None:
    cluster, tables = load(RANKS)
    assert load(toml.dump(to_table(cluster, tables)))[0] == cluster
    assert list(cluster.actors) == ["ann", "bob"]
    whole = with_ranks(cluster)
    assert list(whole.actors) == ["ann", "ann/1", "ann/2", "bob"]
    assert [(s.node, s.group) for s in whole.actors.values()] == [
        ("far", "ann"), ("ann-1", "ann"), ("ann-2", "ann"), ("root", "root"),
    ]  # fmt: skip
    assert [(s.instance.rank, s.instance.layout) for s in whole.actors.values()] == [
        (0, Layout(3)), (1, Layout(3)), (2, Layout(3)), (0, Layout(1)),
    ]  # fmt: skip
    assert {name: node.threads for name, node in whole.nodes.items()} == {"far": 2, "ann-1": 2, "ann-2": 3}
    assert (whole.groups["ann"].strategy, whole.groups["ann"].policy.max_restarts) == ("one_for_all", 5)
    alone, _ = load(RANKS.replace("ranks = 3", "ranks = 1"))
    assert with_ranks(alone) == alone


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        ("ranks = 3", "ranks = 0", "[actors.ann] ranks: must be greater than or equal to 1, got 0"),
        ("ranks = 3", "rank = 1", "[actors.ann] rank: every rank has its own; set ranks, the number of them"),
        (
            'worker_actors:Rank"\nnode',
            'headrace.runtime.pool:SamplePool"\nnode',
            "since it is no Worker; remove the key",
        ),
    ],
)
def test_mistakes_in_ranks_are_named(old: str, new: str, text: str) -> None:
    assert text in message(RANKS.replace(old, new, 1))
