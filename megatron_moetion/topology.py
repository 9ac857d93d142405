"""Who is where: the coordinates of every global rank, as one frozen value.

A *stage* is all ranks with the same pipeline rank (design section 1). The topology is the same on
every rank and never changes during a job: a replacement takes the dead worker's global rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Topology:
    """Pipeline coordinates of all ranks.

    Attributes:
        global_rank: this worker's rank in the job.
        pp_ranks: pp_rank of each global rank, indexed by global rank.
        prev_ranks: for each global rank, the global rank that sends it activations (cyclic over the
            stages).
        next_ranks: for each global rank, the global rank that sends it gradients (cyclic over the
            stages).
        wraps: the last stage sends activations to the first one, too, as stages are interleaved.
    """

    global_rank: int
    pp_ranks: tuple[int, ...]
    prev_ranks: tuple[int, ...]
    next_ranks: tuple[int, ...]
    wraps: bool = False

    @property
    def world_size(self) -> int:
        return len(self.pp_ranks)

    @property
    def num_stages(self) -> int:
        return max(self.pp_ranks) + 1

    @property
    def pp_rank(self) -> int:
        return self.pp_ranks[self.global_rank]

    def stage(self, pp_rank: int) -> tuple[int, ...]:
        """Global ranks of one stage, ascending."""
        return tuple(r for r, p in enumerate(self.pp_ranks) if p == pp_rank)

    def senders(self, pp_rank: int) -> list[int]:
        """Global ranks of other stages that send something to a rank of a stage."""
        before = pp_rank > 0 or self.wraps
        after = pp_rank < self.num_stages - 1 or self.wraps
        ranks = self.stage(pp_rank)
        near = [self.prev_ranks[r] for r in ranks if before]
        near += [self.next_ranks[r] for r in ranks if after]
        return sorted({r for r in near if self.pp_ranks[r] != pp_rank})

    def stages_of(self, global_ranks: Iterable[int]) -> frozenset[int]:
        """The stages that these ranks belong to."""
        return frozenset(self.pp_ranks[r] for r in global_ranks)

    def spans_stages(self, global_ranks: Sequence[int]) -> bool:
        """Whether a group with these members crosses a stage edge."""
        return len(self.stages_of(global_ranks)) > 1


def from_pipeline_groups(
    global_rank: int, pipelines: Sequence[Sequence[int]], wraps: bool = False
) -> Topology:
    """Builds the topology from the pipeline groups of the whole job.

    Args:
        global_rank: this worker's rank.
        pipelines: every pipeline group, each listing its global ranks from the first stage to the
            last.
        wraps: see `Topology`.

    Raises:
        ValueError: when the groups do not cover each rank exactly once.
    """
    world_size = sum(len(pipeline) for pipeline in pipelines)
    members = sorted(rank for pipeline in pipelines for rank in pipeline)
    if members != list(range(world_size)):
        raise ValueError(
            f"pipeline groups do not cover ranks 0..{world_size - 1} once: {pipelines}"
        )
    pp_ranks, prev_ranks, next_ranks = ([0] * world_size for _ in range(3))
    for pipeline in pipelines:
        for index, rank in enumerate(pipeline):
            pp_ranks[rank] = index
            prev_ranks[rank] = pipeline[index - 1]
            next_ranks[rank] = pipeline[(index + 1) % len(pipeline)]
    return Topology(global_rank, tuple(pp_ranks), tuple(prev_ranks), tuple(next_ranks), wraps)
