"""Whether the host memory that a node's ranks, and other nodes' copies, come to is there."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable
from multiprocessing import AuthenticationError

from megatron_moetion.agent.copies import Copies
from megatron_moetion.agent.replication import Replication
from megatron_moetion.agent.wire import Channel, Message
from megatron_moetion.events import EventLog
from megatron_moetion.vault.budget import Claim, free_bytes, settle, table
from megatron_moetion.vault.store import VaultStore


class Claims:
    """Holds every rank's answer back until all have asked, here and where copies come from.

    Args:
        node_rank: of this node; node 0 prints the table.
        global_ranks: of this node.
        store: this node's vault; what it holds already is part of the claim.
        replication: tells the holders of these ranks' copies.
        copies: knows what is to be held here.
        log: for the event.
        refuse: ends the job with one line.
    """

    def __init__(
        self,
        node_rank: int,
        global_ranks: tuple[int, ...],
        store: VaultStore,
        replication: Replication,
        copies: Copies,
        log: EventLog,
        refuse: Callable[[str], None],
    ) -> None:
        self._node_rank, self._ranks = node_rank, frozenset(global_ranks)
        self._store, self._replication, self._copies = store, replication, copies
        self._log, self._refuse = log, refuse
        self._lock = threading.Lock()
        self._claims: dict[int, Claim] = {}
        self._waiting: list[tuple[Channel, int]] = []
        self._limit: int | None = None
        self._announced = False
        self._decided = False
        self._ceiling = 0

    def asked(self, global_rank: int) -> bool:
        """Whether a rank's memory has been claimed, by whichever process."""
        with self._lock:
            return global_rank in self._claims

    @property
    def ceiling(self) -> int:
        """How long windows may become on this node; 0 is never to change them."""
        return self._ceiling

    def take(self, global_rank: int, channel: Channel, message: Message) -> None:
        """A rank asks; it is answered with "granted" or the job ends."""
        self._replication.bound(global_rank, message["lag"])
        with self._lock:
            self._claims[global_rank] = Claim.from_json(message)
            self._waiting.append((channel, message["id"]))
            self._limit = message["limit"]
            if self._claims.keys() < self._ranks:
                return
            claims = {rank: claim.to_json() for rank, claim in self._claims.items()}
        try:
            self._replication.announce(claims)
        except (OSError, EOFError, AuthenticationError) as error:
            who = f"node {self._node_rank} cannot reach a node that is to hold its copies"
            self._refuse(f"{who}: {error or type(error).__name__}")
            return
        self._replication.copy_held()
        with self._lock:
            self._announced = True
        self.decide()

    def decide(self) -> None:
        """Answer, if everything is known."""
        with self._lock:
            if not self._copies.known() or self._decided or not self._announced:
                return
            self._decided = True
        held = self._store.allocated_bytes()
        available = free_bytes() + held if self._limit is None else self._limit
        grant = settle(self._claims, available, self._copies.expected)
        if grant.refusal is not None:
            self._refuse(f"node {self._node_rank}: {grant.refusal}")
            return
        self._ceiling = grant.ceiling
        self._copies.allow(grant.ceiling)
        if grant.copies:
            self._log.emit("claimed", nbytes=grant.copies, what="copies for other nodes")
        if self._node_rank == 0:
            needs = {rank: grant.claims[rank].need for rank in sorted(grant.claims)}
            for line in table(needs, available, grant.copies).splitlines():
                print(f"moetion-run: {line}", file=sys.stderr)
        if grant.note is not None:
            print(f"moetion-run: node {self._node_rank}: {grant.note}", file=sys.stderr)
        for claimant, request_id in self._waiting:
            # One that has died meanwhile is about to be seen, and its replacement need not ask.
            with contextlib.suppress(OSError):
                claimant.send({"op": "granted", "id": request_id, "ceiling": grant.ceiling})
