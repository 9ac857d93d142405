"""The agent's main loop: children, connections, signals, orders of the leader."""

from __future__ import annotations

import contextlib
import os
import queue
import selectors
import signal
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from multiprocessing import AuthenticationError

from megatron_moetion.agent import supervision
from megatron_moetion.agent.coldstart import mismatch, position_at, stored
from megatron_moetion.agent.desk import Desk
from megatron_moetion.agent.equipment import assemble
from megatron_moetion.agent.fallback import FallBack, Stored, best, way_on
from megatron_moetion.agent.gate import PATIENCE_OF_TIMEOUT, Gate
from megatron_moetion.agent.headway import Headway, attempt, limit, say
from megatron_moetion.agent.items import (
    Damaged,
    FromPeer,
    FromWorker,
    Item,
    PeerGone,
    PeerJoined,
    Replicated,
    WorkerSilent,
)
from megatron_moetion.agent.job import Job
from megatron_moetion.agent.leader import Leader, Unprotected
from megatron_moetion.agent.membership import Member, MembershipError
from megatron_moetion.agent.round import Round
from megatron_moetion.agent.seating import Seating
from megatron_moetion.agent.spares import COLD, Assignment, Spare, Spares
from megatron_moetion.agent.spiller import Spiller, Written
from megatron_moetion.agent.standby import LAPSED_CODE, Seat, take_seat
from megatron_moetion.agent.supervision import Child
from megatron_moetion.agent.watch import Watch
from megatron_moetion.agent.wire import Channel, Message, listen_unix
from megatron_moetion.events import EventLog
from megatron_moetion.holdings import holdings
from megatron_moetion.vault.entry import split_key
from megatron_moetion.vault.spill import Record, Span
from megatron_moetion.vault.store import VaultStore

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


