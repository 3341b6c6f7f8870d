"""The names at the prompt: refs, helpers, and `cluster`, which has the methods of System that look.

What they ask runs in the system; what a user computes from the answers runs here, in the console's own process.
"""

from __future__ import annotations

import builtins
import keyword
import time
from collections.abc import AsyncGenerator, Callable, Generator
from functools import partial
from pathlib import Path
from typing import Any

from .attach_link import Link
from .attach_tables import (
    Rows,
    Text,
    harmless,
    letter_rows,
    process_rows,
    setting_rows,
    told_text,
    trace_line,
    tree_text,
    wait_rows,
)  # fmt: skip

FOLLOW_S = 0.2
"""Between two looks at a file that is followed."""


class Ref:
    """An actor: `await ref.method(...)`, `ref.method.cast(...)`, `async for x in ref.method.stream(...)`."""

    def __init__(self, link: Link, name: str, messages: list[str]) -> None:
        self._link = link
        self._name = name
        self._messages = messages

    def __getattr__(self, method: str) -> Message:
        if method.startswith("_"):
            raise AttributeError(method)
        return Message(self._link, self._name, method)

    def __dir__(self) -> list[str]:
        return self._messages

    def __repr__(self) -> str:
        return f"Ref({self._name!r})"


class Call:
    """A question that is asked when it is awaited; the prompt awaits one that stands alone."""

    def __init__(self, link: Link, question: str, details: dict[str, Any]) -> None:
        self._ask = partial(link.ask_async, question, **details)

    def __await__(self) -> Generator[Any, None, Any]:
        return self._ask().__await__()


