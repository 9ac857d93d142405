"""Which stages have to be rebuilt from the same iteration on, as one is fed by the other. Pure.

What crosses a stage edge is in the log of its sender. Where that is lost with its node, the stage
of the sender makes it again in its own replay, and the receiver waits for it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping


class Unfed(Exception):
    """A stage cannot be rebuilt, as nobody has what a neighbour sent it, or can make it again."""

    def __init__(self, pp_rank: int, sender: int) -> None:
        super().__init__(f"stage {pp_rank} lacks what stage {sender} sent it")
        self.pp_rank, self.sender = pp_rank, sender


def newest_bases(
    candidates: Mapping[int, Collection[int]], edges: Mapping[tuple[int, int], int | None]
) -> dict[int, int]:
    """The newest base of each stage with which every one of them gets all that it is fed with.

    A stage is fed from a neighbour's log if that reaches back to its base, else by a replay of the
    neighbour, which must begin no later. Taking an older base never helps a stage itself, only
    those that it feeds; so the newest ones are found by going back only where that is needed.

    Args:
        candidates: bases by stage, of all that are rebuilt; each has one.
        edges: {(stage, neighbour): the oldest iteration of which the neighbour's log has what it
            sent}; None where there is no such log.

    Raises:
        Unfed: there are no such bases.
    """
    bases = {stage: max(each) for stage, each in candidates.items()}
    settled = False
    while not settled:
        settled = True
        for (stage, sender), since in sorted(edges.items(), key=lambda edge: edge[0]):
            base = bases[stage]
            if since is not None and since <= base + 1:
                continue
            if bases.get(sender, base + 1) <= base:
                continue
            older = [other for other in candidates.get(sender, ()) if other <= base]
            if not older:
                raise Unfed(stage, sender)
            bases[sender], settled = max(older), False
    return bases
