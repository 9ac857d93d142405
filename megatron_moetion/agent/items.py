"""What the main loop of an agent is handed by its other threads."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass

from megatron_moetion.agent.wire import Channel, Message


@dataclass(frozen=True)
class FromWorker:
    """A message of a local worker."""

    global_rank: int
    message: Message


@dataclass(frozen=True)
class WorkerSilent:
    """Everything that a local worker had sent before it closed has been posted."""

    global_rank: int


@dataclass(frozen=True)
class FromPeer:
    """A message over the control connection of another agent; whose place that is, if it has one,
    the main loop knows by the connection.
    """

    message: Message
    channel: Channel


@dataclass(frozen=True)
class PeerJoined:
    """Another node's agent has connected to this one, the leader.

    Attributes:
        agent: its name, see `lease.Leases`.
        node_rank: of its place.
        member: of one without a place, see `seats.Applicant`.
    """

    channel: Channel
    agent: str
    node_rank: int
    member: Message | None = None


@dataclass(frozen=True)
class PeerGone:
    """A control connection ended."""

    why: str
    channel: Channel


@dataclass(frozen=True)
class Damaged:
    """A copy in this node's vault is not what was sealed; it is not used any more.

    Attributes:
        copy: 0 is the owner's own.
        reason: how it differs, and in which operators.
    """

    global_rank: int
    key: str
    copy: int
    reason: str


@dataclass(frozen=True)
class Replicated:
    """All copies of a frame of a local rank are there.

    Attributes:
        seconds: what the slowest of them took of the time that its owner's frames have.
    """

    global_rank: int
    nbytes: int
    seconds: float


@dataclass(frozen=True)
class Arrived:
    """A worker that another launcher has started waits to be let in.

    Attributes:
        generation: how often its launcher had started all workers anew before.
        welcome: set once it is let in.
    """

    global_rank: int
    pid: int
    generation: int
    welcome: Future[Message]


Item = FromWorker | WorkerSilent | FromPeer | PeerJoined | PeerGone | Damaged | Replicated | Arrived
