"""Waking a thread that waits inside a collective.

NCCL groups are aborted through torch. Gloo's `abort` (torch 2.13) leaves a waiting thread where it
is, and a peer's `abort` does not reach it either; only the end of a connection does. So the sockets
of each gloo group are noted when it is made, and shut down for reading to abort it: gloo sees their
end, closes them, and the waiting threads on both sides raise at once. Not for writing: gloo forgets
a transfer whose writing fails, and its waiter with it (see `waiting`).
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterable
from typing import Any

Sockets = frozenset[tuple[int, str]]
"""(file descriptor, its `/proc` link): a descriptor that is used again has another link."""


NO_PORT = -1
"""Spares nothing."""


def open_sockets() -> Sockets:
    """All sockets of this process."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        link = _link(int(name))
        if link is not None and link.startswith("socket:"):
            found.add((int(name), link))
    return frozenset(found)


def _link(fd: int) -> str | None:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except FileNotFoundError:
        return None


def cut(sockets: Iterable[tuple[int, str]], spared_port: int) -> None:
    """Shuts down the TCP connections among these sockets.

    Args:
        spared_port: the job's store listens there; making the world opens a connection to it too.
    """
    for fd, link in sockets:
        if _link(fd) == link:
            _cut_one(fd, spared_port)


def _cut_one(fd: int, spared_port: int) -> None:
    try:
        connection = socket.socket(fileno=os.dup(fd))
    except OSError as error:
        if error.errno != errno.EBADF:
            raise
        return  # Gloo closed it in this moment.
    with connection:
        if connection.family not in (socket.AF_INET, socket.AF_INET6):
            return
        try:
            if connection.getpeername()[1] != spared_port:
                connection.shutdown(socket.SHUT_RD)
        except OSError as error:
            # A listening socket, or a peer that is gone already.
            if error.errno not in (errno.ENOTCONN, errno.EINVAL):
                raise


def abort(group: Any, sockets: Sockets, spared_port: int) -> None:
    """Aborts one group; any thread may call it."""
    group.abort()
    cut(sockets, spared_port)
