"""A runner for test_chaos.py that does what no runtime may do, so that somebody must notice."""

from dataclasses import dataclass

from _chaos_actors import Runner

from headrace.runtime import message

LOST_OF = 97
TWICE_OF = 101


@dataclass(kw_only=True)
class LossyRunner(Runner):
    """Loses some casts, runs some twice, and answers some calls with what somebody else asked."""

    @message
    async def note(self, id: int) -> None:
        if id % LOST_OF:
            self.ledger.ran(id, self.life)
        if id % TWICE_OF == 0:
            self.ledger.ran(id, self.life)

    @message
    async def take(self, id: int) -> int:
        await super().take(id)
        return id if id % LOST_OF else id + 1
