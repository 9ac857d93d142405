"""What the parts of one worker's session share."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_moetion.host import Host
from megatron_moetion.inbox.log import InboxLog
from megatron_moetion.inbox.tap import Cursor
from megatron_moetion.job import Job
from megatron_moetion.steering import Steering
from megatron_moetion.topology import Topology


@dataclass(frozen=True)
class Worker:
    """One worker, from its first training step on; none of these is ever replaced by another."""

    job: Job
    topology: Topology
    host: Host
    steering: Steering
    cursor: Cursor
    log: InboxLog

    @classmethod
    def of(cls, job: Job, topology: Topology, host: Host, steering: Steering) -> Worker:
        """A worker that stands before its first training step."""
        cursor = Cursor(replays=job.config.cut != "shard")
        log = InboxLog(job.vault, job.global_rank, host.device)
        return cls(job, topology, host, steering, cursor, log)

    @property
    def by_shard(self) -> bool:
        """Whether state is rebuilt under the shard cut; else under the stage cut."""
        return not self.cursor.replays
