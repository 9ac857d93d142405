"""A node agent whose workers are started, ended and started anew by somebody else."""

from __future__ import annotations

import os
import selectors
import socket
from collections.abc import Callable
from concurrent.futures import Future

from megatron_moetion.agent.items import Arrived, Item
from megatron_moetion.agent.job import Job
from megatron_moetion.agent.node import Node
from megatron_moetion.agent.spiller import Written
from megatron_moetion.agent.wire import Message
from megatron_moetion.vault.spill import Record
from megatron_moetion.vault.store import VaultStore

UNKNOWN_CODE = 1
"""Only a parent is told how a process ended."""


class HostedNode(Node):
    """The agent of one node under another launcher; see `Node`.

    Args:
        launcher: pid of whoever starts the workers; the agent ends with it.
        ready: called once workers may connect.
    """

    def __init__(
        self,
        job: Job,
        listener: socket.socket,
        store: VaultStore,
        record: Record | None,
        launcher: int,
        ready: Callable[[], None],
    ) -> None:
        super().__init__(job, listener, store, record)
        self._ready = ready
        self._arrivals: list[Arrived] = []
        self._guests: dict[int, Arrived] = {}
        self._launcher = os.pidfd_open(launcher)
        self._selector.register(self._launcher, selectors.EVENT_READ, self._launcher_ended)

    def _begin(self) -> None:
        super()._begin()
        self._ready()

    def _welcome(self, global_rank: int, hello: Message) -> Message:
        # In the thread of the connection; the main loop knows who is still there.
        arrived = Arrived(global_rank, hello["pid"], hello["generation"], Future())
        self._post(arrived)
        return arrived.welcome.result()

    def _take(self, item: Item | Written) -> None:
        if isinstance(item, Arrived):
            self._arrivals.append(item)
        else:
            super()._take(item)
        self._let_in()

    def _let_in(self) -> None:
        """Lets workers in once all of the generation before have ended and that has been reported:
        a launcher ends all of them before it starts the next, but their ends may be seen later.
        """
        present = {guest.generation for guest in self._guests.values()}
        waiting, self._arrivals = self._arrivals, []
        for arrived in waiting:
            if present - {arrived.generation} or self._draining:
                self._arrivals.append(arrived)
                continue
            try:
                pidfd = os.pidfd_open(arrived.pid)
            except ProcessLookupError:
                arrived.welcome.set_exception(ValueError("a hello of a process that has ended"))
                continue
            self._guests[arrived.global_rank] = arrived
            ended = lambda fd=pidfd, guest=arrived: self._guest_ended(fd, guest)  # noqa: E731
            self._selector.register(pidfd, selectors.EVENT_READ, ended)
            told = {"start": "hosted", "pid": arrived.pid, "epoch": self._epoch}
            self._log.emit("started", global_rank=arrived.global_rank, **told)
            arrived.welcome.set_result(super()._welcome(arrived.global_rank, {}))

    def _guest_ended(self, pidfd: int, guest: Arrived) -> None:
        self._selector.unregister(pidfd)
        os.close(pidfd)
        del self._guests[guest.global_rank]
        self._lost(guest.global_rank, UNKNOWN_CODE, guest.pid)

    def _launcher_ended(self) -> None:
        self._selector.unregister(self._launcher)
        self._end("their launcher has ended" if self._guests else "", UNKNOWN_CODE)


class Alone:
    """What one node tells itself, in place of a store."""

    def __init__(self) -> None:
        self._values: dict[str, str] = {}

    def set(self, key: str, value: str) -> None:
        """Put a value."""
        self._values[key] = value

    def get(self, key: str) -> bytes:
        """A value that was put."""
        return self._values[key].encode()