class Message:
    """One kind of message of one actor."""

    def __init__(self, link: Link, actor: str, method: str) -> None:
        self._link = link
        self._actor = actor
        self._method = method

    def __call__(self, *args: Any, **kwargs: Any) -> Call:
        """Call: asks and waits for the answer."""
        return Call(self._link, "call", self._message(args, kwargs))

    def cast(self, *args: Any, **kwargs: Any) -> None:
        """Sends and waits for nothing."""
        self._link.ask("cast", **self._message(args, kwargs))

    async def stream(self, *args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
        """Asks and iterates over the answers."""
        async for kind, item in self._link.follow("stream", **self._message(args, kwargs)):
            if kind == "item":
                yield item

    def __repr__(self) -> str:
        return f"{self._actor}.{self._method}"

    def _message(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        return {"actor": self._actor, "method": self._method, "args": list(args), "kwargs": kwargs}


class Exposed:
    """An object that an actor has exposed: `await name.method(...)`."""

    def __init__(self, link: Link, name: str, actor: str) -> None:
        self._link = link
        self._name = name
        self._actor = actor

    def __getattr__(self, method: str) -> Callable[..., Call]:
        if method.startswith("_"):
            raise AttributeError(method)

        def invoke(*args: Any, **kwargs: Any) -> Call:
            details = {"name": self._name, "method": method, "args": list(args), "kwargs": kwargs}
            return Call(self._link, "invoke", details)

        return invoke

    def __dir__(self) -> list[str]:
        names: list[str] = self._link.ask("names", actor=self._actor, path=self._name)
        return [name.rstrip("(") for name in names if not name.startswith("_")]

    def __repr__(self) -> str:
        return str(self._link.ask("peek", actor=self._actor, path=self._name))


class Cluster:
    """The running system, by the names that System has for it."""

    def __init__(self, link: Link, helpers: Helpers) -> None:
        self._link = link
        self._helpers = helpers

    def find(self, name: str) -> Ref:
        """The ref to an actor by name."""
        return self._helpers.find(name)

    def tree(self) -> list[dict[str, Any]]:
        """One row per actor."""
        rows: list[dict[str, Any]] = self._link.ask("tree")["actors"]
        return rows

    def groups(self) -> list[dict[str, Any]]:
        """One row per group of actors."""
        rows: list[dict[str, Any]] = self._link.ask("groups")
        return rows

    def pids(self) -> dict[str, int]:
        """Process id of each node."""
        pids: dict[str, int] = self._link.ask("pids")
        return pids

    async def waits(self) -> list[dict[str, Any]]:
        """Who waits for whom."""
        rows: list[dict[str, Any]] = await self._link.ask_async("waits")
        return rows

    async def dead_letters(self) -> list[dict[str, Any]]:
        """Messages that could not be delivered."""
        rows: list[dict[str, Any]] = await self._link.ask_async("dead_letters")
        return rows

    async def counters(self) -> list[dict[str, Any]]:
        """What each node has counted."""
        rows: list[dict[str, Any]] = await self._link.ask_async("counters")
        return rows

    async def stacks(self, node: str) -> str:
        """Where the threads of a node are."""
        return str(await self._link.ask_async("stack", name=node))

    def __repr__(self) -> str:
        return f"<the system of {self._link.run}>"


class Helpers:
    """What can be called at the prompt; `help()` lists it by the first lines of the docstrings."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self.entered = ""
        """The actor in which code is evaluated; "" for none."""

    def tree(self) -> Text:
        """the actors by group: node, state, mailbox, restarts"""
        return tree_text(self._link.ask("tree"))

    def ps(self) -> Rows:
        """the processes: memory, processor time, threads"""
        return process_rows(self._link.ask("ps"))

    def find(self, name: str) -> Ref:
        """the ref to an actor: await find("trainer").position()"""
        known = self._link.hello["actors"]
        if name not in known:
            known = self.refresh()["actors"]
        if name not in known:
            import difflib

            near = difflib.get_close_matches(name, known, n=1) or [", ".join(known)]
            raise LookupError(f"no actor named {name!r}; there is {near[0]}")
        return Ref(self._link, name, known[name])

    def enter(self, actor: Ref | str) -> None:
        """from now on code runs inside that actor, between two messages, with `self` bound"""
        self.entered = self.find(_name(actor))._name

    def leave(self) -> None:
        """code runs here again"""
        self.entered = ""

    def peek(self, actor: Ref | str = "", path: str = "") -> Text:
        """an attribute of an actor, also while it computes or hangs: peek(trainer, "_learner.step")"""
        return Text(self._link.ask("peek", actor=self._actor(actor), path=path))

    def stack(self, actor: Ref | str = "") -> Text:
        """where the threads and tasks of an actor's process are, also while it hangs"""
        return Text(self._link.ask("stack", name=self._actor(actor)))

    def waits(self) -> Rows:
        """who waits for whom, since when, until when"""
        return wait_rows(self._link.ask("waits"))

    def dead_letters(self) -> Rows:
        """messages that could not be delivered, and why"""
        return letter_rows(self._link.ask("dead_letters"))

    def pause(self, actor: Ref | str = "") -> Text:
        """holds back an actor's messages, but those of the control lane"""
        name = self._actor(actor)
        return Text(f"{name} is paused, {self._link.ask('pause', actor=name)} messages wait; resume({name!r}) goes on")

    def resume(self, actor: Ref | str = "") -> Text:
        """lets a paused actor go on"""
        name = self._actor(actor)
        return Text(f"{name} goes on, {self._link.ask('pause', actor=name, paused=False)} messages waited")

    def restart(self, actor: Ref | str = "") -> None:
        """stops an actor in good order and starts it again"""
        self._link.ask("restart", actor=self._actor(actor))

    def kill(self, actor: Ref | str = "") -> Text:
        """kills the process of an actor (kill -9); the supervisor starts it again"""
        return Text(f"killed process {self._link.ask('kill', actor=self._actor(actor))}")

    def tail(self, what: Ref | str = "events", lines: int = 10, follow: bool = False) -> Text | None:
        """the last events, or lines of a node's log: tail("rollout", lines=50, follow=True)"""
        name = _name(what)
        if name != "events":
            name = {row["name"]: row["node"] for row in self._link.ask("tree")["actors"]}.get(name, name)
        return tail_file(Path(self._link.hello["run"]), name, lines, follow=follow)

    def trace(self, actor: Ref | str = "", seconds: float = 5.0) -> None:
        """follows the messages of an actor for a while"""
        name = self._actor(actor)
        self._link.ask(
            "trace",
            lambda _, rows: print(*(harmless(trace_line(row)) for row in rows), sep="\n"),
            actor=name,
            seconds=float(seconds),
        )

    def explain(self, sample: Any) -> Text:
        """what happened to a sample, and why: explain(17)"""
        return told_text(self._link.ask("explain", sample=sample))

    def settings(self, **changes: Any) -> Rows | Text:
        """what can be changed while it runs; settings(max_staleness=2) changes it"""
        if not changes:
            return setting_rows(self._link.ask("settings"))
        lines = []
        for name, value in changes.items():
            done = self._link.ask("change", name=name, value=value)
            late = "".join(f"; {actor} takes it later: {why}" for actor, why in done["late"].items())
            lines.append(f"{name}: {done['old']} -> {done['new']}{late}")
        return Text("\n".join(lines))

    def help(self, what: Any = None) -> Text | None:
        """this list; help(x) of a ref lists its messages"""
        if isinstance(what, Ref):
            return Text(f"{what!r} answers {', '.join(dir(what))}")
        if what is not None:
            builtins.help(what)
            return None
        return help_text(self, NAMES)

    def refresh(self) -> dict[str, Any]:
        """Asks again which actors there are."""
        self._link.hello = self._link.ask("hello")
        return self._link.hello

    def _actor(self, actor: Ref | str) -> str:
        name = _name(actor) or self.entered
        if not name:
            raise TypeError("name an actor, for example stack(trainer); inside of one it may be left out")
        return name


NAMES = (
    "tree", "ps", "find", "enter", "leave", "peek", "stack", "waits", "dead_letters", "pause", "resume", "restart",
    "kill", "tail", "trace", "explain", "settings", "help",
)  # fmt: skip


def namespace(link: Link, helpers: Helpers) -> dict[str, Any]:
    """What code at the prompt sees: helpers, `cluster`, exposed objects, and a ref of each actor with a plain name."""
    names: dict[str, Any] = {"__name__": "__console__", "cluster": Cluster(link, helpers)}
    bind(names, link)
    return names | {name: getattr(helpers, name) for name in NAMES}


def bind(names: dict[str, Any], link: Link) -> None:
    """Adds refs and exposed objects that are new; what the user has bound stays."""
    for actor, messages in link.hello["actors"].items():
        if actor.isidentifier() and not keyword.iskeyword(actor):
            names.setdefault(actor, Ref(link, actor, messages))
    for name, actor in link.hello["exposed"].items():
        if name.isidentifier():
            names.setdefault(name, Exposed(link, name, actor))


def help_text(helpers: object, names: tuple[str, ...]) -> Text:
    """A line for each."""
    width = max(map(len, names)) + 2
    return Text("\n".join(f"{name + '()':<{width}}  {getattr(helpers, name).__doc__}" for name in names))


def tail_file(run: Path, name: str, lines: int, *, follow: bool) -> Text | None:
    """The end of events.jsonl, or of a node's log. `follow`: prints it, and what comes, until Ctrl-C."""
    path = run / "events.jsonl" if name == "events" else run / "logs" / f"{name}.log"
    try:
        with path.open("rb") as file:
            text = b"\n".join(file.read().splitlines()[-lines:]).decode("utf-8", "replace")
            if not follow:
                return Text(text)
            print(harmless(text))
            while True:
                part = file.read()
                print(harmless(part.decode("utf-8", "replace")), end="", flush=True)
                time.sleep(FOLLOW_S)
    except FileNotFoundError:
        logs = ", ".join(sorted(log.stem for log in (run / "logs").glob("*.log")))
        raise LookupError(f"{path} is not there; there are: events, {logs}") from None
    except KeyboardInterrupt:
        return None


def _name(actor: Ref | str) -> str:
    return actor._name if isinstance(actor, Ref) else actor
