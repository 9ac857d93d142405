"""Waiting for what a test has started."""

import selectors
import socket


def readable(what: int | socket.socket, seconds: float) -> bool:
    """Whether a descriptor can be read (a pidfd: whether the process has ended) within so long.

    Not with `select.select`, which takes no descriptor above 1023.
    """
    with selectors.DefaultSelector() as selector:
        selector.register(what, selectors.EVENT_READ)
        return bool(selector.select(seconds))
