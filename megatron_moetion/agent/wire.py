"""JSON messages and raw bytes over an authenticated connection; nothing is ever unpickled."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Callable, Mapping
from multiprocessing.connection import (
    Client,
    Connection,
    answer_challenge,
    deliver_challenge,
)
from typing import Any

Message = dict[str, Any]
ABSTRACT_MARK = "@"
PUMP_BYTES = 4 << 20


def unix_address(name: str) -> str:
    """Linux's abstract namespace: nothing to clean up. "@name" stands for it in the environment."""
    return "\0" + name.removeprefix(ABSTRACT_MARK) if name.startswith(ABSTRACT_MARK) else name


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
        return cls(Client(unix_address(name), family="AF_UNIX", authkey=secret))

    @classmethod
    def to_peer(cls, host: str, port: int, secret: bytes) -> Channel:
        """Connect to the agent of another node."""
        return cls(Client((host, port), family="AF_INET", authkey=secret))

    @classmethod
    def accepted(cls, connection: Connection, secret: bytes) -> Channel:
        """The listening side of the handshake, in the caller's thread and not in `accept`.

        Raises:
            multiprocessing.AuthenticationError: the other side does not know the secret.
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
        fd, done = self._connection.fileno(), 0
        while done < len(buffer):
            count = os.readv(fd, [buffer[done:]])
            if count == 0:
                raise EOFError("connection closed in the middle of a payload")
            done += count

    def pump_raw(self, nbytes: int, to_fd: int) -> None:
        """Pass on `nbytes` unframed bytes without holding them all."""
        buffer = memoryview(bytearray(min(nbytes, PUMP_BYTES)))
        while nbytes:
            piece = buffer[: min(nbytes, PUMP_BYTES)]
            self.receive_raw(piece)
            write_all(to_fd, piece)
            nbytes -= len(piece)

    def stop_reading(self) -> None:
        """What the other side has sent can still be received, then `receive` raises EOFError.

        A dead worker's data-loader children may hold its end open, so waiting for the kernel to
        report the end could take for ever.
        """
        with self._twin() as twin:
            twin.shutdown(socket.SHUT_RD)

    def close(self) -> None:
        """Close this process's end; safe to call twice."""
        self._connection.close()

    def _twin(self) -> socket.socket:
        return socket.socket(fileno=os.dup(self._connection.fileno()))


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
