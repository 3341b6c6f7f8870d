"""What carries weights from a publisher to its members: the contract of all carriers, and which one serves a pair.

    publisher's process                      controller                    each member's process
    Source.open(epoch) --token-->            Exchange  --Route-->          Sink.receive(manifest, route)
    Source.send(manifest, route)  =========================== bytes =====>   whole, verified, or an error
         '------------------------ abort(epoch): whatever failed ----------------'

A carrier is pulled from (shm, tree, ipc: `send` has nothing to do, a member that fails costs the others nothing), or
all take part at once (nccl: one that fails has the rest begin again, in a higher epoch). Its methods block: they are
called on threads of their own, never on a loop. `abort` comes from another thread. Knows nothing of what it carries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol

from .header import Manifest, Route, Seat

Tensors = Mapping[str, Any]
"""By name: numpy arrays on a host, cupy or torch ones on a GPU."""


class Box(Protocol):
    """A part of an array."""

    @property
    def slices(self) -> tuple[slice, ...]: ...


class Copy(Protocol):
    """One box of a published tensor, and where a member wants it; see plan.Copy."""

    @property
    def source_name(self) -> str: ...
    @property
    def source_box(self) -> Box: ...
    @property
    def dest_name(self) -> str: ...
    @property
    def dest_box(self) -> Box: ...


class Source(Protocol):
    """The publisher's end of a carrier."""

    collective: ClassVar[bool]
    """Whether `send` takes part in the transfer."""

    def open(self, epoch: int) -> tuple[str, bytes]:
        """Makes ready for the transfers of an epoch; an address and a token, for the routes of all members."""

    def send(self, manifest: Manifest, route: Route) -> None:
        """Takes part until every member has the version. Raises TransferFailed, TimeoutError past the deadline."""

    def abort(self, epoch: int) -> None:
        """Ends what goes on in this epoch or earlier ones, soon: their calls raise TransferFailed."""

    def close(self) -> None: ...


class Sink(Protocol):
    """A member's end of a carrier."""

    def receive(
        self, manifest: Manifest, route: Route, into: Tensors | None = None, copies: Sequence[Copy] | None = None
    ) -> Tensors:
        """The tensors of `manifest`, whole and verified; or those boxes of them that `copies` names, in `into`.

        After an error what is in `into` is undefined. Raises StaleIncarnation (the publisher has gone, or on),
        CorruptWeights, TransferFailed, TimeoutError.
        """

    def abort(self, epoch: int) -> None:
        """As Source.abort."""

    def close(self) -> None: ...


def choose(publisher: Seat, member: Seat, wanted: str = "auto") -> str:
    """The best carrier that both have: through one GPU, between GPUs, through the memory of one host, else the tree.

    `wanted` names one instead. Raises ValueError if it, or any, does not serve them.
    """
    both = set(publisher.carriers) & set(member.carriers)
    gpus = bool(publisher.gpu and member.gpu)
    fits = {
        "ipc": gpus and publisher.gpu == member.gpu,
        "nccl": gpus and publisher.gpu != member.gpu,
        "shm": publisher.host == member.host,
        "tree": bool(publisher.address),
    }
    able = [carrier for carrier, fit in fits.items() if fit and carrier in both]
    if wanted in able or (wanted == "auto" and able):
        return able[0] if wanted == "auto" else wanted
    raise ValueError(
        f"carrier {wanted!r} does not serve this publisher and this member: it has {', '.join(publisher.carriers)}"
        f"{' and an address' if publisher.address else ' and no address'}, the member has "
        f"{', '.join(member.carriers)}, and they are {'' if publisher.host == member.host else 'not '}on one host, "
        f"{'with' if gpus else 'without'} GPUs both; possible: {', '.join(able) or 'none'}"
    )
