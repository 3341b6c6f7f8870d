"""Every error of the runtime: who raises it, and what to do.

All derive from RuntimeFault. Each survives the wire (`name`, `message`) and pickling.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from .exits import Exit


class RuntimeFault(Exception):
    """Base of all errors below."""


class CodecError(RuntimeFault):
    """A value can't travel in a message, or bytes are no message. Raised by the sender's `encode` or by `decode`."""


class ActorDied(RuntimeFault):
    """The actor (or its node) died while your call was with it; the text says if it is sure not to have run. Ask again
    if it may run twice: the same ref reaches the next incarnation."""


class ActorRestarted(ActorDied):
    """The message was for an earlier incarnation of the actor, and did not run. Ask again: the same ref reaches the
    present one."""


class UnknownActor(RuntimeFault):
    """No actor of that name. The text lists the nearest names."""


class UnknownMessage(RuntimeFault):
    """The actor has no @message of that name. The text lists those it has."""


class MailboxFull(RuntimeFault):
    """A cast found the mailbox full, or a call could not be queued. Slow down, or use a call, which waits."""


class DeadlineExceeded(RuntimeFault, TimeoutError):
    """A call was not answered in time; the callee has been told to stop. The text says who waited for whom."""


class RemoteError(RuntimeFault):
    """A message raised in another actor. `remote_type` and `remote_traceback` say what and where."""

    def __init__(self, message: str, remote_type: str = "", remote_traceback: str = "") -> None:
        super().__init__(message, remote_type, remote_traceback)
        self.remote_type = remote_type
        self.remote_traceback = remote_traceback

    def __str__(self) -> str:
        where = f"\n\nTraceback in the actor:\n{self.remote_traceback}" if self.remote_traceback else ""
        return f"{self.args[0]}{where}"


class RankError(RemoteError):
    """A rank of a worker group raised; `rank` says which."""

    def __init__(self, message: str, remote_type: str = "", remote_traceback: str = "", rank: int = 0) -> None:
        super().__init__(message, remote_type, remote_traceback)
        self.rank = rank


class BadSample(RuntimeFault):
    """A sample of a batch can't be worked on. The text begins "sample N:"; a worker group tells its caller the number
    that the sample has in the caller's batch."""

    @classmethod
    def at(cls, index: int, why: str) -> Self:
        """Sample `index` of the batch that was given, and what is wrong with it."""
        return cls(f"sample {index}: {why}")

    @property
    def index(self) -> int:
        """-1 if the text does not say it."""
        number = str(self).partition(": ")[0].removeprefix("sample ")
        return int(number) if number.isdecimal() else -1

    @property
    def why(self) -> str:
        """Without the number."""
        return str(self).partition(": ")[2]


class BatchGone(RuntimeFault):
    """A batch that stayed with the ranks that made it is not there any more: released, or the ranks were restarted.
    Make it again."""


class BatchesFull(RuntimeFault):
    """A rank keeps as many bytes of batches for others as it may. Release those that are not needed."""


class RestartBudgetExceeded(RuntimeFault):
    """A child failed more often than its supervisor allows; the failure climbs to the parent."""


class StaleIncarnation(RuntimeFault):
    """A message or memory of an earlier incarnation was refused. Look the actor up again."""


class LaunchError(RuntimeFault):
    """A node could not be started: the text holds the command, its exit and the end of its log."""

    exit: Exit | None = None
    """How its process ended, where it was started."""


class LeaseLost(RuntimeFault):
    """A lease expired or was given back, so its entries may be with someone else. Raised by the sample pool on ack and
    renew: throw away what was computed from them and lease again."""


class PoolFull(RuntimeFault):
    """The sample pool has no place for an unannounced entry. `Pool.put` raises it; the actor waits instead."""


class JournalError(RuntimeFault):
    """A journal can't be written (full disk), read (damaged) or is in use. The text says which, and what to do; what
    was in it is kept."""


class CorruptWeights(RuntimeFault):
    """Published weights don't match their checksums or their manifest. Raised by a receiver: ask for them again."""


class BadWeights(RuntimeFault):
    """A publisher refused weights: not finite, or of a dtype that can't travel. The version before stays published."""


class TransferFailed(RuntimeFault):
    """A transfer of weights ended before its end: aborted, or a carrier reported an error. The version before stays
    whole; the exchange repeats the transfer under a higher epoch."""


class CommunicatorHung(TransferFailed):
    """A call of the library that carries weights did not return, not even after an abort. The process in which it hangs
    must end, and ends itself once this is reported; its supervisor starts it again."""


class ExchangeFull(RuntimeFault):
    """There is not enough memory to publish weights. The version before stays published."""


class DirectoryInUse(RuntimeFault):
    """Another process works in this run directory; the text has its number. Wait for it, stop it, or use another."""


class SnapshotRefused(RuntimeFault):
    """The root does not keep this state of an actor: it is too large. The one before stays kept. Raised by `save`; for
    a periodic snapshot it is an event."""


class NodeLost(RuntimeFault):
    """A node on another host and its root no longer hear each other. Ends the node; the root starts it again."""


class InspectError(RuntimeFault):
    """A process could not be looked into: it ended, is stopped, or does not know the question: the text says which."""


class ZygoteGone(LaunchError):
    """The process that forks nodes ended before it answered. The launcher tries another one, then starts without."""


class LenderDied(CodecError, ActorDied):
    """An array came as a handle to memory of a node that ended before it was read. Ask again."""
