"""Which nodes the job has, where their agents listen, and which global ranks live there."""

from __future__ import annotations

import json
import secrets
import socket
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from typing import Protocol

from torch.distributed import (  # type: ignore[attr-defined]  # TCPStore is not in its stubs
    DistNetworkError,
    DistStoreError,
    PrefixStore,
    Store,
    TCPStore,
)

from megatron_moetion.agent.wire import listen_tcp

BACKLOG = 128
GOING = "moetion/going"
"""Key that is there once all nodes have met."""


class MembershipError(RuntimeError):
    """The agents of the job could not find each other."""


@dataclass(frozen=True)
class Member:
    """One node.

    Attributes:
        node_rank: 0 is the leader.
        host: where its agent listens for other agents.
        port: likewise.
        num_workers: how many it runs.
        first_global_rank: of its workers; the others follow.
        domain: label of what fails together: the host's name, or what the user calls its rack.
    """

    node_rank: int
    host: str
    port: int
    num_workers: int
    first_global_rank: int = 0
    domain: str = ""

    @property
    def global_ranks(self) -> tuple[int, ...]:
        """Of its workers, by local rank."""
        return tuple(range(self.first_global_rank, self.first_global_rank + self.num_workers))


@dataclass(frozen=True)
class Members:
    """All nodes, by node rank, and which of them this is."""

    nodes: tuple[Member, ...]
    own_node_rank: int

    @property
    def own(self) -> Member:
        """This node."""
        return self.nodes[self.own_node_rank]

    @property
    def world_size(self) -> int:
        """Number of workers of the job."""
        return sum(node.num_workers for node in self.nodes)

    @property
    def ranks_of_node(self) -> tuple[tuple[int, ...], ...]:
        """Global ranks per node rank."""
        return tuple(node.global_ranks for node in self.nodes)

    def node_of(self, global_rank: int) -> int:
        """Node rank on which a global rank lives.

        Raises:
            ValueError: there is no such rank.
        """
        for node in self.nodes:
            if global_rank in node.global_ranks:
                return node.node_rank
        raise ValueError(f"global rank {global_rank} is not one of {self.world_size}")


@dataclass(frozen=True)
class Rendezvous:
    """How to find the others.

    Attributes:
        num_nodes: as in --nnodes.
        node_rank: of this node.
        master_addr: where node 0 is.
        master_port: of the store that node 0 hosts; 0 lets it choose (one node only).
        timeout: for the slowest agent to appear.
        domain: of this node, see `Member`.
    """

    num_nodes: int
    node_rank: int
    master_addr: str
    master_port: int
    timeout: timedelta
    domain: str = ""


class KeyValues(Protocol):
    """The part of torch's store that is needed."""

    def set(self, key: str, value: str) -> None:
        """Put a value where every node finds it."""

    def get(self, key: str) -> bytes:
        """Wait for a value."""


def all_have_read(store: KeyValues, topic: str, own_node_rank: int, num_nodes: int) -> None:
    """To be called by every node once it has read what all wrote about a topic.

    Node 0 hosts the store. What was read may be a reason to refuse the job, and node 0 must not
    end, and the store with it, before the last node has read it too.
    """
    store.set(f"{topic}/read/{own_node_rank}", "")
    if own_node_rank == 0:
        for node_rank in range(num_nodes):
            store.get(f"{topic}/read/{node_rank}")


def open_store(rendezvous: Rendezvous, *, hosted_elsewhere: bool = False) -> TCPStore:
    """Host the job's store on node 0, connect to it elsewhere.

    The workers use it too (they see it as torchrun's agent store), so it outlives every worker.

    Raises:
        MembershipError: the port is taken, or nobody answers.
    """
    where = f"{rendezvous.master_addr}:{rendezvous.master_port}"
    leads = rendezvous.node_rank == 0 and not hosted_elsewhere
    try:
        return TCPStore(
            rendezvous.master_addr,
            rendezvous.master_port,
            is_master=leads,
            wait_for_workers=False,
            timeout=rendezvous.timeout,
        )
    except (DistNetworkError, DistStoreError) as error:
        first_line = str(error).partition("\n")[0]
        if leads:
            hint = f"cannot host the store at {where}; choose another --master-port"
        else:
            hint = f"node 0's agent does not answer at {where}; start it or correct --master-addr"
        raise MembershipError(f"{hint} ({first_line})") from None


