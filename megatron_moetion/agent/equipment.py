"""What an agent consists of besides its main loop and its desk, put together."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta

from megatron_moetion.agent.claims import Claims
from megatron_moetion.agent.copies import Copies
from megatron_moetion.agent.counters import Counters
from megatron_moetion.agent.items import Damaged, FromWorker, Item, Replicated
from megatron_moetion.agent.membership import Members
from megatron_moetion.agent.peers import Peers
from megatron_moetion.agent.replication import Replication
from megatron_moetion.events import EventLog
from megatron_moetion.faults import Fault, Scripted
from megatron_moetion.vault.placement import Placement
from megatron_moetion.vault.store import VaultStore


@dataclass(frozen=True)
class Equipment:
    """What the desk hands on to.

    Attributes:
        store: this node's vault.
        placement: where copies are.
        peers: how to reach other nodes' vaults.
        replication: copies what local ranks seal.
        copies: takes what other nodes copy here.
        claims: decides about memory.
        counters: for metrics.
    """

    store: VaultStore
    placement: Placement
    peers: Peers
    replication: Replication
    copies: Copies
    claims: Claims
    counters: Counters

    def evicted(self, node_rank: int, tenure: int) -> None:
        """Another agent is lost; what it still sends counts no more, and nobody waits for it.

        Args:
            tenure: of whoever gets its place.
        """
        self.copies.fence(node_rank, tenure)
        self.replication.cut(node_rank)
        self.peers.cut(node_rank)


def assemble(
    members: Members,
    store: VaultStore,
    placement: Placement,
    secret: bytes,
    faults: Iterable[Fault],
    fired: Iterable[int],
    log: EventLog,
    post: Callable[[Item], None],
    lease: timedelta | None = None,
) -> Equipment:
    """Put an agent's equipment together.

    Args:
        members: all nodes.
        store: this node's vault.
        placement: where copies go.
        secret: the job's.
        faults: the script of the whole job.
        fired: those that were injected before, by index.
        log: for events.
        post: hands an item to the main loop; called from many threads.
        lease: of every agent.
    """
    own, counters = members.own, Counters()

    def struck(index: int, fault: Fault) -> None:
        counters.add("faults")
        post(FromWorker(own.first_global_rank, {"op": "fired", "index": index}))
        log.emit("fault", fault=str(fault), iteration=fault.iteration, copy=fault.copy)

    def quarantined(global_rank: int, key: str, copy: int, reason: str) -> None:
        post(Damaged(global_rank, key, copy, reason))

    def timed(global_rank: int, nbytes: int, seconds: float) -> None:
        post(Replicated(global_rank, nbytes, seconds))

    def refuse(reason: str) -> None:
        told = {"op": "hopeless", "reason": reason, "refused": True}
        post(FromWorker(own.first_global_rank, told))

    def claimed() -> None:
        claims.decide()

    scripted = Scripted(faults, fired, struck)
    copies = Copies(members, placement, store, counters, scripted, claimed)
    replication = Replication(
        members, placement, store, secret, counters, log, scripted, quarantined, timed, lease
    )
    claims = Claims(own.node_rank, own.global_ranks, store, replication, copies, log, refuse)
    peers = Peers(members, secret, lease)
    return Equipment(store, placement, peers, replication, copies, claims, counters)
