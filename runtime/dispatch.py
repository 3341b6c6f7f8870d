"""What each rank of a worker group is given, and whose answers count: HybridFlow's protocols (2409.19256, table 3).

    @dispatch(THREE_D)                            prompts --cut over d--> every rank of a replica gets the same part
    @message(thread=True)                         answers <--joined------ rank t=0 of the last stage of each replica
    def generate(self, prompts): ...

    protocol     distribute                                      collect
    ONE_TO_ALL   the same arguments to every rank                a list, by rank
    SPMD         the same arguments to every rank                what rank 0 says
    ALL_TO_ALL   of each argument, a list, item r to rank r      a list, by rank
    DP           a part of the batch to each rank                joined
    THREE_D      a part of the batch to each replica             joined, from p=-1, t=0 of each replica
    PP_ONLY      the same arguments to every rank                a list, from d=0, t=0 of each stage
    RANK_ZERO    to rank 0 alone                                 what it says

Batches (batches.py) are cut into parts of the same size, since ranks meet in collectives: the last one is filled up
with samples from the beginning, whose results are dropped. `Whole(x)` sends a list or an array as it is to every rank.
Knows nothing of actors; a protocol of one's own is a Protocol.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from .batches import Empty, count, join, part
from .layout import Layout

F = TypeVar("F", bound=Callable[..., Any])


class Arguments(NamedTuple):
    """Of one call."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    samples: Sequence[int] | None = None
    """Of a part: which samples of the caller's batch they are."""

    def map(self, change: Callable[[Any], Any], samples: Sequence[int] | None = None) -> Arguments:
        """The same call with every argument changed."""
        kwargs = {name: change(value) for name, value in self.kwargs.items()}
        return Arguments(tuple(change(value) for value in self.args), kwargs, samples)

    @property
    def num_samples(self) -> int:
        """Of the batches among the arguments. Raises ValueError if there is none, one is empty, or they differ."""
        number = count(*self.args, *self.kwargs.values())
        if number is None:
            raise ValueError("none of its arguments is a batch that can be cut: an array, a list, a dict of such")
        if not number:
            raise ValueError("the batch is empty")
        return number


class Whole:
    """A list, an array or a batch that every rank gets whole."""

    def __init__(self, value: Any) -> None:
        self.value = value


Distribute = Callable[[Layout, Arguments], list[Arguments | None]]
"""What each rank is asked, by rank; None: it is not."""
Collect = Callable[[list[Any], Arguments, Empty], Any]
"""(answers of the sources, in their order, what the caller asked, room for arrays) -> what the caller gets."""


@dataclass(frozen=True)
class Protocol:
    """How a method of all ranks is called as one."""

    name: str
    distribute: Distribute
    collect: Collect
    sources: Callable[[Layout], list[int]] = field(default=lambda layout: list(range(layout.size)))
    """The ranks whose answers count."""
    cuts: bool = False
    """The answers are parts of a batch, so they can stay where they are (remote.py)."""


def dispatch(protocol: Protocol) -> Callable[[F], F]:
    """Says how a @message of a Worker is called when its group is. Goes above @message."""

    def mark(method: F) -> F:
        if not hasattr(method, "__message__"):
            raise TypeError(f"@dispatch {method.__qualname__}: put it above @message")
        method.__dispatch__ = protocol  # type: ignore[attr-defined]
        return method

    return mark


def split(arguments: Arguments, parts: int) -> list[Arguments]:
    """Cuts the batches among the arguments into `parts` of the same size, the last filled up from the beginning."""
    number = arguments.num_samples
    size = -(-number // parts)
    pieces = []
    for start in range(0, parts * size, size):
        samples = [i % number for i in range(start, start + size)]
        begin = start % number if start >= number else start
        pieces.append(arguments.map(lambda value, b=begin: _open(value, b, b + size), samples))  # type: ignore[misc]
    return pieces


def joined(answers: list[Any], asked: Arguments, empty: Empty) -> Any:
    """The parts as one batch, without what was filled up. Answers that are no batches come as a list."""
    if all(answer is None for answer in answers):
        return None
    if count(answers[0]) is None:
        return answers
    number, size = asked.num_samples, -(-asked.num_samples // len(answers))
    for index, answer in enumerate(answers):
        if (given := count(answer)) != size:
            raise ValueError(f"part {index} came back with {given} samples, it was given {size}")
    parts = []
    for index, answer in enumerate(answers):
        left = number - index * size
        if left > 0:
            parts.append(answer if left >= size else part(answer, 0, left))
    return join(parts, empty)


def _open(value: Any, start: int, stop: int) -> Any:
    return value.value if isinstance(value, Whole) else part(value, start, stop)


def _same(layout: Layout, asked: Arguments) -> list[Arguments | None]:
    whole = asked.map(lambda value: value.value if isinstance(value, Whole) else value)
    return [whole] * layout.size


def _items(layout: Layout, asked: Arguments) -> list[Arguments | None]:
    for value in (*asked.args, *asked.kwargs.values()):
        if not isinstance(value, list | tuple) or len(value) != layout.size:
            raise ValueError(f"every argument must be a list with one item for each of the {layout.size} ranks")
    return [asked.map(lambda value, r=rank: value[r]) for rank in range(layout.size)]  # type: ignore[misc]


def _by_rank(layout: Layout, asked: Arguments) -> list[Arguments | None]:
    return [*split(asked, layout.size)]


def _by_replica(layout: Layout, asked: Arguments) -> list[Arguments | None]:
    parts = split(asked, layout.dp)
    return [parts[layout.place(rank).d] for rank in range(layout.size)]


def _first(layout: Layout, asked: Arguments) -> list[Arguments | None]:
    return [_same(layout, asked)[0], *[None] * (layout.size - 1)]


def _listed(answers: list[Any], asked: Arguments, empty: Empty) -> Any:
    return answers


def _only(answers: list[Any], asked: Arguments, empty: Empty) -> Any:
    return answers[0]


def _rank_zero(layout: Layout) -> list[int]:
    return [0]


def _last_stage(layout: Layout) -> list[int]:
    return [layout.rank(-1, d, 0) for d in range(layout.dp)]


def _stages(layout: Layout) -> list[int]:
    return [layout.rank(p, 0, 0) for p in range(layout.pp)]


ONE_TO_ALL = Protocol("ONE_TO_ALL", _same, _listed)
SPMD = Protocol("SPMD", _same, _only, _rank_zero)
ALL_TO_ALL = Protocol("ALL_TO_ALL", _items, _listed)
DP = Protocol("DP", _by_rank, joined, cuts=True)
THREE_D = Protocol("THREE_D", _by_replica, joined, _last_stage, cuts=True)
PP_ONLY = Protocol("PP_ONLY", _same, _listed, _stages)
RANK_ZERO = Protocol("RANK_ZERO", _first, _only, _rank_zero)
