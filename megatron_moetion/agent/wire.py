"""JSON messages and raw bytes over an authenticated connection; nothing is ever unpickled."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import os
import secrets
import socket
import struct
import threading
from collections.abc import Callable, Mapping
from datetime import timedelta
from multiprocessing import AuthenticationError
from multiprocessing.connection import (
    Client,
    Connection,
    answer_challenge,
    deliver_challenge,
)
from typing import Any

Message = dict[str, Any]
ABSTRACT_MARK = "@"
NONCE_BYTES = 16
KNOCK_BYTES = NONCE_BYTES + hashlib.sha256().digest_size
"""What a connection begins with: a stranger is told by it before it costs a thread."""
PROBES = 4
"""Of an idle connection, spread over the time that its other end may be silent for."""


def unix_address(name: str) -> str:
    """Linux's abstract namespace: nothing to clean up. "@name" stands for it in the environment."""
    return "\0" + name.removeprefix(ABSTRACT_MARK) if name.startswith(ABSTRACT_MARK) else name


def listen_unix(name: str, backlog: int) -> socket.socket:
    """Listen for the workers of this node."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(unix_address(name))
    listener.listen(backlog)
    return listener


def listen_tcp(host: str, backlog: int) -> socket.socket:
    """Listen for other agents, at a free port."""
    return socket.create_server((host, 0), backlog=backlog)


def knock(secret: bytes) -> bytes:
    """The first bytes of a connection by somebody who knows the secret."""
    nonce = secrets.token_bytes(NONCE_BYTES)
    return nonce + hmac.digest(secret, nonce, "sha256")


def is_knock(data: bytes, secret: bytes) -> bool:
    """Whether these are the first bytes of a connection by somebody who knows the secret, or has
    overheard them; the challenge that follows tells.
    """
    nonce, proof = data[:NONCE_BYTES], data[NONCE_BYTES:]
    return hmac.compare_digest(hmac.digest(secret, nonce, "sha256"), proof)


class Channel:
    """One connection. Any thread may send, one thread receives.

    Args:
        connection: authenticated; owned by the channel from now on.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._send_lock = threading.Lock()
        with self._twin() as twin:
            if twin.family == socket.AF_INET:
                # Small messages in both directions: Nagle's algorithm would cost 40 ms on each.
                twin.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    @classmethod
    def to_agent(cls, name: str, secret: bytes) -> Channel:
        """Connect a worker to the agent of its node."""
        return cls._greeted(Client(unix_address(name), family="AF_UNIX"), secret)

    @classmethod
    def to_peer(
        cls, host: str, port: int, secret: bytes, silence: timedelta | None = None
    ) -> Channel:
        """Connect to the agent of another node.

        Args:
            silence: how long the greeting may take, and see `end_when_silent`; None has no limit.
        """
        seconds = None if silence is None else silence.total_seconds()
        with socket.create_connection((host, port), seconds) as connected:
            connected.setblocking(True)
            connection = Connection(connected.detach())
        set_patience(connection, silence)
        channel = cls._greeted(connection, secret)
        channel.limit(None)
        if silence is not None:
            channel.end_when_silent(silence)
        return channel

    @classmethod
    def _greeted(cls, connection: Connection, secret: bytes) -> Channel:
        try:
            write_all(connection.fileno(), memoryview(knock(secret)))
            answer_challenge(connection, secret)
            deliver_challenge(connection, secret)
        except (EOFError, ConnectionError):
            connection.close()
            # It hangs up on whoever does not know the secret.
            raise AuthenticationError("the agent ended the greeting") from None
        except (AuthenticationError, AssertionError, OSError):
            connection.close()
            raise
        return cls(connection)

    @classmethod
    def accepted(cls, connection: Connection, secret: bytes) -> Channel:
        """The listening side of the greeting, without the knock that has been heard already.

        Raises:
            multiprocessing.AuthenticationError: the other side does not know the secret.
            EOFError, OSError: it went away.
        """
        deliver_challenge(connection, secret)
        answer_challenge(connection, secret)
        return cls(connection)

    def send(self, message: Mapping[str, Any], raw: Callable[[int], None] | None = None) -> None:
        """Send a message; `raw(fd)` then writes bytes that follow it unframed.

        Raises:
            OSError: the other side is gone.
        """
        data = json.dumps(message, separators=(",", ":")).encode()
        with self._send_lock:
            self._connection.send_bytes(data)
            if raw is not None:
                raw(self._connection.fileno())

    def receive(self) -> Message:
        """Wait for the next message.

        Raises:
            EOFError: the other side closed.
            OSError: the connection broke.
        """
        message = json.loads(self._connection.recv_bytes())
        if not isinstance(message, dict) or "op" not in message:
            raise ValueError(f"malformed message: {str(message)[:80]}")
        return message

    def receive_raw(self, buffer: memoryview) -> None:
        """Fill a buffer with the unframed bytes that follow a message."""
        _read_all(self._connection.fileno(), buffer)

    def stop_reading(self) -> None:
        """What the other side has sent can still be received, then `receive` raises EOFError.

        A dead worker's data-loader children may hold its end open, so waiting for the kernel to
        report the end could take for ever.
        """
        with self._twin() as twin:
            twin.shutdown(socket.SHUT_RD)

    def cut(self) -> None:
        """End the connection at once, for both sides and for whoever waits in it here."""
        # It may be closed already, or its other end gone.
        with contextlib.suppress(OSError), self._twin() as twin:
            twin.shutdown(socket.SHUT_RDWR)

    def end_when_silent(self, silence: timedelta) -> None:
        """Have the kernel end this TCP connection when the other host acknowledges nothing, or
        takes in nothing of what waits for it, for so long: one that is gone without a word must not
        hold up a sender for ever. What is idle is probed.
        """
        between_probes = max(1, round(silence.total_seconds() / PROBES))
        with self._twin() as twin:
            twin.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            twin.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, between_probes)
            twin.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, between_probes)
            twin.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, PROBES)
            milliseconds = round(silence.total_seconds() * 1000)
            twin.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)

    def limit(self, patience: timedelta | None) -> None:
        """End reads and writes that take longer with an OSError; None lets them wait for ever."""
        set_patience(self._connection, patience)

    def close(self) -> None:
        """Close this process's end; safe to call twice."""
        self._connection.close()

    def _twin(self) -> socket.socket:
        return socket.socket(fileno=os.dup(self._connection.fileno()))


def set_patience(connection: Connection, patience: timedelta | None) -> None:
    """See `Channel.limit`."""
    microseconds = 0 if patience is None else round(patience.total_seconds() * 1e6)
    value = struct.pack("ll", *divmod(microseconds, 10**6))
    with socket.socket(fileno=os.dup(connection.fileno())) as twin:
        twin.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, value)
        twin.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, value)


def _read_all(fd: int, buffer: memoryview) -> None:
    done = 0
    while done < len(buffer):
        count = os.readv(fd, [buffer[done:]])
        if count == 0:
            raise EOFError("connection closed in the middle of a payload")
        done += count


def write_all(fd: int, data: memoryview) -> None:
    """Write a whole buffer to a blocking descriptor."""
    done = 0
    while done < len(data):
        done += os.write(fd, data[done:])


def send_file_region(to_fd: int, from_fd: int, offset: int, nbytes: int) -> None:
    """Copy a region of a memfd to a socket inside the kernel."""
    while nbytes:
        count = os.sendfile(to_fd, from_fd, offset, nbytes)
        offset += count
        nbytes -= count
