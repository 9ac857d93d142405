"""What exists before the model does: configuration, agent, vault, process groups, faults."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from math import inf
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.distributed import (  # type: ignore[attr-defined]  # not in its stubs
    PrefixStore,
    Store,
    TCPStore,
)

from megatron_moetion.agent.link import AgentLink
from megatron_moetion.agent.shelf import agent_vault
from megatron_moetion.config import Config, Cut
from megatron_moetion.events import EventLog
from megatron_moetion.faults import Fault, Injector, parse
from megatron_moetion.health import probe
from megatron_moetion.progress import Progress
from megatron_moetion.recovery.failure import Superseded
from megatron_moetion.recovery.plan import Facts, FrameInfo, Position
from megatron_moetion.recovery.regroup import GroupRecorder
from megatron_moetion.vault import LocalVault, Vault
from megatron_moetion.vault.budget import Claim, MemoryDoesNotFit, free_bytes, settle

Notice = dict[str, Any]
PHASES = 4
"""A notice may be two phases away, each of which the leader ends after the timeout; whoever gave up
before it would be lost, too.
"""


class Notices:
    """The agent's notices of the current recovery, waited for by the training thread.

    Args:
        timeout: of each phase; the leader ends a phase that takes longer.
        on_wait: told 1 when a wait begins and 0 when it ends.
    """

    def __init__(self, timeout: timedelta, on_wait: Callable[[int], None]) -> None:
        self._timeout, self._on_wait = timeout, on_wait
        self._changed = threading.Condition()
        self._epoch = 0
        self._got: dict[str, Notice] = {}

    def deliver(self, notice: Notice) -> None:
        with self._changed:
            if notice.get("epoch", self._epoch) > self._epoch:
                self._epoch, self._got = notice["epoch"], {}
            self._got[notice["op"]] = notice
            self._changed.notify_all()

    def failure(self, error: BaseException, handled: int) -> int:
        """Waits for the failure notice that explains a communication error; returns its epoch.

        Raises:
            BaseException: the error itself, when no agent reports a failure in time.
        """
        with self._changed, self._waiting():
            if not self._changed.wait_for(
                lambda: self._epoch > handled, self._timeout.total_seconds()
            ):
                raise error
            return self._epoch

    def next_failure(self) -> None:
        """Waits until a failure begins an epoch, however long that takes."""
        with self._changed, self._waiting():
            now = self._epoch
            self._changed.wait_for(lambda: self._epoch > now)

    def only_before(self, epoch: int) -> None:
        """Passes as long as no failure has begun a later epoch.

        Raises:
            Superseded: one has, perhaps before anybody was there to be told.
        """
        with self._changed:
            if self._epoch > epoch:
                raise Superseded(f"epoch {self._epoch} began")

    def wait(self, op: str, epoch: int) -> Notice:
        """Waits for one notice of an epoch.

        Raises:
            Superseded: when a later failure starts another epoch.
            TimeoutError: when the agent stays silent.
        """
        patience = PHASES * self._timeout.total_seconds()
        with self._changed, self._waiting():
            ready = self._changed.wait_for(lambda: self._epoch > epoch or op in self._got, patience)
            if self._epoch > epoch:
                raise Superseded(f"epoch {self._epoch} began")
            if not ready:
                raise TimeoutError(
                    f"moetion: no '{op}' from the agent in {patience:.0f} s ({PHASES} times "
                    "--moetion-timeout) during recovery"
                )
            return self._got[op]

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        self._on_wait(1)
        try:
            yield
        finally:
            self._on_wait(0)


def facts_of(notice: Notice) -> Facts:
    """The plan's input out of a `facts` notice."""
    frames = {
        int(rank): tuple(
            sorted((FrameInfo.from_meta(e["meta"]) for e in entries), key=lambda f: f.iteration)
        )
        for rank, entries in notice["frames"].items()
    }
    positions = {int(r): Position.from_json(p) for r, p in notice["positions"].items()}
    starts = {int(rank): frozenset(known) for rank, known in notice["starts"].items()}
    logged = {int(rank): since for rank, since in notice["logged"].items()}
    dead = tuple(notice["dead"])
    cut = next((e["meta"]["cut"] for entries in notice["frames"].values() for e in entries), "")
    told = (notice["epoch"], notice["committed"], dead, positions, frames, starts, logged)
    return Facts(*told, cut, notice["doubted"])


