"""Who connects to an agent and does not know the job's secret."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from datetime import timedelta
from multiprocessing import AuthenticationError

import pytest
from torch.distributed import TCPStore

from megatron_moetion.agent.wire import Channel


def agents_port(master_port: int, node: int, seconds: float) -> int:
    """Where the agent of a node listens for others; waits until it does, so long at most."""
    limit = timedelta(seconds=seconds)
    store = TCPStore("127.0.0.1", master_port, is_master=False, timeout=limit)
    return int(json.loads(store.get(f"moetion/agent/{node}"))["port"])


def attack(port: int) -> list[socket.socket]:
    """Everything that a stranger can do; returns the connections that it keeps open."""
    kept = []
    for number in range(1000):
        stranger = socket.create_connection(("127.0.0.1", port))
        kept.append(stranger)
        said = (b"", b"\x00" * 20, b"GET / HTTP/1.1\r\n\r\n" * 9, os.urandom(4096))[number % 4]
        # What it says may be more than is listened to.
        with contextlib.suppress(ConnectionError):
            stranger.sendall(said)
    for _ in range(5):
        with pytest.raises(AuthenticationError):
            Channel.to_peer("127.0.0.1", port, b"wrong")
    return kept
