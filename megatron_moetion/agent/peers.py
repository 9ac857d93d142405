"""Other nodes' vaults."""

from __future__ import annotations

import threading
from datetime import timedelta
from multiprocessing import AuthenticationError
from typing import Any

from megatron_moetion.agent.lease import bulk
from megatron_moetion.agent.membership import Member, Members
from megatron_moetion.agent.wire import Channel, Message


class Peers:
    """One connection per other node, opened on first use, one request at a time on each.

    Args:
        members: all nodes.
        secret: the job's.
        lease: of every agent.
    """

    def __init__(self, members: Members, secret: bytes, lease: timedelta | None = None) -> None:
        self._nodes = {member.node_rank: member for member in members.nodes}
        self._secret = secret
        self._locks = {member.node_rank: threading.Lock() for member in members.nodes}
        self._channels: dict[int, tuple[Member, Channel]] = {}
        self._silence = bulk(lease)

    def moved(self, member: Member) -> None:
        """Another agent has taken the place of a lost one."""
        # Without the lock, which a request to the lost one may hold for long.
        self._nodes[member.node_rank] = member
        self.cut(member.node_rank)

    def cut(self, node_rank: int) -> None:
        """An agent is lost: whoever waits for it here need not any more."""
        # Without the lock, which such a waiter holds.
        known = self._channels.get(node_rank)
        if known is not None:
            known[1].cut()

    def fetch(
        self, node_rank: int, global_rank: int, key: str, worker: Channel, request_id: int
    ) -> bool:
        """Answer a worker's fetch from another node, passing the bytes on as they come.

        Returns:
            False when that node has no such entry or is gone; then the worker has not been
            answered.

        Raises:
            OSError: it went away while it answered.
        """
        with self._locks[node_rank]:
            try:
                peer = self._channel(node_rank)
                peer.send({"op": "fetch", "global_rank": global_rank, "key": key})
                found = peer.receive()
            except (OSError, EOFError, AuthenticationError):
                self._forget(node_rank)
                return False
            reply = {**found, "id": request_id, "node_rank": node_rank, "inline": True}
            if reply["op"] == "missing":
                return False
            try:
                worker.send(reply, lambda fd: peer.pump_raw(reply["nbytes"], fd))
            except OSError:
                # Either end broke in the middle: what is left of the payload is no message.
                self._forget(node_rank)
                raise
            return True

    def quarantine(self, node_rank: int, about: Message) -> str | None:
        """Have another node read an entry again; see `VaultStore.quarantine`.

        Raises:
            OSError, EOFError: that agent is gone.
        """
        with self._locks[node_rank]:
            peer = self._channel(node_rank)
            peer.send({"op": "quarantine", "about": about})
            reason = peer.receive()["reason"]
            assert reason is None or isinstance(reason, str)
            return reason

    def inventory(self, node_rank: int, global_rank: int, prefix: str) -> list[Any]:
        """Sealed entries of a rank of another node, as JSON.

        Raises:
            OSError, EOFError: that agent is gone.
        """
        with self._locks[node_rank]:
            peer = self._channel(node_rank)
            peer.send({"op": "inventory", "global_rank": global_rank, "prefix": prefix})
            reply: Message = peer.receive()
            return list(reply["entries"])

    def _forget(self, node_rank: int) -> None:
        known = self._channels.pop(node_rank, None)
        if known is not None:
            known[1].close()

    def _channel(self, node_rank: int) -> Channel:
        member = self._nodes[node_rank]
        known = self._channels.get(node_rank)
        if known is not None and known[0] is not member:
            self._forget(node_rank)
        if node_rank not in self._channels:
            channel = Channel.to_peer(member.host, member.port, self._secret, self._silence)
            channel.send({"op": "vault"})
            self._channels[node_rank] = (member, channel)
        return self._channels[node_rank][1]