@dataclass
class Job:
    """This worker's part in the job, from argument parsing on.

    Attributes:
        replacement: this process takes the place of a dead worker; it sets up on torch's fake
            process group.
        progress: how far this worker is, for its agent to see.
        num_copies: of each frame, on other nodes.
        fake: torch.distributed is still the fake group.
        claimed: this rank's memory has been claimed by a predecessor.
        anew: the job goes on from a spill.
        ceiling: how long windows may become; 0 is never to change them.
    """

    config: Config
    global_rank: int
    world_size: int
    link: AgentLink | None
    vault: Vault
    groups: GroupRecorder
    events: EventLog
    injector: Injector
    notices: Notices
    progress: Progress
    replacement: bool
    num_copies: int = 0
    fake: bool = False
    claimed: bool = False
    anew: bool = False
    ceiling: int = 0
    backend: str = "nccl"
    group_timeout: timedelta = timedelta(minutes=10)
    facts: Facts | None = None
    store: Store | None = None
    hooks: list[Callable[[Notice], None]] = field(default_factory=list)

    def on_notice(self, notice: Notice) -> None:
        """Runs in the link's listener thread; must not block."""
        self.notices.deliver(notice)
        for hook in self.hooks:
            hook(notice)

    @property
    def store_port(self) -> int:
        """Where the job's store listens."""
        return int(os.environ["MASTER_PORT"])

    @property
    def spills(self) -> bool:
        """Whether windows are written to disk."""
        return self.link is not None and self.config.spill_interval > 0

    def replication_rate(self) -> float:
        """Bytes per second of this rank's frames to all their copies; infinite without any."""
        if not self.num_copies or self.link is None:
            return inf
        return float(self.link.request({"op": "measure"})["bytes_per_second"])

    def send(self, op: str, **fields: Any) -> None:
        """Tells the agent, if there is one."""
        if self.link is not None:
            self.link.send({"op": op, **fields})

    def hopeless(self, reason: str, epoch: int | None = None) -> None:
        """Nothing is left here to rebuild from: the job ends, or starts anew from a spill.

        Args:
            epoch: of the recovery in which that was found; another failure that has begun a later
                one makes a new plan instead.
        """
        self.send("hopeless", reason=reason, epoch=epoch, state_lost=True)

    def claim_memory(self, claim: Claim, lag: int) -> None:
        """Returns once the claims of all ranks of this node are known to fit.

        Args:
            lag: by how many frames copies on other nodes may be behind.

        Raises:
            MemoryDoesNotFit: without an agent; with one, the agent ends the job.
        """
        limit = self.config.memory_bytes
        if self.link is not None:
            asked = {"op": "claim", "limit": limit, "lag": lag, **claim.to_json()}
            self.ceiling = self.link.request(asked)["ceiling"]
            return
        num_local = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
        alike = dict.fromkeys(range(num_local), claim)
        grant = settle(alike, free_bytes() if limit is None else limit)
        if grant.refusal is not None:
            raise MemoryDoesNotFit(grant.refusal)
        self.ceiling = grant.ceiling
        if grant.note is not None and self.global_rank == 0:
            print(f"moetion: {grant.note}", flush=True)

    def receive_facts(self, epoch: int) -> Facts:
        self.facts = facts_of(self.notices.wait("facts", epoch))
        if self.config.cut == "auto" and self.facts.cut:
            # A replacement does what was decided before it.
            self.take_cut(self.facts.cut)
        return self.facts

    def take_cut(self, cut: str) -> None:
        """What `--moetion-cut auto` has come to."""
        assert cut in ("stage", "shard")
        self.config = replace(self.config, cut=cast(Cut, cut))

    def connect_store(self) -> None:
        """A connection to the job's store for each epoch: one that was given up is cut."""
        address = os.environ["MASTER_ADDR"]
        self.store = TCPStore(address, self.store_port, is_master=False, timeout=self.group_timeout)

    def init_world(self, epoch: int) -> None:
        """Initialises torch.distributed under a new epoch of the job's store."""
        assert self.store is not None
        dist.init_process_group(
            self.backend,
            store=PrefixStore(f"moetion/epoch/{epoch}", self.store),
            rank=self.global_rank,
            world_size=self.world_size,
            timeout=self.group_timeout,
        )


