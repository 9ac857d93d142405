"""Which nodes the job has, where their agents listen, and which global ranks live there."""

from __future__ import annotations

import json
import secrets
import socket
from dataclasses import asdict, dataclass
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
from megatron_moetion.config import Config

BACKLOG = 128
DEFAULT_LEASE = timedelta(seconds=Config().lease_seconds)
GOING = "moetion/going"
"""Key that is there once all nodes have met."""
ANY_PLACE = -1
"""Node rank of an agent that has none yet."""


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
        tenure: how many agents have had this place before; only the leader gives places away.
    """

    node_rank: int
    host: str
    port: int
    num_workers: int
    first_global_rank: int = 0
    domain: str = ""
    tenure: int = 0

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
        lease: how long an agent that is silent counts as there; the leader's counts.
    """

    num_nodes: int
    node_rank: int
    master_addr: str
    master_port: int
    timeout: timedelta
    domain: str = ""
    lease: timedelta = DEFAULT_LEASE


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
    """

    store: Store
    port: int
    listener: socket.socket
    members: Members
    run_id: str


@dataclass(frozen=True)
class Arrival:
    """A node that has come to a job that is going on; the leader may have a place for it.

    Attributes:
        store: as in `Meeting`.
        port: likewise.
        listener: likewise.
        run_id: likewise.
        leader: node 0.
        own: this node, its ranks still unknown; its node rank is the only place that it would take,
            or ANY_PLACE.
    """

    store: Store
    port: int
    listener: socket.socket
    run_id: str
    leader: Member
    own: Member


def meet(rendezvous: Rendezvous, num_workers: int, again: bool = False) -> Meeting | Arrival:
    """Announce this node and wait for all others.

    Args:
        again: somebody else hosts the store, and these nodes may have met there before.

    Raises:
        MembershipError: a port or node rank is taken, or a node does not appear.
    """
    server = open_store(rendezvous, hosted_elsewhere=again)
    host, listener = _listen(server)
    own = rendezvous.node_rank
    store: Store = server
    if again:
        # No agent outlives another one of its job, so all count alike.
        store = PrefixStore(f"moetion/{server.add(f'moetion/met/{own}', 1)}", server)
    if store.add(f"moetion/taken/{own}", 1) != 1:
        if not store.check([GOING]):
            raise MembershipError(taken(own))
        own_member = Member(own, host, listener.getsockname()[1], num_workers)
        return _arrival(store, server.port, listener, own_member)
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


def arrive(rendezvous: Rendezvous, num_workers: int) -> Arrival:
    """Wait for a job to be going on, to stand by for any of its places.

    Raises:
        MembershipError: there is none in time.
    """
    store = open_store(rendezvous, hosted_elsewhere=True)
    host, listener = _listen(store)
    try:
        store.wait([GOING], rendezvous.timeout)
    except DistStoreError:
        seconds = rendezvous.timeout.total_seconds()
        raise MembershipError(f"the job did not begin within {seconds:g} s") from None
    own = Member(ANY_PLACE, host, listener.getsockname()[1], num_workers)
    return _arrival(store, store.port, listener, own)


def taken(node_rank: int) -> str:
    """Why a node is not let in."""
    return (
        f"node rank {node_rank} is taken; give every node its own --node-rank, or let this one wait"
        " for the place of a lost one with --standby"
    )


def _listen(store: TCPStore) -> tuple[str, socket.socket]:
    # The address of this host that reaches the store is one that the others reach, too.
    with socket.create_connection((store.host, store.port)) as probe:
        host = probe.getsockname()[0]
    return host, listen_tcp(host, BACKLOG)


def _arrival(store: Store, port: int, listener: socket.socket, own: Member) -> Arrival:
    leader = Member(**json.loads(store.get("moetion/agent/0")))
    return Arrival(store, port, listener, store.get("moetion/run").decode(), leader, own)
