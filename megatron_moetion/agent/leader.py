"""The edge of the round on node 0: events in from all nodes, orders out to them."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import timedelta
from typing import Any, Protocol

from megatron_moetion.agent.alarms import Alarms
from megatron_moetion.agent.decision import (
    AgentJoined,
    AgentLost,
    Command,
    End,
    Event,
    Evict,
    Exited,
    Expel,
    Expired,
    Gather,
    Gathered,
    Notify,
    Record,
    Replace,
    Restored,
    Said,
)
from megatron_moetion.agent.escalation import NOTHING_TRIED
from megatron_moetion.agent.fallback import (
    BEGUN_AFRESH,
    Begun,
    FallBack,
    Limit,
    Source,
    Stored,
    best,
    next_source,
    way_on,
)
from megatron_moetion.agent.hangs import Observation
from megatron_moetion.agent.membership import Members
from megatron_moetion.agent.spilling import Order, Release, Report, Settle, Spill, Spilling
from megatron_moetion.agent.vigil import Alarm, Inquired, Look, Outcome, Stubborn, Vigil
from megatron_moetion.agent.wire import Message
from megatron_moetion.events import EventLog
from megatron_moetion.recovery.phase import FINAL, Phase
from megatron_moetion.vault.spill import Span


class Decider(Protocol):
    """What turns events into commands: `Round`, or `Unprotected` without --moetion."""

    epoch: int

    @property
    def phase(self) -> Phase:
        """Where the job is."""

    def feed(self, event: Event) -> list[Command]:
        """Take one event and return what to do, in order."""

    def missing(self) -> list[int]:
        """Whom the phase still waits for."""


class Unprotected:
    """Without --moetion: the first failure ends the job, as torchrun does without restarts."""

    def __init__(self, world_size: int) -> None:
        self.epoch = 0
        self._left = world_size

    @property
    def phase(self) -> Phase:
        """There is only training."""
        return Phase.TRAINING

    def feed(self, event: Event) -> list[Command]:
        """Take one event and return what to do."""
        match event:
            case Exited(code=0):
                self._left -= 1
                return [] if self._left else [End("", 0)]
            case Exited():
                return [End(f"rank {event.global_rank} ended with code {event.code}", event.code)]
            case AgentLost():
                return [End(f"the agent of node {event.node_rank} is gone ({event.why})", 1)]
            case _:
                return []

    def missing(self) -> list[int]:
        """Nobody is waited for."""
        return []


class Leader:
    """Feeds the round and routes its commands.

    Args:
        members: all nodes.
        decider: the pure part.
        send: gives an order to the agent of a node.
        log: for the timeline.
        timeout: for each phase of a recovery.
        begun: what the job starts from.
        stored: what this node finds on disk by now.
        can_begin_again: the agents start the workers, and may start anew themselves.
        hang_factor: of --moetion-hang-factor; 0 detects no hang.
    """

    def __init__(
        self,
        members: Members,
        decider: Decider,
        send: Callable[[int, Message], None],
        log: EventLog,
        timeout: timedelta,
        begun: Begun = BEGUN_AFRESH,
        stored: Callable[[], Stored] = Stored,
        can_begin_again: bool = True,
        hang_factor: float = 0.0,
    ) -> None:
        self._members = members
        self._decider = decider
        self._send = send
        self._log = log
        self._timeout = timeout
        ranks = [rank for node in members.nodes for rank in node.global_ranks]
        self._begun, self._stored = begun, stored
        self._cold = begun.last.is_spill
        spilled = begun.last.iteration if begun.last.is_spill else 0
        self._spilling = Spilling(ranks, len(members.nodes), spilled)
        self._can_begin_again = can_begin_again
        self._alarms = Alarms(
            Vigil(ranks, len(members.nodes), hang_factor, timeout, time.monotonic()), log, timeout
        )
        self._inbox: deque[tuple[int, Message]] = deque()
        self._detected: float | None = None
        self._deadline: float | None = None
        self._over = False

    @property
    def over(self) -> bool:
        """Whether the job is ending."""
        return self._over

    @property
    def spilled(self) -> int | None:
        """Iteration of the newest spill that is valid on every node."""
        return self._spilling.valid

    def take(self, node_rank: int, message: Message) -> None:
        """An agent reports something.

        What this node's own agent reports while an order is being carried out waits its turn.
        """
        self._inbox.append((node_rank, message))
        if len(self._inbox) > 1:
            return
        while self._inbox:
            self._handle(*self._inbox[0])
            self._inbox.popleft()

    def _handle(self, node_rank: int, message: Message) -> None:
        match message["op"]:
            case "exited":
                self._detected = self._detected or time.monotonic()
                told = message["global_rank"], message["code"], message["position"]
                event: Event = Exited(*told, time.monotonic())
            case "said" if message["message"]["op"] == "window":
                span, kept = Span(**message["message"]["span"]), message["message"]["kept"]
                self._spill(self._spilling.offered(message["global_rank"], span, kept))
                return
            case "said" if message["message"]["op"] == "steady":
                self._watch(self._alarms.vigil.steady(message["global_rank"], time.monotonic()))
                return
            case "looked":
                seen = [Observation(**each) for each in message["seen"]]
                look = (node_rank, message["number"], seen, time.monotonic())
                self._watch(self._alarms.vigil.looked(*look))
                return
            case "spilled":
                span = Span(**message["span"])
                self._spill(self._spilling.written(node_rank, span, message["error"]))
                return
            case "restored":
                self._detected = time.monotonic()
                event = Restored(message["iteration"])
            case "said":
                event = Said(message["global_rank"], message["message"])
                if message["message"]["op"] == "finished":
                    self._alarms.vigil.ends()
            case "gathered":
                parts = ("frames", "positions", "below", "copies", "starts")
                event = Gathered(node_rank, message["epoch"], *(message[part] for part in parts))
            case "lost":
                self._detected = self._detected or time.monotonic()
                self._spill(self._spilling.lost())
                event = AgentLost(node_rank, message["why"], time.monotonic())
            case "joined":
                event = AgentJoined(node_rank)
            case "signalled":
                reason = f"node {node_rank} got signal {message['number']}"
                self._execute(End(reason, 128 + message["number"]))
                return
            case other:
                raise ValueError(f"node {node_rank} sent an unknown message {other!r}")
        self._feed(event)

    def met(self) -> None:
        """A worker of this node has connected."""
        self._alarms.begin()

    def seconds_left(self) -> float | None:
        """Until `tick` has something to do; None when nothing is awaited."""
        known = [at for at in (self._deadline, self._alarms.vigil.deadline) if at is not None]
        return max(0.0, min(known) - time.monotonic()) if known else None

    def tick(self) -> None:
        """Look at the ranks when that is due; tell the round when a phase has taken too long."""
        if self._over:
            return
        self._watch(self._alarms.vigil.tick(time.monotonic()))
        if self._deadline is not None and time.monotonic() >= self._deadline:
            self._deadline = None
            self._watch(self._alarms.vigil.inquire(self._decider.missing(), time.monotonic()))

    def _watch(self, outcomes: Sequence[Outcome]) -> None:
        """Do what follows from a look at the ranks."""
        for outcome in outcomes:
            match outcome:
                case Look():
                    asked = {"number": outcome.number, "ping_seconds": outcome.ping_seconds}
                    self._everywhere({"op": "look", **asked})
                case Alarm():
                    self._alarms.say(outcome)
                    for each in outcome.verdict.culprits:
                        self._kill(each.global_rank)
                case Stubborn():
                    reason = self._alarms.stubborn(outcome)
                    rank, told = outcome.culprits[0].global_rank, {"op": "hopeless"}
                    self._feed(Said(rank, {**told, "reason": reason, "state_lost": True}))
                case Inquired():
                    self._alarms.inquired(outcome)
                    stuck = tuple(each.global_rank for each in outcome.culprits)
                    decider = self._decider
                    self._feed(Expired(decider.epoch, decider.phase, self._timeout, stuck))
                case other:
                    self._alarms.say(other)

    def _kill(self, global_rank: int) -> None:
        order: Message = {"op": "kill", "global_rank": global_rank}
        self._send(self._members.node_of(global_rank), order)

    def _feed(self, event: Event) -> None:
        if self._over:
            # What ends after the first end is its consequence.
            return
        before = (self._decider.epoch, self._decider.phase)
        commands = self._decider.feed(event)
        after = (self._decider.epoch, self._decider.phase)
        if after != before or isinstance(event, Expired):
            waits = after[1] is not Phase.TRAINING and after[1] not in FINAL
            limit = time.monotonic() + self._timeout.total_seconds()
            self._deadline = limit if waits else None
            if waits:
                self._alarms.vigil.pauses()
            elif after[1] is Phase.TRAINING:
                self._alarms.vigil.trains(time.monotonic())
        for command in commands:
            self._execute(command)
        if self._decider.phase is Phase.TRAINING:
            self._detected = None

    def _execute(self, command: Command) -> None:
        match command:
            case Notify():
                for node in self._members.nodes:
                    ranks = [r for r in command.global_ranks if r in node.global_ranks]
                    if ranks:
                        notice = {"op": "notify", "global_ranks": ranks, "message": command.message}
                        self._send(node.node_rank, notice)
            case Replace():
                order: Message = {
                    "op": "replace",
                    "global_rank": command.global_rank,
                    "epoch": command.epoch,
                    "fired": list(command.fired),
                }
                self._send(self._members.node_of(command.global_rank), order)
            case Expel():
                ranks = list(command.global_ranks)
                killed = f"ranks {ranks} are killed, and " if ranks else ""
                line = f"{command.reason}: {killed}a new round begins"
                print(f"moetion-run: {line}", file=sys.stderr)
                for rank in ranks:
                    self._kill(rank)
            case Gather():
                self._everywhere({"op": "gather", "epoch": command.epoch})
            case Evict():
                order = {"op": "evict", "node_rank": command.node_rank, "why": command.why}
                self._send(self._members.own_node_rank, order)
            case Record():
                self._record(command.kind, command.fields)
            case End():
                self._end(command)

    def _end(self, end: End) -> None:
        self._over = True
        self._alarms.vigil.pauses()
        if end.trace is not None:
            whose = f"[rank{end.trace.global_rank}]: "
            text = "".join(f"{whose}{line}\n" for line in end.trace.lines)
            print(f"moetion-run: what rank {end.trace.global_rank} raised first:", file=sys.stderr)
            print(text, end="", file=sys.stderr)
        order: Message = {"op": "end", "reason": end.reason, "code": end.code, "fall_back": None}
        if end.reason:
            stored, valid = self._stored(), self._spilling.valid
            source = None
            if end.state_lost and self._can_begin_again:
                source = next_source(self._begun, stored, valid, end.tier, end.distrusted)
            if source is not None:
                order["fall_back"] = self._fall_back(end, source).to_json()
            else:
                self._give_up(end, best(valid, stored.checkpoint))
        self._everywhere(order)

    def _give_up(self, end: End, found: Source | None) -> None:
        """Says why the job ends, and what to do.

        Args:
            found: what the same command would begin from.
        """
        tiers = "" if end.tried is None else f"; tried: {end.tried}"
        # What this job has begun from would only bring it here again.
        further = found if found is not None and found > self._begun.highest else None
        hint = way_on(further, end.tried is not None)
        print(f"moetion-run: ending the job: {end.reason}{tiers}{hint}", file=sys.stderr)

    def _fall_back(self, end: End, source: Source) -> FallBack:
        """Says what all start anew from, and what that costs."""
        told = {"tier": source.tier, "iteration": source.iteration, "committed": end.committed}
        self._log.emit("fell-back", reason=end.reason, **told)
        lost = f"iterations {source.iteration + 1} to {end.committed} are run again"
        known = f"{lost}; " if end.committed > source.iteration else ""
        anew = f"{known}all workers start anew from {source}"
        print(f"moetion-run: {end.reason}; {anew}", file=sys.stderr)
        tried = (end.tried or NOTHING_TRIED).with_step(source.tier, time.monotonic())
        highest = max(self._begun.highest, source)
        limit = Limit(source, highest)
        return FallBack(limit, end.fired, tried=tried, distrusted=end.distrusted)

    def _spill(self, orders: list[Order]) -> None:
        for order in orders:
            match order:
                case Spill():
                    self._everywhere({"op": "spill", "span": asdict(order.span)})
                case Settle():
                    settle = {"op": "settle", "span": asdict(order.span), "valid": order.valid}
                    self._everywhere(settle)
                case Release():
                    self._everywhere({"op": "release", "span": asdict(order.span)})
                case Report():
                    self._log.emit(order.kind, iteration=order.iteration, detail=order.detail)
                    if order.warning:
                        print(
                            f"moetion-run: warning: no spill of iteration {order.iteration}:"
                            f" {order.detail}; training goes on",
                            file=sys.stderr,
                        )

    def _everywhere(self, order: Message) -> None:
        # This node last: its own end must not keep the others from hearing of it.
        for node in reversed(self._members.nodes):
            self._send(node.node_rank, order)

    def _record(self, kind: str, fields: dict[str, Any]) -> None:
        if self._detected is not None:
            fields = {**fields, "ms": round((time.monotonic() - self._detected) * 1000, 1)}
        self._log.emit(kind, **fields)
        if kind == "resumed":
            since, self._cold = "start" if self._cold else "failure", False
            print(
                f"moetion-run: ranks {fields['recovered']} recovered, training again"
                f" {fields['ms']:g} ms after the {since} (epoch {fields['epoch']})",
                file=sys.stderr,
            )
