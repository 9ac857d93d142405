"""A node agent whose workers are started, ended and started anew by somebody else.

As a program it is what `hosted.join` starts: it reads on standard input what to be the agent of,
prints one line when workers may connect, and lives on.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import selectors
import shutil
import signal
import socket
import sys
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

from torch.distributed import HashStore  # type: ignore[attr-defined]  # not in its stubs

from megatron_moetion import faults
from megatron_moetion.agent import launcher
from megatron_moetion.agent.coldstart import CheckpointsDiffer, NoSpillLeft, SpillDoesNotFit
from megatron_moetion.agent.environment import UsageError
from megatron_moetion.agent.fallback import Begun
from megatron_moetion.agent.items import Arrived, Item
from megatron_moetion.agent.job import Job
from megatron_moetion.agent.membership import (
    BACKLOG,
    Arrival,
    Meeting,
    Member,
    Members,
    MembershipError,
    Rendezvous,
    meet,
    taken,
)
from megatron_moetion.agent.node import Node
from megatron_moetion.agent.script import agents_config, option, placement_of
from megatron_moetion.agent.spiller import Written
from megatron_moetion.agent.surroundings import Surroundings
from megatron_moetion.agent.wire import Message, listen_tcp
from megatron_moetion.config import Config, ConfigError
from megatron_moetion.vault.placement import PlacementError
from megatron_moetion.vault.spill import Record
from megatron_moetion.vault.store import VaultStore

UNKNOWN_CODE = 1
"""Only a parent is told how a process ended."""
REFUSALS = (
    CheckpointsDiffer,
    ConfigError,
    MembershipError,
    NoSpillLeft,
    PlacementError,
    SpillDoesNotFit,
    UsageError,
)


class HostedNode(Node):
    """The agent of one node under another launcher; see `Node`.

    Args:
        place: whoever starts the workers; the agent ends with it.
        ready: called once workers may connect.
    """

    def __init__(
        self,
        job: Job,
        listener: socket.socket,
        store: VaultStore,
        record: Record | None,
        place: Surroundings,
        ready: Callable[[], None],
    ) -> None:
        super().__init__(job, listener, store, record)
        self._ready = ready
        self._starts_anew = place.starts_anew
        self._arrivals: list[Arrived] = []
        self._guests: dict[int, Arrived] = {}
        self._finished: set[int] = set()
        self._launcher = os.pidfd_open(place.launcher)
        self._selector.register(self._launcher, selectors.EVENT_READ, self._launcher_ended)

    def _begin(self) -> None:
        super()._begin()
        self._ready()

    def _welcome(self, global_rank: int, hello: Message) -> Message:
        # In the thread of the connection; the main loop knows who is still there.
        arrived = Arrived(global_rank, hello["pid"], hello["generation"], Future())
        self._post(arrived)
        return arrived.welcome.result()

    def _take(self, item: Item | Written) -> None:
        if isinstance(item, Arrived):
            self._arrivals.append(item)
        else:
            super()._take(item)
        self._let_in()

    def _pass_on(self, global_rank: int, message: Message) -> None:
        if message["op"] == "finished":
            self._finished.add(global_rank)
        super()._pass_on(global_rank, message)

    def _let_in(self) -> None:
        """Lets workers in once all of the generation before have ended and that has been reported:
        a launcher ends all of them before it starts the next, but their ends may be seen later.
        """
        present = {guest.generation for guest in self._guests.values()}
        waiting, self._arrivals = self._arrivals, []
        for arrived in waiting:
            if present - {arrived.generation} or self._draining:
                self._arrivals.append(arrived)
                continue
            try:
                pidfd = os.pidfd_open(arrived.pid)
            except ProcessLookupError:
                arrived.welcome.set_exception(ValueError("a hello of a process that has ended"))
                continue
            self._guests[arrived.global_rank] = arrived
            ended = lambda fd=pidfd, guest=arrived: self._guest_ended(fd, guest)  # noqa: E731
            self._selector.register(pidfd, selectors.EVENT_READ, ended)
            told = {"start": "hosted", "pid": arrived.pid, "epoch": self._epoch}
            self._log.emit("started", global_rank=arrived.global_rank, **told)
            arrived.welcome.set_result(super()._welcome(arrived.global_rank, {}))

    def _pid_of(self, global_rank: int) -> int:
        guest = self._guests.get(global_rank)
        return 0 if guest is None else guest.pid

    def _kill_workers(self) -> None:
        super()._kill_workers()
        for guest in tuple(self._guests.values()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(guest.pid, signal.SIGKILL)

    def _guest_ended(self, pidfd: int, guest: Arrived) -> None:
        self._selector.unregister(pidfd)
        os.close(pidfd)
        rank = guest.global_rank
        del self._guests[rank]
        self._lost(rank, UNKNOWN_CODE, guest.pid)

    def _report_exit(self, rank: int, code: int) -> None:
        if not self._starts_anew and rank not in self._finished:
            # The others would wait for a worker that never comes.
            reason = f"rank {rank} has ended, and its launcher starts no worker again"
            self._pass_on(rank, {"op": "hopeless", "reason": reason, "state_lost": True})
        super()._report_exit(rank, code)

    def _launcher_ended(self) -> None:
        self._selector.unregister(self._launcher)
        if self._finished >= set(self._own.global_ranks):
            # The leader ends the job once all nodes have said so.
            return
        self._code = UNKNOWN_CODE


def main() -> NoReturn:
    """Run the agent that a specification on standard input describes."""
    spec = json.load(sys.stdin)
    folder = Path(spec["folder"])
    code = 1
    with (folder / "alive").open("w") as alive:
        fcntl.flock(alive, fcntl.LOCK_EX)
        try:
            code = _run(spec)
        except REFUSALS as error:
            print(f"moetion: error: {error}", file=sys.stderr)
        shutil.rmtree(folder, ignore_errors=True)
        sys.stderr.flush()
        # The connection threads wait in system calls for ever; nothing is left to be cleaned up.
        os._exit(code)


def _run(spec: dict[str, Any]) -> int:
    place, script_args = Surroundings(**spec["place"]), tuple(spec["script_args"])
    config = agents_config(script_args, place.num_nodes)
    timeout = launcher.seconds_of(script_args, "--moetion-timeout", Config().timeout_seconds)
    lease = launcher.seconds_of(script_args, "--moetion-lease", Config().lease_seconds)
    meeting = _meet(place, spec["run_id"], timeout)
    job = Job(
        members=meeting.members,
        program=None,
        env={"MOETION_RUN_ID": meeting.run_id, "MOETION_AGENT": spec["name"]},
        protected=True,
        num_spares=0,
        directory=option(script_args, "--moetion-dir") or str(Config().dir),
        secret=bytes.fromhex(spec["secret"]),
        timeout=timeout,
        placement=placement_of(meeting.members, config),
        faults=faults.parse(config.fault),
        spills=launcher.spill_folder(script_args),
        script_args=script_args,
        hang_factor=config.hang_factor,
        max_retries=config.max_retries,
        budget=config.restart_budget,
        lease=lease,
    )
    store = VaultStore()
    start = launcher.cold_start(job, meeting.store, store)
    job = replace(job, begun=Begun(start.source, start.source))
    outcome = HostedNode(job, meeting.listener, store, start.record, place, _ready).run()
    # Here the launcher starts everything anew, if it is to be.
    assert isinstance(outcome, int)
    return outcome


def _meet(place: Surroundings, run_id: str, timeout: timedelta) -> Meeting:
    domain = os.environ.get("MOETION_FAILURE_DOMAIN") or socket.gethostname()
    if place.num_nodes > 1:
        host, port = place.store
        rendezvous = Rendezvous(place.num_nodes, place.node_rank, host, port, timeout, domain)
        meeting = meet(rendezvous, place.num_workers, again=not place.hosts_store)
        if isinstance(meeting, Arrival):
            raise MembershipError(taken(place.node_rank))
        return meeting
    listener = listen_tcp("127.0.0.1", BACKLOG)
    own = Member(0, "127.0.0.1", listener.getsockname()[1], place.num_workers, 0, domain)
    return Meeting(HashStore(), 0, listener, Members((own,), 0), run_id)


def _ready() -> None:
    print("ready", flush=True)
    # What is printed from here on is read by nobody.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())


if __name__ == "__main__":
    main()
