"""The leader gives places to agents and takes them away, and tells everybody; see `seats`."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from datetime import timedelta

from megatron_moetion.agent.items import Item, PeerGone, PeerJoined
from megatron_moetion.agent.leader import Leader
from megatron_moetion.agent.lease import Leases
from megatron_moetion.agent.membership import Member, Members, taken
from megatron_moetion.agent.seats import Applicant, Parked, Seated, Seats, Turned
from megatron_moetion.agent.wire import Channel, Message
from megatron_moetion.events import EventLog


class Seating:
    """Who sits where, by connection.

    Args:
        members: all nodes at the start.
        peers: the control connections of the members by node rank; only this changes it.
        leader: told of places that are lost and given.
        send: gives an order to the agent of a node, this one's too.
        post: hands an item to the main loop.
        log: for events.
        lease: of every agent.
        timeout: for a lost node to be replaced.
        replaces_nodes: places of lost nodes are given away.
    """

    def __init__(
        self,
        members: Members,
        peers: dict[int, Channel],
        leader: Leader,
        send: Callable[[int, Message], None],
        post: Callable[[Item], None],
        log: EventLog,
        lease: timedelta,
        timeout: timedelta,
        replaces_nodes: bool,
    ) -> None:
        self._own = members.own_node_rank
        self._peers, self._leader, self._send, self._post = peers, leader, send, post
        self._log, self._lease, self._timeout = log, lease, timeout
        self._replaces_nodes = replaces_nodes
        self._seats = Seats(members.nodes)
        self._channels: dict[str, Channel] = {}
        self.leases = Leases(lease, self._silent)

    def place_of(self, channel: Channel) -> int | None:
        """The node rank of whoever is at the other end, if it has a place (still)."""
        return next((n for n, known in self._peers.items() if known is channel), None)

    def joined(self, item: PeerJoined) -> None:
        """An agent has connected."""
        if item.member is None and item.node_rank in self._peers:
            self._refuse(item.channel, taken(item.node_rank))
            return
        if not self.leases.grant(item.agent):
            # It was silent for a lease before this loop came to it.
            item.channel.cut()
            return
        self._channels[item.agent] = item.channel
        if item.member is None:
            self._peers[item.node_rank] = item.channel
        else:
            self._apply(Applicant(item.agent, Member(**item.member)))

    def gone(self, item: PeerGone) -> None:
        """An agent's connection has ended, or its lease."""
        node_rank = self.place_of(item.channel)
        for agent in [a for a, channel in self._channels.items() if channel is item.channel]:
            del self._channels[agent]
            self.leases.end(agent)
            self._seats.leave(agent)
        if node_rank is None:
            # It had none, or that is known already.
            return
        del self._peers[node_rank]
        tenure = self._seats.vacate(node_rank)
        self._everybody({"op": "evicted", "node_rank": node_rank, "tenure": tenure})
        self._leader.take(node_rank, {"op": "lost", "why": item.why})
        if self._leader.over or not self._replaces_nodes:
            return
        seated = self._seats.fill(node_rank)
        print(
            f"moetion-run: {_what_now(node_rank, item.why, seated, self._timeout)}", file=sys.stderr
        )
        if seated is not None:
            self._seat(seated)

    def evict(self, node_rank: int, why: str) -> None:
        """An agent that is there loses its place; it hears why, and ends."""
        channel = self._peers.get(node_rank)
        if channel is not None:
            self._refuse(channel, why)
            self._post(PeerGone(why, channel))

    def dismiss(self, order: Message) -> None:
        """The job ends, and whoever stands by ends with it."""
        # They stop their beats, and what this agent has still to end may take longer than a lease.
        self.leases.stop()
        seated = set(map(id, self._peers.values()))
        for channel in [c for c in self._channels.values() if id(c) not in seated]:
            with contextlib.suppress(OSError):
                channel.send(order)

    def _silent(self, agent: str) -> None:
        # In the thread of the leases: the main loop may be waiting for this very connection.
        channel = self._channels.get(agent)
        if channel is not None:
            seconds = self._lease.total_seconds()
            self._post(PeerGone(f"silent for {seconds:g} s, see --moetion-lease", channel))
            channel.cut()

    def _apply(self, applicant: Applicant) -> None:
        match self._seats.apply(applicant):
            case Turned(reason):
                self.leases.end(applicant.agent)
                self._refuse(self._channels.pop(applicant.agent), reason)
            case Parked(ahead):
                told = {"ahead": ahead, "replaces_nodes": self._replaces_nodes}
                self._log.emit("parked", agent=applicant.agent, **told)
                self._tell(self._channels[applicant.agent], {"op": "parked", **told})
            case Seated() as seated:
                self._seat(seated)

    def _seat(self, seated: Seated) -> None:
        member, channel = seated.member, self._channels[seated.agent]
        self._peers[member.node_rank] = channel
        nodes = [asdict(node) for node in self._seats.members]
        # It hears of all who have moved before, the others of it.
        self._tell(channel, {"op": "seated", "node_rank": member.node_rank, "nodes": nodes})
        self._everybody({"op": "moved", "nodes": [asdict(member)]}, but=member.node_rank)
        self._leader.take(member.node_rank, {"op": "joined"})

    def _everybody(self, order: Message, but: int | None = None) -> None:
        for node_rank in [self._own, *self._peers]:
            if node_rank != but:
                self._send(node_rank, order)

    def _refuse(self, channel: Channel, reason: str) -> None:
        with contextlib.suppress(OSError):
            channel.send({"op": "refused", "reason": reason})

    def _tell(self, channel: Channel, message: Mapping[str, object]) -> None:
        try:
            channel.send(message)
        except OSError as error:
            # Not handled here, in the middle of something: it arrives as an item like any other.
            self._post(PeerGone(str(error), channel))


def _what_now(node_rank: int, why: str, seated: Seated | None, timeout: timedelta) -> str:
    lost = f"node {node_rank} is lost ({why})"
    if seated is not None:
        return f"{lost}: a standby takes its place, the others wait"
    return (
        f"{lost}: start the same command with --node-rank {node_rank} or --standby on another one"
        f" within {timeout.total_seconds():g} s (--moetion-timeout); the others wait"
    )