def take_on(link: AgentLink, device: torch.device, timeout: timedelta) -> None:
    """Returns if a replacement's device works; else says so to the agent, and ends this process."""
    reason = probe(device, timeout)
    if reason is not None:
        link.send({"op": "unfit", "reason": reason})
        # Nothing is to be cleaned up, and a device that does not answer would hold it up.
        os._exit(1)


def open_job(
    config: Config,
    global_rank: int,
    world_size: int,
    on_map: Callable[[torch.Tensor], None] | None = None,
    on_unmap: Callable[[torch.Tensor], None] | None = None,
    identity: Mapping[str, str] | None = None,
    device: torch.device | None = None,
) -> Job:
    """Connects to the agent of this node, or works without one.

    Without an agent (plain torchrun) there is capture and logging only.

    Args:
        on_map: called once with each new chunk of host memory, to register it as pinned memory.
        on_unmap: called with those of them that are given back.
        identity: flags and versions that a later run must share to go on from what this one spills.
        device: of this rank; a replacement ends here when it is broken.
    """
    link = AgentLink.connect()
    epoch = int(os.environ.get("MOETION_EPOCH", "0"))
    fired: list[int] = []
    claimed, anew, num_copies, ceiling = False, False, 0, 0
    progress = Progress()
    if link is not None:
        hello = {
            "op": "hello",
            "global_rank": global_rank,
            "pid": os.getpid(),
            "generation": int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")),
            "identity": dict(identity or {}),
        }
        welcome = link.request(hello)
        fired, claimed, num_copies = welcome["fired"], welcome["claimed"], welcome["copies"]
        ceiling, anew = welcome["ceiling"], welcome["anew"]
        progress = Progress(welcome["progress"])
        if "MOETION_EPOCH" not in os.environ:
            # Another launcher does not know in which epoch it starts its workers.
            epoch = welcome["epoch"]
    replacement = epoch > 0
    if replacement and link is not None and device is not None:
        take_on(link, device, config.timeout)
    vault = (
        LocalVault(global_rank, on_map, on_unmap)
        if link is None
        else agent_vault(link, global_rank, on_map, on_unmap)
    )
    events = EventLog(config.dir, f"rank{global_rank}")

    def on_fire(index: int, fault: Fault) -> None:
        events.emit("fault", fault=str(fault), iteration=fault.iteration)
        if link is not None:
            link.send({"op": "fired", "index": index})

    # Without an agent nobody will explain a lost peer: its error is raised at once.
    patience = timedelta(0) if link is None else config.timeout
    notices = Notices(patience, progress.waits)
    injector = Injector(parse(config.fault), global_rank, fired, on_fire, notices.next_failure)
    job = Job(
        config, global_rank, world_size, link, vault, GroupRecorder(), events, injector,
        notices, progress, replacement, num_copies, fake=replacement,
        claimed=claimed, anew=anew, ceiling=ceiling,
    )  # fmt: skip
    job.groups.waits.on_change = progress.waits
    if link is not None:
        link.listen(job.on_notice)
    return job
