"""What a rank asks its node's memory for, under whatever schedule it may come to."""

from __future__ import annotations

from megatron_moetion.host import Host
from megatron_moetion.schedule import Schedule, generate
from megatron_moetion.steering import Steering
from megatron_moetion.vault.budget import (
    OTHER_WINDOWS,
    Claim,
    Inbox,
    Need,
    need_of,
    need_of_change,
)


def logs_of(host: Host, steering: Steering, by_shard: bool, world_size: int) -> Inbox:
    """What this rank logs in one iteration, at most."""
    logs = {**host.inbox(), "steering": (2, steering.log_bytes(world_size))}
    if by_shard:
        del logs["boundary"]
    return logs


def claim_of(host: Host, steering: Steering, logs: Inbox, spills: bool) -> Claim:
    """The claim of a rank whose operators are `host.operators`.

    Args:
        logs: see `logs_of`.
        spills: windows are written to disk.
    """
    timeline, options = steering.timeline, steering.options

    def need(schedule: Schedule) -> Need:
        return need_of(
            schedule, host.operators, steering.buffer_bytes, logs, spills,
            timeline.kept(schedule) - schedule.frames_kept,
        )  # fmt: skip

    # More than one after a start from a spill that another window left.
    present = [need(schedule) for schedule in timeline.schedules]
    now, units = timeline.newest, steering.units
    others = {w: need(generate(units, w, now.policy)).total for w in OTHER_WINDOWS}
    ceilings = {
        w: need_of_change([*present, *map(need, options.schedules(units, w))])
        for w in options.ceilings
    }
    return Claim(need_of_change(present) if len(present) > 1 else present[0], others, ceilings)