class Node:
    """The agent of one node.

    Args:
        job: what to run.
        listener: for other agents.
        store: this node's vault; None begins an empty one.
        record: of the spill in the store that the job goes on from; None starts afresh.
        ahead: a spare that was started before anything was known of the job.
        seat: of one that takes the place of a lost node.
    """

    def __init__(
        self,
        job: Job,
        listener: socket.socket,
        store: VaultStore | None = None,
        record: Record | None = None,
        ahead: Spare | None = None,
        seat: Seat | None = None,
    ) -> None:
        self._job = job
        self._seat, self._late = seat, seat is not None
        self._seating: Seating | None = None
        self._spilled = None if record is None else record.span.iteration
        self._ahead = ahead
        self._record = record
        self._own = job.members.own
        self._listener = listener
        self._log = EventLog(job.directory, f"agent-{self._own.node_rank}")
        self._items: queue.SimpleQueue[Item | Written] = queue.SimpleQueue()
        self._selector = selectors.DefaultSelector()
        self._wake_end, self._woken_end = socket.socketpair()
        self._wake_end.setblocking(False)
        self._store = VaultStore() if store is None else store
        self._equipment = assemble(
            job.members,
            self._store,
            job.placement,
            job.secret,
            job.faults,
            job.fired,
            self._log,
            self._post,
            job.lease,
        )
        self._counters = self._equipment.counters
        beats = self._serve_beats if self._own.node_rank == 0 else None
        wired = (self._equipment, self._welcome, self._post, job.lease, beats)
        self._desk = Desk(job.members, *wired)
        self._identity: dict[str, str] = {}
        self._spiller = self._open_spiller()
        self._observer = Watch(
            self._own.global_ranks, self._pid_of, self._desk.notify, self._report
        )
        program = job.program
        num_spares = job.num_spares if program is not None and program.interpreter else 0
        self._spares = Spares(num_spares, self._make_spare, self._watch_spare, self._unwatch_spare)
        self._starts: dict[int, str] = {}
        self._workers: dict[int, Child] = {}
        self._children: set[Child] = set()
        self._draining: dict[int, int] = {}
        self._peers: dict[int, Channel] = {}
        self._leader: Leader | None = None
        self._epoch = 0
        self._fired: list[int] = list(job.fired)
        self._code: int | None = None
        self._fall_back: FallBack | None = None
        longest = limit(job.timeout, job.lease, self._own.node_rank)
        self._headway = Headway(longest, self._stands_still)

    def run(self) -> int | FallBack:
        """Run the job's part on this node, from the first worker to the last.

        Returns:
            The exit code, or what to begin again from once all nodes are past this.
        """
        if self._job.hang_factor:
            self._headway.start()
        self._open()
        self._catch_signals()
        supervision.adopt_orphans()
        try:
            with self._headway.turn():
                self._log.emit("began", run_id=self._job.env["MOETION_RUN_ID"], late=self._late)
                self._spares.keep()
                self._begin()
            while self._code is None:
                self._turn()
        finally:
            self._headway.stop()
            if self._seat is not None:
                self._seat.pulse.stop()
            self._equipment.replication.stop()
            # Before anything that a disk may keep waiting.
            supervision.end_all(sorted(self._children, key=lambda child: child.pid))
            supervision.end_orphans()
            self._log.emit("vault", allocated_bytes=self._store.allocated_bytes())
            durable = {str(r): i for r, i in self._equipment.replication.durable().items()}
            self._log.emit("counted", durable=durable, **self._counters.numbers())
            self._store.close()
            self._log.close()
        if self._fall_back is None:
            return self._code
        # From here on there is nobody but this process to be ended.
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        missed = self._signals()
        if missed:
            return 128 + missed[0]
        while self._leader is None and not isinstance(self._items.get(), PeerGone):
            # Until its process is another, the store there is still that of the failed run.
            pass
        rank = self._own.node_rank if self._late else None
        return replace(self._fall_back, node_rank=rank)

    def _begin(self) -> None:
        if self._late:
            # The leader says when.
            return
        if self._record is None:
            for rank in self._own.global_ranks:
                self._start(rank)
            return
        iteration = self._record.span.iteration
        self._desk.place({rank: position_at(iteration) for rank in self._own.global_ranks})
        if self._leader is not None:
            self._report({"op": "restored", "iteration": iteration})

    def _open_spiller(self) -> Spiller | None:
        if self._job.spills is None:
            return None
        started_from = None if self._record is None else self._record.name
        run_id = self._job.env["MOETION_RUN_ID"]
        where = (self._job.spills, self._job.members, self._store)
        return Spiller(*where, run_id, started_from, self._post)

    def _admit(self, listener: socket.socket) -> None:
        patience = self._job.timeout / PATIENCE_OF_TIMEOUT
        secret, serve = self._job.secret, self._desk.serve
        Gate(listener, secret, serve, patience, self._counters, self._log).open()

    def _open(self) -> None:
        self._admit(listen_unix(self._job.env["MOETION_AGENT"], len(self._own.global_ranks)))
        if self._own.node_rank == 0:
            members = self._job.members
            decider = (
                Round(
                    members.ranks_of_node,
                    fired=self._job.fired,
                    max_retries=self._job.max_retries,
                    budget=self._job.budget,
                    tried=self._job.tried,
                    distrusted=self._job.distrusted,
                    replaces_nodes=self._job.replaces_nodes,
                )
                if self._job.protected
                else Unprotected(members.world_size)
            )
            tools = (members, decider, self._order, self._log, self._job.timeout)
            self._leader = Leader(
                *tools,
                self._job.begun,
                self._stored if self._job.protected else Stored,
                can_begin_again=self._job.program is not None,
                hang_factor=self._job.hang_factor,
            )
            self._open_seating(self._leader)
            self._admit(self._listener)
            self._await_peers()
        else:
            self._admit(self._listener)
            seat = self._connect_leader() if self._seat is None else self._seat
            self._seat, self._peers[0] = seat, seat.channel
            seat.pulse.on_lapse(self._lapsed)
            threading.Thread(target=self._desk.follow, args=[seat.channel], daemon=True).start()
        self._equipment.replication.start()

    def _open_seating(self, leader: Leader) -> None:
        job = self._job
        who = (job.members, self._peers, leader, self._order, self._post, self._log)
        self._seating = Seating(*who, job.lease, job.timeout, job.replaces_nodes)
        self._seating.leases.start()
        if len(job.members.nodes) > 1:
            seconds = job.lease.total_seconds()
            line = f"a node that is silent for {seconds:g} s counts as lost (--moetion-lease)"
            if job.hang_factor:
                longest = limit(job.timeout, job.lease, node_rank=1).total_seconds()
                line += f", and one whose agent stands still for {longest:g} s (--moetion-timeout)"
            print(f"moetion-run: {line}", file=sys.stderr)

    def _serve_beats(self, channel: Channel, agent: str) -> None:
        assert self._seating is not None
        self._seating.leases.serve(channel, agent)

    def _connect_leader(self) -> Seat:
        first = {"op": "control", "node_rank": self._own.node_rank}
        leader, job = self._job.members.nodes[0], self._job
        return take_seat(leader, job.secret, job.lease, first, self._lapsed)

    def _lapsed(self, stopped_for: float | None) -> None:
        """The lease is over: this place may be another agent's. In any thread, before anything
        else.
        """
        assert self._seat is not None
        self._kill_workers()
        self._equipment.replication.stop()
        lease = f"{self._seat.pulse.lease.total_seconds():g} s (--moetion-lease)"
        if stopped_for is None:
            line = f"nothing was heard of node 0, the leader, for {lease}: {self._without_leader}"
        else:
            line = (
                f"this agent was stopped for {stopped_for:.1f} s, longer than its lease of {lease}:"
                " another node may have its place, and this one ends"
            )
        say(f"moetion-run: node {self._own.node_rank}: {line}", supervision.GRACE)
        attempt(lambda: self._log.emit("lapsed", stopped_for=stopped_for), supervision.GRACE)
        os._exit(LAPSED_CODE)

    def _stands_still(self, where: str) -> None:
        """The main loop makes no headway, and nobody looks after this node. In another thread."""
        try:
            self._kill_workers()
            # What is on disk is not looked up: that may be what the loop waits for.
            hint = way_on(best(self._spilled, None), self._job.protected)
            lost = f"; tried: no tier, as node 0 hosts the job's store{hint}"
            seconds = self._headway.limit.total_seconds()
            line = (
                f"moetion-run: node {self._own.node_rank}: this agent has stood still for"
                f" {seconds:g} s (see --moetion-timeout) in {where}: this node ends"
            )
            say(line if self._own.node_rank else f"{line}{lost}", supervision.GRACE)
        finally:
            os._exit(LAPSED_CODE)

    def _kill_workers(self) -> None:
        """All that this agent has started, at once; in any thread."""
        supervision.kill_now(tuple(self._children))

    @property
    def _without_leader(self) -> str:
        if not self._job.protected:
            return "this node ends"
        hint = way_on(best(self._spilled, self._stored().checkpoint), protected=True)
        return f"this node ends; tried: no tier, as node 0 hosts the job's store{hint}"

    def _stored(self) -> Stored:
        return stored(self._job.spills, self._own.node_rank, self._job.script_args)

    def _await_peers(self) -> None:
        """Every agent is connected before anything can fail."""
        others = {node.node_rank for node in self._job.members.nodes} - {0}
        while others - self._peers.keys():
            try:
                self._take(self._items.get(timeout=self._job.timeout.total_seconds()))
            except queue.Empty:
                missing = sorted(others - self._peers.keys())
                raise MembershipError(f"the agents of nodes {missing} did not connect") from None

    def _turn(self) -> None:
        """Wait for something, then handle all of it."""
        left = [self._observer.seconds_left()]
        if self._leader is not None:
            left.append(self._leader.seconds_left())
        ready = self._selector.select(min((s for s in left if s is not None), default=None))
        # A backlog takes as long as it takes: each thing is a turn of its own.
        for key, _ in ready:
            self._handle(key.data)
        while self._code is None and not self._items.empty():
            self._handle(partial(self._take, self._items.get()))
        self._handle(self._tick)

    def _handle(self, what: Callable[[], None]) -> None:
        with self._headway.turn():
            if self._seat is not None:
                self._seat.pulse.check()
            what()

    def _tick(self) -> None:
        if self._code is None:
            self._observer.tick()
        if self._leader is not None and self._code is None:
            self._leader.tick()
        supervision.reap_orphans(self._is_child)

    def _is_child(self, pid: int) -> bool:
        # A worker that has ended may not even have been heard of.
        for spare in self._spares.all:
            self._hear_spare(spare)
        return any(child.pid == pid for child in self._children)

    def _post(self, item: Item | Written) -> None:
        self._items.put(item)
        # A full socket has enough in it to wake the loop.
        with contextlib.suppress(BlockingIOError):
            self._wake_end.send(b"\0")

    def _catch_signals(self) -> None:
        # The handler does nothing: the number arrives in the socket and ends the wait.
        for number in SIGNALS:
            signal.signal(number, lambda *_: None)
        signal.set_wakeup_fd(self._wake_end.fileno(), warn_on_full_buffer=False)
        self._selector.register(self._woken_end, selectors.EVENT_READ, self._woken)

    def _signals(self) -> list[int]:
        """Numbers of signals that have come since it was asked last."""
        try:
            return [n for n in self._woken_end.recv(4096, socket.MSG_DONTWAIT) if n in SIGNALS]
        except BlockingIOError:
            return []

    def _woken(self) -> None:
        numbers = self._signals()
        if numbers and self._code is None:
            self._report({"op": "signalled", "number": numbers[0]})
            if self._leader is None:
                self._code = 128 + numbers[0]

    def _welcome(self, global_rank: int, hello: Message) -> Message:
        return {
            "op": "welcome",
            "epoch": self._epoch,
            "node_rank": self._own.node_rank,
            "agents": [list(ranks) for ranks in self._job.members.ranks_of_node],
            "fired": self._fired,
            "copies": self._job.placement.num_copies,
            "anew": self._record is not None,
            "progress": self._observer.page_for(global_rank),
        }

    def _take(self, item: Item | Written) -> None:
        match item:
            case FromWorker():
                if item.message["op"] == "hello":
                    self._meet(item.global_rank, item.message.get("identity", {}))
                elif item.message["op"] == "pong":
                    self._observer.pong(item.global_rank, item.message["number"])
                else:
                    if item.message["op"] == "steady":
                        # What the first workers have used up; before that they need the machine.
                        self._spares.keep()
                    self._pass_on(item.global_rank, item.message)
            case Written():
                told = {"span": asdict(item.span), "error": item.error}
                self._log.emit("written", nbytes=item.nbytes, seconds=item.seconds, **told)
                self._report({"op": "spilled", **told})
            case WorkerSilent():
                code = self._draining.pop(item.global_rank, None)
                if code is not None:
                    self._report_exit(item.global_rank, code)
            case Damaged():
                self._report_damage(item)
            case Replicated():
                timing = {"nbytes": item.nbytes, "seconds": item.seconds}
                self._desk.notify(item.global_rank, {"op": "replicated", **timing})
            case PeerJoined() if self._seating is not None:
                self._seating.joined(item)
            case FromPeer():
                self._hear(item)
            case PeerGone() if self._seating is not None:
                self._seating.gone(item)
            case PeerGone() if self._peers.get(0) is item.channel:
                line = f"the leader, node 0, is gone ({item.why}): {self._without_leader}"
                print(f"moetion-run: node {self._own.node_rank}: {line}", file=sys.stderr)
                self._code = 1

    def _hear(self, item: FromPeer) -> None:
        if self._leader is None or self._seating is None:
            self._obey(item.message)
            return
        node_rank = self._seating.place_of(item.channel)
        if node_rank is None:
            self._counters.add("messages of agents that had lost their place")
        else:
            self._leader.take(node_rank, item.message)

    def _moved(self, nodes: list[Message]) -> None:
        """Agents that have taken the place of lost ones, and where they listen."""
        for member in [Member(**node) for node in nodes]:
            if member.node_rank == self._own.node_rank:
                continue
            self._equipment.peers.moved(member)
            # It may be slow to answer, or silent.
            threading.Thread(target=self._copy_to, args=[member], daemon=True).start()

    def _copy_to(self, member: Member) -> None:
        try:
            self._equipment.replication.moved(member)
        except (OSError, EOFError, AuthenticationError) as error:
            # It is gone again, and that is about to be seen.
            self._log.emit("not-moved", node_rank=member.node_rank, why=str(error))

    def _pass_on(self, global_rank: int, message: Message) -> None:
        self._report({"op": "said", "global_rank": global_rank, "message": message})

    def _meet(self, global_rank: int, identity: dict[str, str]) -> None:
        self._identity = identity
        if self._leader is not None:
            self._leader.met()
        reason = None if self._record is None else mismatch(self._record, identity)
        if reason is not None:
            self._pass_on(global_rank, {"op": "hopeless", "reason": reason, "refused": True})

    def _report(self, message: Message) -> None:
        """Tell the leader, which may be this process."""
        if self._leader is not None:
            self._leader.take(self._own.node_rank, message)
        else:
            self._send(0, message)

    def _order(self, node_rank: int, order: Message) -> None:
        if node_rank == self._own.node_rank:
            self._obey(order)
        else:
            self._send(node_rank, order)

    def _send(self, node_rank: int, message: Message) -> None:
        channel = self._peers.get(node_rank)
        if channel is None:
            # It is lost, and nothing that it misses counts any more.
            return
        try:
            channel.send(message)
        except OSError as error:
            # Not handled here, in the middle of something: it arrives as an item like any other.
            self._post(PeerGone(str(error), channel))

    def _obey(self, order: Message) -> None:
        match order["op"]:
            case "notify":
                self._notify(order["global_ranks"], order["message"])
            case "replace":
                self._epoch, self._fired = order["epoch"], order["fired"]
                self._start(order["global_rank"])
            case "refused":
                print(f"moetion-run: error: {order['reason']}", file=sys.stderr)
                self._code = 1
            case "evict" if self._seating is not None:
                self._seating.evict(order["node_rank"], order["why"])
            case "evicted":
                self._equipment.evicted(order["node_rank"], order["tenure"])
            case "moved":
                self._moved(order["nodes"])
            case "spill" if self._spiller is not None:
                self._spiller.write(Span(**order["span"]), self._identity)
            case "settle" if self._spiller is not None:
                if order["valid"]:
                    self._spilled = order["span"]["iteration"]
                self._spiller.settle(Span(**order["span"]), order["valid"])
            case "release":
                self._release(Span(**order["span"]))
            case "gather":
                self._gather(order["epoch"])
            case "look":
                self._observer.look(order["number"], order["ping_seconds"])
            case "kill":
                self._kill(order["global_rank"])
            case "end":
                if order["fall_back"]:
                    self._fall_back = FallBack.from_json(order["fall_back"])
                if self._seating is not None:
                    self._seating.dismiss(order)
                self._code = order["code"]

    def _notify(self, global_ranks: list[int], message: Message) -> None:
        self._epoch = max(self._epoch, message["epoch"])
        for rank in global_ranks:
            self._desk.notify(rank, message)
        if message["op"] == "resume":
            self._spares.keep()
            self._log.emit("holds", epoch=message["epoch"], **holdings())

    def _report_damage(self, item: Damaged) -> None:
        where = {"global_rank": item.global_rank, "key": item.key, "copy": item.copy}
        self._log.emit("quarantined", **where, reason=item.reason)
        iteration = split_key(item.key)[1]
        print(
            f"moetion-run: node {self._own.node_rank}: copy {item.copy} of vault entry {item.key}"
            f" (rank {item.global_rank}, iteration {iteration}) is damaged and not used any more:"
            f" {item.reason}",
            file=sys.stderr,
        )

    def _release(self, span: Span) -> None:
        for rank in self._own.global_ranks:
            self._store.unpin(rank, span.iterations)
            self._desk.notify(rank, {"op": "release", "span": asdict(span)})

    def _gather(self, epoch: int) -> None:
        ranks = self._own.global_ranks
        positions = {str(rank): self._desk.position(rank) for rank in ranks}
        below = {str(rank): self._store.below(rank) for rank in ranks}
        frames = {str(rank): self._desk.listings(rank, "frame/") for rank in ranks}
        held = self._store.copied_ranks()
        copies = {str(rank): self._desk.listings(rank, "frame/") for rank in held}
        starts = {str(rank): self._headers(rank) for rank in held}
        told = {"frames": frames, "positions": positions, "below": below, "copies": copies}
        self._report({"op": "gathered", "epoch": epoch, "starts": starts, **told})

    def _headers(self, global_rank: int) -> list[Message]:
        listed = self._desk.listings(global_rank, "header/")
        # Which there are, not all that is in them.
        return [
            {"key": entry["key"], "meta": {"epoch": entry["meta"].get("epoch", 0)}}
            for entry in listed
        ]

    def _make_spare(self) -> Spare:
        program = self._job.program
        assert program is not None
        ahead, self._ahead = self._ahead, None
        return ahead or Spare(program.interpreter, self._job.env)

    def _watch_spare(self, spare: Spare) -> None:
        self._selector.register(spare.socket, selectors.EVENT_READ, lambda: self._hear_spare(spare))
        self._watch(spare.child)

    def _unwatch_spare(self, spare: Spare) -> None:
        self._selector.unregister(spare.socket)

    def _start(self, global_rank: int) -> None:
        """Start a worker: by the spare, which may still be importing, or cold."""
        # A spare that was started ahead lacks all of it.
        program = self._job.program
        if program is None:
            return
        env = {**self._job.env, **self._job.rank_env(global_rank, self._epoch)}
        argv = (program.script, *program.args)
        assignment = Assignment(global_rank, program.module, argv, env)
        self._starts[global_rank] = self._spares.assign(assignment)
        if self._starts[global_rank] == COLD:
            self._start_cold(global_rank)

    def _start_cold(self, global_rank: int) -> None:
        assert self._job.program is not None
        env = {**self._job.env, **self._job.rank_env(global_rank, self._epoch)}
        self._starts[global_rank] = COLD
        child = supervision.start(f"rank {global_rank}", self._job.program.command, env)
        self._watch(child)
        self._started(global_rank, child)

    def _started(self, global_rank: int, child: Child) -> None:
        self._workers[global_rank] = child
        told = {"start": self._starts.pop(global_rank), "pid": child.pid, "epoch": self._epoch}
        self._log.emit("started", global_rank=global_rank, **told)

    def _hear_spare(self, spare: Spare) -> None:
        heard = self._spares.hear(spare)
        if heard.ready:
            self._log.emit("spare", pid=spare.child.pid, obstacle=spare.obstacle)
        for rank, child in heard.born.items():
            if child is not spare.child:
                self._watch(child)
            self._started(rank, child)
        for rank in heard.cold:
            self._start_cold(rank)

    def _watch(self, child: Child) -> None:
        self._children.add(child)
        self._selector.register(child.pidfd, selectors.EVENT_READ, lambda: self._ended(child))

    def _ended(self, child: Child) -> None:
        spare = self._spares.of(child)
        if spare is not None:
            self._hear_spare(spare)
            # A worker that it has forked just now may hold its end of the socket, too.
            for rank in self._spares.let_go(spare) if self._spares.of(child) else []:
                self._start_cold(rank)
        self._selector.unregister(child.pidfd)
        self._children.discard(child)
        code = supervision.reap(child)
        ranks = [rank for rank, worker in self._workers.items() if worker is child]
        if not ranks:
            print(f"moetion-run: the {child.label} ended with code {code}", file=sys.stderr)
            return
        self._lost(ranks[0], code, child.pid)

    def _pid_of(self, global_rank: int) -> int:
        worker = self._workers.get(global_rank)
        return 0 if worker is None else worker.pid

    def _kill(self, global_rank: int) -> None:
        """A worker hangs; its end is then seen like any other."""
        pid = self._pid_of(global_rank)
        if pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        elif (spare := self._spares.starting(global_rank)) is not None:
            # It was to start the worker, and has not; its end has the worker started cold.
            spare.child.kill(signal.SIGKILL)

    def _lost(self, rank: int, code: int, pid: int) -> None:
        """A worker has ended."""
        self._workers.pop(rank, None)
        self._observer.forget(rank)
        self._log.emit("exited", global_rank=rank, code=code, epoch=self._epoch, pid=pid)
        self._draining[rank] = code
        if not self._desk.hush(rank):
            # What it sent may still be in the queue, and comes first.
            self._post(WorkerSilent(rank))

    def _report_exit(self, rank: int, code: int) -> None:
        # From here on nobody writes to its chunks any more.
        self._store.orphan(rank)
        position = self._desk.position(rank)
        self._report({"op": "exited", "global_rank": rank, "code": code, "position": position})
