"""An agent without a place in the job: it waits, costs nobody anything, and takes one that is lost.

It has its spare import meanwhile, listens where others will find it, and ends with the job.
"""

from __future__ import annotations

import os
import secrets
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from multiprocessing import AuthenticationError

from megatron_moetion.agent.headway import say
from megatron_moetion.agent.lease import Lapsed, Pulse
from megatron_moetion.agent.membership import (
    ANY_PLACE,
    Arrival,
    Meeting,
    Member,
    Members,
    MembershipError,
)
from megatron_moetion.agent.supervision import GRACE
from megatron_moetion.agent.wire import Channel, Message

LAPSED_CODE = 75
"""Of an agent that was not heard for too long or stood still: EX_TEMPFAIL, it may be started again.
"""


@dataclass(frozen=True)
class Seat:
    """How an agent with a place is in touch with the leader.

    Attributes:
        channel: orders and reports.
        pulse: beats.
        answer: what the leader has said already, see `take_seat`.
    """

    channel: Channel
    pulse: Pulse
    answer: Message | None = None


class Dismissed(Exception):
    """The job is over, or begins anew without this agent's having had a place.

    Args:
        anew: it begins anew.
    """

    def __init__(self, anew: bool) -> None:
        super().__init__("the job is over")
        self.anew = anew


class Signalled(Exception):
    """A signal came while this agent stood by: it leaves, and the job goes on."""

    def __init__(self, number: int) -> None:
        super().__init__(f"got signal {number}")
        self.number = number


def take_seat(
    leader: Member, secret: bytes, lease: timedelta, first: Message, lapsed: Lapsed
) -> Seat:
    """Connect to the leader, say who this is, and begin to be heard.

    Args:
        leader: where it listens.
        secret: the job's.
        lease: for a leader that is silent at once.
        first: what to say; a standby waits for what the leader says to that.
        lapsed: see `Pulse`.

    Raises:
        MembershipError: it is not there, or has another secret.
    """
    agent, where = secrets.token_hex(8), (leader.host, leader.port)
    try:
        channel = Channel.to_peer(*where, secret, lease)
        channel.send({**first, "agent": agent})
        answer = channel.receive() if first["op"] == "standby" else None
        if answer is not None and answer["op"] == "refused":
            raise MembershipError(answer["reason"])
        pulse = Pulse(Channel.to_peer(*where, secret, lease), agent, lapsed)
        return Seat(channel, pulse, answer)
    except AuthenticationError:
        raise MembershipError(
            "the leader has another MOETION_SECRET: set the same one on every node"
        ) from None
    except (EOFError, OSError) as error:
        at, why = f"{leader.host}:{leader.port}", str(error) or "connection closed"
        raise MembershipError(f"cannot reach the leader at {at}: {why}") from None


def stand_by(arrival: Arrival, secret: bytes, lease: timedelta) -> tuple[Meeting, Seat]:
    """Ask for a place and wait until there is one.

    Returns:
        What `meet` would have found, and the connections to the leader.

    Raises:
        MembershipError: the leader has none for this node, or is gone.
        Dismissed: the job has ended.
        Signalled: see there.
    """
    asked = {"op": "standby", "member": asdict(arrival.own), "node_rank": arrival.own.node_rank}
    with _signals_raise():
        seat = take_seat(arrival.leader, secret, lease, asked, _leader_silent)
        try:
            message = seat.answer
            while message is None or message["op"] != "seated":
                _hear(seat.channel, message)
                message = seat.channel.receive()
        except (EOFError, OSError) as error:
            seat.pulse.stop()
            why = str(error) or "connection closed"
            raise MembershipError(f"the leader, node 0, is gone ({why})") from None
        except (Dismissed, Signalled):
            seat.pulse.stop()
            raise
        nodes = tuple(Member(**node) for node in message["nodes"])
        members = Members(nodes, message["node_rank"])
        if arrival.own.node_rank == ANY_PLACE:
            _say(f"this standby takes the place of node {members.own_node_rank}")
        found = (arrival.store, arrival.port, arrival.listener, members, arrival.run_id)
        return Meeting(*found), seat


def _hear(channel: Channel, message: Message | None) -> None:
    match message:
        case {"op": "parked", "ahead": ahead, "replaces_nodes": replaces_nodes}:
            _say(_parked(ahead, replaces_nodes))
        case {"op": "end", "fall_back": fall_back}:
            if fall_back is not None:
                # Until its process is another, the store there is still that of the failed run.
                _await_end(channel)
            raise Dismissed(anew=fall_back is not None)


def _await_end(channel: Channel) -> None:
    try:
        while True:
            channel.receive()
    except (EOFError, OSError):
        return


def _parked(ahead: int, replaces_nodes: bool) -> str:
    if not replaces_nodes:
        return (
            "standing by in vain: this job replaces no node (that takes --moetion-cut shard and"
            " copies on other nodes)"
        )
    behind = f", after {ahead} others" if ahead else ""
    return f"standing by for a node that is lost{behind}"


def _leader_silent(stopped_for: float | None) -> None:
    what = "nothing was heard of the leader" if stopped_for is None else "this agent was stopped"
    _say(f"{what} for longer than the lease (--moetion-lease): this standby ends")
    os._exit(LAPSED_CODE)


def _say(line: str) -> None:
    # A standby that waits for its terminal would take a place and do nothing there.
    say(f"moetion-run: {line}", GRACE)


@contextmanager
def _signals_raise() -> Iterator[None]:
    def handler(number: int, _: object) -> None:
        raise Signalled(number)

    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