@dataclass(frozen=True)
class Meeting:
    """What `meet` found.

    Attributes:
        store: keep it for as long as any worker lives; on node 0 it may be the server.
        port: of its server.
        listener: for other agents.
        members: all nodes.
        run_id: the same on all nodes, new for each job.
        stands_in: the job is going on; this node asks to take the place of a lost one.
    """

    store: Store
    port: int
    listener: socket.socket
    members: Members
    run_id: str
    stands_in: bool = False


def meet(rendezvous: Rendezvous, num_workers: int, again: bool = False) -> Meeting:
    """Announce this node and wait for all others.

    Args:
        again: somebody else hosts the store, and these nodes may have met there before.

    Raises:
        MembershipError: a port or node rank is taken, or a node does not appear.
    """
    server = open_store(rendezvous, hosted_elsewhere=again)
    # The address of this host that reaches the store is one that the others reach, too.
    with socket.create_connection((server.host, server.port)) as probe:
        host = probe.getsockname()[0]
    listener = listen_tcp(host, BACKLOG)
    own = rendezvous.node_rank
    store: Store = server
    if again:
        # No agent outlives another one of its job, so all count alike.
        store = PrefixStore(f"moetion/{server.add(f'moetion/met/{own}', 1)}", server)
    if store.add(f"moetion/taken/{own}", 1) != 1:
        if not store.check([GOING]):
            raise MembershipError(taken(own))
        return _stand_in(store, server.port, rendezvous, num_workers, host, listener)
    if own == 0:
        store.set("moetion/run", secrets.token_hex(6))
    member = Member(own, host, listener.getsockname()[1], num_workers, 0, rendezvous.domain)
    store.set(f"moetion/agent/{own}", json.dumps(asdict(member)))
    nodes: list[Member] = []
    first_global_rank = 0
    for node_rank in range(rendezvous.num_nodes):
        try:
            found = json.loads(store.get(f"moetion/agent/{node_rank}"))
        except DistStoreError:
            seconds = rendezvous.timeout.total_seconds()
            raise MembershipError(
                f"node {node_rank} of {rendezvous.num_nodes} did not appear within {seconds:g} s"
            ) from None
        nodes.append(Member(**{**found, "first_global_rank": first_global_rank}))
        first_global_rank += nodes[-1].num_workers
    run_id = store.get("moetion/run").decode()
    try:
        all_have_read(store, "moetion/agent", own, rendezvous.num_nodes)
    except DistStoreError:
        raise MembershipError("a node left before the job began; see what it printed") from None
    if own == 0:
        store.set(GOING, "")
    return Meeting(store, server.port, listener, Members(tuple(nodes), own), run_id)


def taken(node_rank: int) -> str:
    """Why a node is not let in."""
    return f"node rank {node_rank} is taken; give every node its own --node-rank"


def _stand_in(
    store: Store,
    port: int,
    rendezvous: Rendezvous,
    num_workers: int,
    host: str,
    listener: socket.socket,
) -> Meeting:
    """What a node needs to ask the leader whether it may take the place of a lost one.

    Others that have done so listen elsewhere by now; the leader tells where.
    """
    own = rendezvous.node_rank
    nodes: list[Member] = []
    for node_rank in range(rendezvous.num_nodes):
        known = json.loads(store.get(f"moetion/agent/{node_rank}"))
        first = sum(node.num_workers for node in nodes)
        nodes.append(Member(**{**known, "first_global_rank": first}))
    if nodes[own].num_workers != num_workers:
        raise MembershipError(
            f"node {own} of the job has {nodes[own].num_workers} workers: give as many to the one"
            " that takes its place"
        )
    # Copies stay where they are placed, so the label stays, too.
    nodes[own] = replace(nodes[own], host=host, port=listener.getsockname()[1])
    run_id = store.get("moetion/run").decode()
    members = Members(tuple(nodes), own)
    return Meeting(store, port, listener, members, run_id, stands_in=True)
