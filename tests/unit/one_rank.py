"""The job of one rank in iteration 5, with an agent that says what the test has it say."""

from __future__ import annotations

from datetime import timedelta
from typing import Any, cast

from megatron_moetion.agent.link import AgentLink
from megatron_moetion.config import Config, Cut
from megatron_moetion.events import EventLog
from megatron_moetion.faults import Injector
from megatron_moetion.inbox.log import InboxLog
from megatron_moetion.inbox.tap import Cursor, Mode
from megatron_moetion.job import Job, Notices
from megatron_moetion.progress import Progress as Page
from megatron_moetion.recovery.plan import Position, Progress
from megatron_moetion.recovery.regroup import GroupRecorder
from megatron_moetion.standing import Standing
from megatron_moetion.topology import from_pipeline_groups
from megatron_moetion.vault import LocalVault
from megatron_moetion.worker import Worker


class Leader:
    """The link to the agent: keeps what it is told, and has the agent say something."""

    def __init__(self) -> None:
        self.told: list[dict[str, Any]] = []

    def send(self, message: dict[str, Any]) -> None:
        self.told.append(message)

    def heard(self, op: str) -> list[dict[str, Any]]:
        return [message for message in self.told if message["op"] == op]


class Rank:
    """Global rank 0 of two stages of two ranks, in iteration 5."""

    def __init__(self, cut: Cut, host: Any = None, steering: Any = None, **flags: Any) -> None:
        self.leader = Leader()
        notices = Notices(timedelta(seconds=0.2), lambda calls: None)
        injector = Injector([], 0, [], lambda index, fault: None)
        self.job = Job(
            Config(cut=cut, **flags), 0, 4, cast(AgentLink, self.leader), LocalVault(0),
            GroupRecorder(), EventLog(None, "rank0"), injector, notices, Page(), replacement=False,
        )  # fmt: skip
        topology = from_pipeline_groups(0, [(0, 2), (1, 3)])
        self.cursor, log = Cursor(Mode.LIVE, replays=cut == "stage"), InboxLog(self.job.vault, 0)
        self.worker = Worker(self.job, topology, host, steering, self.cursor, log)
        self.standing = Standing(self.worker)
        self.job.hooks.append(self.standing.on_notice)
        self.at(Progress.BEFORE_COMMIT)

    def at(self, progress: Progress, committed: int = 4) -> None:
        self.standing.move(Position(5, progress, committed, 4, ended=(5, 0)))

    def hears(self, op: str, epoch: int = 1, **fields: Any) -> None:
        self.job.on_notice({"op": op, "epoch": epoch, **fields})
