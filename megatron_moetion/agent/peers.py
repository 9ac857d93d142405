"""Other nodes' vaults."""

from __future__ import annotations

import threading
from datetime import timedelta
from functools import partial
from multiprocessing import AuthenticationError
from typing import Any

from megatron_moetion.agent.lease import bulk
from megatron_moetion.agent.membership import Member, Members
from megatron_moetion.agent.wire import Channel, Message, write_all
from megatron_moetion.vault.shelf import Unreachable

PIECE_BYTES = 4 << 20
"""A frame is passed on to a worker in pieces of this size; notices may come in between."""


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
            False when that node has no such entry; then the worker has not been answered.

        Raises:
            Unreachable: that node is gone, perhaps in the middle; the worker waits for an answer.
            OSError: the worker is gone.
        """
        with self._locks[node_rank]:
            asked = {"op": "fetch", "global_rank": global_rank, "key": key}
            peer, found = self._ask(node_rank, asked)
            if found["op"] == "missing":
                return False
            about = {"id": request_id, "node_rank": node_rank, "inline": True}
            try:
                worker.send({**found, **about})
                self._pass_on(node_rank, peer, worker, request_id, found["nbytes"])
            except OSError:
                # What is left of the payload is no message.
                self._forget(node_rank)
                raise
            return True

    def _pass_on(
        self, node_rank: int, peer: Channel, worker: Channel, request_id: int, nbytes: int
    ) -> None:
        buffer = memoryview(bytearray(min(nbytes, PIECE_BYTES)))
        while nbytes:
            piece = buffer[: min(nbytes, PIECE_BYTES)]
            try:
                # Not while the worker's channel is taken: that node may have become silent.
                peer.receive_raw(piece)
            except (OSError, EOFError) as error:
                self._forget(node_rank)
                worker.send({"op": "broken", "id": request_id})
                raise _unreachable(node_rank, error) from error
            about = {"op": "piece", "id": request_id, "nbytes": len(piece)}
            worker.send(about, partial(write_all, data=piece))
            nbytes -= len(piece)

    def quarantine(self, node_rank: int, about: Message) -> str | None:
        """Have another node read an entry again; see `VaultStore.quarantine`.

        Raises:
            Unreachable: that node is gone.
        """
        with self._locks[node_rank]:
            _, answer = self._ask(node_rank, {"op": "quarantine", "about": about})
            reason = answer["reason"]
            assert reason is None or isinstance(reason, str)
            return reason

    def inventory(self, node_rank: int, global_rank: int, prefix: str) -> list[Any]:
        """Sealed entries of a rank of another node, as JSON.

        Raises:
            Unreachable: that node is gone.
        """
        with self._locks[node_rank]:
            asked = {"op": "inventory", "global_rank": global_rank, "prefix": prefix}
            _, answer = self._ask(node_rank, asked)
            return list(answer["entries"])

    def _ask(self, node_rank: int, request: Message) -> tuple[Channel, Message]:
        try:
            peer = self._channel(node_rank)
            peer.send(request)
            return peer, peer.receive()
        except (OSError, EOFError, AuthenticationError) as error:
            self._forget(node_rank)
            raise _unreachable(node_rank, error) from error

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


def _unreachable(node_rank: int, error: Exception) -> Unreachable:
    return Unreachable(f"node {node_rank} is gone: {error or type(error).__name__}")
