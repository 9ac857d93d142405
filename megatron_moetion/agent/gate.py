"""Lets in who knows the job's secret; everybody else costs one descriptor for a while, no thread.

A connection waits here, in one thread with all others, until its first bytes are there. Only then
does it get a thread, for the challenge that follows (see `wire.Channel.accepted`).
"""

from __future__ import annotations

import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection

from megatron_moetion.agent.counters import Counters
from megatron_moetion.agent.wire import KNOCK_BYTES, Channel, Message, is_knock, set_patience
from megatron_moetion.events import EventLog

MAX_WAITING = 64
"""Connections that have not shown that they know the secret. The oldest gives way to a new one:
whoever knows it shows it at once.
"""
PATIENCE_OF_TIMEOUT = 20
"""The greeting may take this part of --moetion-timeout."""


@dataclass
class _Visitor:
    """What a connection has said so far, and until when it may take."""

    deadline: float
    said: bytes = b""


class Gate:
    """One listening socket and the connections that have not been let in yet.

    Args:
        listener: owned by the gate from now on.
        secret: the job's.
        serve: called in a thread of its own with a connection that was let in and its first
            message; closes the connection.
        patience: for the first bytes, and then for the rest of the greeting.
        counters: strangers are counted here by what is wrong with them.
        log: an event when the number of strangers has doubled, so that they cannot fill a disk.
    """

    def __init__(
        self,
        listener: socket.socket,
        secret: bytes,
        serve: Callable[[Channel, Message], None],
        patience: timedelta,
        counters: Counters,
        log: EventLog,
    ) -> None:
        self._listener, self._secret, self._serve = listener, secret, serve
        self._patience, self._counters, self._log = patience, counters, log
        self._waiting: dict[socket.socket, _Visitor] = {}
        self._heard: set[bytes] = set()
        self._selector = selectors.DefaultSelector()

    def open(self) -> None:
        """Accept connections for as long as the process lives."""
        self._listener.setblocking(False)
        self._selector.register(self._listener, selectors.EVENT_READ)
        threading.Thread(target=self._run, name="moetion-gate", daemon=True).start()

    def _run(self) -> None:
        while True:
            oldest = next(iter(self._waiting.values()), None)
            left = None if oldest is None else max(0.0, oldest.deadline - time.monotonic())
            ready = [key.fileobj for key, _ in self._selector.select(left)]
            # Those who may have shown what they know come before newcomers that displace them.
            for connection in [c for c in ready if isinstance(c, socket.socket)]:
                if connection is not self._listener:
                    self._listen_to(connection)
            if self._listener in ready:
                self._accept()
            now = time.monotonic()
            for connection in [c for c, v in self._waiting.items() if v.deadline <= now]:
                self._turn_away(connection, "silent")

    def _accept(self) -> None:
        # Several at once: where the kernel's queue is full, whoever comes next waits for a second.
        for _ in range(MAX_WAITING):
            try:
                connection, _ = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                # It was gone before it was accepted, or this process has no descriptor left.
                print(f"moetion-run: accepting a connection failed: {error}", file=sys.stderr)
                self._make_room(0)
                return
            self._make_room(MAX_WAITING - 1)
            connection.setblocking(False)
            deadline = time.monotonic() + self._patience.total_seconds()
            self._waiting[connection] = _Visitor(deadline)
            self._selector.register(connection, selectors.EVENT_READ)
            self._listen_to(connection)

    def _make_room(self, most: int) -> None:
        while len(self._waiting) > most:
            self._turn_away(next(iter(self._waiting)), "displaced")

    def _listen_to(self, connection: socket.socket) -> None:
        visitor = self._waiting[connection]
        try:
            data = connection.recv(KNOCK_BYTES - len(visitor.said))
        except BlockingIOError:
            return
        except OSError:
            data = b""
        visitor.said += data
        if not data:
            self._turn_away(connection, "gone")
        elif len(visitor.said) == KNOCK_BYTES:
            known = visitor.said not in self._heard and is_knock(visitor.said, self._secret)
            if not known:
                self._turn_away(connection, "without the secret")
                return
            # Nobody opens a connection with what was overheard on another one.
            self._heard.add(visitor.said)
            self._let_in(connection)

    def _turn_away(self, connection: socket.socket, why: str) -> None:
        self._leave(connection)
        connection.close()
        self._count(why)

    def _leave(self, connection: socket.socket) -> None:
        del self._waiting[connection]
        self._selector.unregister(connection)

    def _let_in(self, connection: socket.socket) -> None:
        self._leave(connection)
        connection.setblocking(True)
        fd = connection.detach()
        threading.Thread(target=self._greet, args=(Connection(fd),), daemon=True).start()

    def _greet(self, connection: Connection) -> None:
        try:
            set_patience(connection, self._patience)
            channel = Channel.accepted(connection, self._secret)
            first = channel.receive()
            channel.limit(None)
        except (AuthenticationError, AssertionError, ValueError):
            connection.close()
            self._count("without the secret")
            return
        except (EOFError, OSError):
            # It went away before it said who it was, like a worker that dies while it starts.
            connection.close()
            self._count("gone")
            return
        self._serve(channel, first)

    def _count(self, why: str) -> None:
        self._counters.add(f"strangers {why}")
        number = self._counters.add("strangers")
        if number & (number - 1) == 0:
            self._log.emit("strangers", number=number, last=why)
            if number == 1 and why != "gone":
                line = f"a stranger was turned away ({why}); more are only counted"
                print(f"moetion-run: {line}", file=sys.stderr)
