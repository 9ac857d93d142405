"""What goes into the leader's round and what comes out of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from megatron_moetion.agent.escalation import Tier, Tried
from megatron_moetion.agent.traces import Trace
from megatron_moetion.recovery.phase import Phase

Json = dict[str, Any]


@dataclass(frozen=True)
class Exited:
    """A worker process ended; everything it had sent has been fed before.

    Attributes:
        global_rank: which.
        code: as a shell reports it, 128 + n for signal n.
        position: newest position of this rank, also of a predecessor; None if there never was one.
        at: when, in seconds of the leader's monotonic clock.
    """

    global_rank: int
    code: int
    position: Mapping[str, Any] | None
    at: float = 0.0


@dataclass(frozen=True)
class Said:
    """A message of a live worker."""

    global_rank: int
    message: Mapping[str, Any]


@dataclass(frozen=True)
class Gathered:
    """One agent's inventories; keys are global ranks as strings.

    Attributes:
        frames: listings of its own ranks' frames.
        positions: of its own ranks.
        below: iterations below which its own ranks have dropped everything.
        copies: listings of frames of other nodes' ranks of which it holds copies.
        starts: likewise of their headers.
    """

    node_rank: int
    epoch: int
    frames: Mapping[str, Any]
    positions: Mapping[str, Any]
    below: Mapping[str, int] = field(default_factory=dict)
    copies: Mapping[str, Any] = field(default_factory=dict)
    starts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class AgentLost:
    """The agent of another node is gone.

    Attributes:
        at: when, in seconds of the leader's monotonic clock.
    """

    node_rank: int
    why: str
    at: float = 0.0


@dataclass(frozen=True)
class AgentJoined:
    """Another agent takes the place of one that was lost."""

    node_rank: int


@dataclass(frozen=True)
class Expired:
    """The phase of this epoch has taken longer than the timeout.

    Attributes:
        stuck: of the ranks that it waits for, those that keep the others from answering.
    """

    epoch: int
    phase: Phase
    timeout: timedelta
    stuck: tuple[int, ...] = ()


@dataclass(frozen=True)
class Restored:
    """Nobody was started yet: the vaults hold what another job had spilled."""

    iteration: int


Event = Exited | Said | Gathered | AgentLost | AgentJoined | Expired | Restored


@dataclass(frozen=True)
class Notify:
    """Send a notice to these workers."""

    global_ranks: tuple[int, ...]
    message: Json


@dataclass(frozen=True)
class Replace:
    """Start a replacement on the dead worker's node."""

    global_rank: int
    epoch: int
    fired: tuple[int, ...]


@dataclass(frozen=True)
class Expel:
    """Kill these workers, whose ends are then failures like any other."""

    global_ranks: tuple[int, ...]
    reason: str


@dataclass(frozen=True)
class Evict:
    """Take a node's place away, as if it were lost: nothing can be trained there."""

    node_rank: int
    why: str


@dataclass(frozen=True)
class Gather:
    """Ask every agent for its inventories."""

    epoch: int


@dataclass(frozen=True)
class Record:
    """An event for the timeline."""

    kind: str
    fields: Json


@dataclass(frozen=True)
class End:
    """End the whole job; an empty reason is the clean end.

    Attributes:
        reason: what cannot be survived.
        code: of the job.
        state_lost: an older state would do: start anew from a spill or a checkpoint of the host.
        fired: scripted faults that have been injected, by index.
        trace: the exception that it began with, if it was one.
        tried: the tiers that were; None where none could help (a signal, a refusal).
        tier: the first one that may help where state is lost.
        distrusted: the host has rejected what came of the state.
        committed: the iteration that the job had come to; 0 if that is not known.
    """

    reason: str
    code: int
    state_lost: bool = False
    fired: tuple[int, ...] = ()
    trace: Trace | None = None
    tried: Tried | None = None
    tier: Tier = Tier.SPILL
    distrusted: bool = False
    committed: int = 0


Command = Notify | Replace | Expel | Evict | Gather | Record | End
