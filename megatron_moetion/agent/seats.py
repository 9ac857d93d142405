"""Who has which place in the job, and who stands by for one: the leader's book, without any doing.

A place is a node rank with its global ranks. Each agent that gets it has a *tenure* of its own, one
more than the agent before, so that what an earlier one still sends is told from what counts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from megatron_moetion.agent.membership import ANY_PLACE, Member, taken


@dataclass(frozen=True)
class Applicant:
    """An agent without a place.

    Attributes:
        agent: its name.
        member: where it listens, how many workers it would run, and which place it wants.
    """

    agent: str
    member: Member


@dataclass(frozen=True)
class Seated:
    """An agent has got a place."""

    agent: str
    member: Member


@dataclass(frozen=True)
class Parked:
    """An agent stands by; `ahead` others were there before."""

    ahead: int


@dataclass(frozen=True)
class Turned:
    """An agent is turned away."""

    reason: str


Answer = Seated | Parked | Turned


class Seats:
    """The book.

    Args:
        nodes: the members that the job began with.
    """

    def __init__(self, nodes: Iterable[Member]) -> None:
        self._members = {node.node_rank: node for node in nodes}
        self._vacant: set[int] = set()
        self._waiting: list[Applicant] = []

    @property
    def members(self) -> list[Member]:
        """Whoever has or had each place last, by node rank."""
        return [self._members[node_rank] for node_rank in sorted(self._members)]

    @property
    def waiting(self) -> int:
        """How many stand by."""
        return len(self._waiting)

    def vacate(self, node_rank: int) -> int:
        """An agent is lost; returns the tenure of whoever gets its place."""
        self._vacant.add(node_rank)
        return self._members[node_rank].tenure + 1

    def apply(self, applicant: Applicant) -> Answer:
        """An agent asks for a place: one that is vacant, or one that will be."""
        wanted, num_workers = applicant.member.node_rank, applicant.member.num_workers
        if wanted == ANY_PLACE:
            if all(member.num_workers != num_workers for member in self._members.values()):
                return Turned(f"no node of the job has {num_workers} workers: --nproc-per-node")
        elif wanted not in self._vacant:
            return Turned(taken(wanted))
        elif self._members[wanted].num_workers != num_workers:
            return Turned(
                f"node {wanted} of the job has {self._members[wanted].num_workers} workers: give as"
                " many to the one that takes its place"
            )
        for node_rank in sorted(self._vacant):
            if self._fits(applicant, node_rank):
                return self._seat(applicant, node_rank)
        self._waiting.append(applicant)
        return Parked(len(self._waiting) - 1)

    def fill(self, node_rank: int) -> Seated | None:
        """Give a vacant place to whoever has waited longest of those that it is for, if any."""
        for applicant in self._waiting:
            if self._fits(applicant, node_rank):
                self._waiting.remove(applicant)
                return self._seat(applicant, node_rank)
        return None

    def leave(self, agent: str) -> None:
        """An agent that stood by is gone; no-op for any other."""
        self._waiting = [other for other in self._waiting if other.agent != agent]

    def _fits(self, applicant: Applicant, node_rank: int) -> bool:
        wanted = applicant.member.node_rank
        alike = applicant.member.num_workers == self._members[node_rank].num_workers
        return node_rank in self._vacant and alike and wanted in (node_rank, ANY_PLACE)

    def _seat(self, applicant: Applicant, node_rank: int) -> Seated:
        before = self._members[node_rank]
        # Copies stay where they are placed, so the label stays, too.
        host, port = applicant.member.host, applicant.member.port
        member = replace(before, host=host, port=port, tenure=before.tenure + 1)
        self._members[node_rank] = member
        self._vacant.discard(node_rank)
        return Seated(applicant.agent, member)
