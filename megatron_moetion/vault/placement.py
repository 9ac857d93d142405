"""Which nodes hold the copies of a node's frames. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class PlacementError(ValueError):
    """The copies that were asked for would not survive the loss of one failure domain; one line."""


@dataclass(frozen=True)
class Placement:
    """Where copies are.

    Attributes:
        holders: by node rank, the nodes that hold copies 1, 2, ... of its frames; copy 0 is the
            node's own.
    """

    holders: tuple[tuple[int, ...], ...]

    @property
    def num_copies(self) -> int:
        """Of each frame, on other nodes."""
        return len(self.holders[0])

    def held_by(self, node_rank: int) -> tuple[int, ...]:
        """The nodes of whose frames a node holds a copy, ascending."""
        return tuple(n for n, holders in enumerate(self.holders) if node_rank in holders)

    def copy_number(self, owner: int, node_rank: int) -> int | None:
        """Which copy of the owner's frames a node holds: 0 its own, None if it holds none."""
        nodes = (owner, *self.holders[owner])
        return nodes.index(node_rank) if node_rank in nodes else None


def most_copies(domains: Sequence[str], share_domains: bool = False) -> int:
    """How many copies of a frame there can be on other nodes; for the arguments see `place`."""
    return len(domains if share_domains else set(domains)) - 1


def place(domains: Sequence[str], num_copies: int, share_domains: bool = False) -> Placement:
    """Spread copies over failure domains, evenly over nodes.

    Args:
        domains: by node rank, the label of its failure domain: its host, or a rack.
        num_copies: of each frame, on other nodes.
        share_domains: copies may lie in one failure domain if there are too few.

    Raises:
        PlacementError: not enough failure domains or nodes.
    """
    if num_copies > most_copies(domains, share_domains):
        raise PlacementError(_refusal(domains, num_copies))
    if num_copies > most_copies(domains):
        domains = [str(node_rank) for node_rank in range(len(domains))]
    return Placement(_spread(domains, num_copies))


def _refusal(domains: Sequence[str], num_copies: int) -> str:
    names = sorted(set(domains))
    wanted = f"--moetion-replicas {num_copies} needs {num_copies + 1}"
    if num_copies >= len(domains):
        change = f"give at most {len(domains) - 1}" if len(domains) > 1 else "drop it or add nodes"
        return f"{wanted} nodes and this job has {len(domains)}: {change}"
    return (
        f"{wanted} failure domains and the {len(domains)} nodes are in {len(names)}"
        f" ({', '.join(names[:4])}): give at most {len(names) - 1}, label the nodes with"
        " --failure-domain, or add --moetion-same-domain"
    )


def _spread(domains: Sequence[str], num_copies: int) -> tuple[tuple[int, ...], ...]:
    ring = _ring(domains)
    load = dict.fromkeys(ring, 0)
    holders: dict[int, list[int]] = {node: [] for node in ring}
    for _ in range(num_copies):
        for index, owner in enumerate(ring):
            taken = {domains[node] for node in (owner, *holders[owner])}
            # Nearest first on the ring; `min` keeps the first of equals.
            others = ring[index + 1 :] + ring[:index]
            free = [node for node in others if domains[node] not in taken]
            holder = min(free, key=load.__getitem__)
            holders[owner].append(holder)
            load[holder] += 1
    return tuple(tuple(holders[node]) for node in range(len(domains)))


def _ring(domains: Sequence[str]) -> list[int]:
    """Nodes in an order in which neighbours are in different domains for as long as possible."""
    order = list(dict.fromkeys(domains))
    seen = dict.fromkeys(order, 0)
    turns = []
    for node, domain in enumerate(domains):
        turns.append((seen[domain], order.index(domain), node))
        seen[domain] += 1
    return [node for *_, node in sorted(turns)]
