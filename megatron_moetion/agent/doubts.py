"""What the host rejects right behind a rebuild: which tier is tried against it. Pure."""

from __future__ import annotations

from megatron_moetion.agent.escalation import Tier


class Doubts:
    """Once anything was rejected, frames are looked through in every recovery of the job; where the
    same comes again behind that, the next tier is tried.

    Args:
        before: something was, before the job started anew.
    """

    def __init__(self, before: bool = False) -> None:
        self.any = before
        self._leaving: set[int] = set()
        self._iteration = -1
        self._tier = Tier.LOCALIZED
        self._looked = False

    def told(self, global_rank: int, rejected: bool) -> None:
        """A worker is about to leave with an exception."""
        if rejected:
            self._leaving.add(global_rank)

    def rejected_by(self, global_rank: int) -> bool:
        """Whether a worker that has ended left with a rejected result; true once."""
        found = global_rank in self._leaving
        self._leaving.discard(global_rank)
        return found

    def looks_through(self) -> None:
        """A rebuild begins."""
        self._looked = self.any

    def raised(self, iteration: int) -> Tier | None:
        """A worker has ended with a rejected result in that iteration.

        Returns:
            What is to be tried; None where that is under way, as a peer has met the same.
        """
        if self.any and not self._looked:
            return None
        again = iteration <= self._iteration
        self._tier = self._tier.next if again else Tier.LOCALIZED
        self._iteration = max(iteration, self._iteration)
        self.any, self._looked = True, False
        return self._tier
