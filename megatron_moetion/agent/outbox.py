"""Notices to one worker.

A worker may take nothing in, as one that is stopped in the middle of being sent a frame. Whoever
has something to tell it never waits for that.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable

from megatron_moetion.agent.wire import Channel, Message


class Outbox:
    """Sends notices in order, in a thread of its own, until the worker is gone.

    Args:
        channel: to the worker.
        first: what there is to be told already.
    """

    def __init__(self, channel: Channel, first: Iterable[Message]) -> None:
        self.channel = channel
        self._notices: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        for notice in first:
            self.post(notice)
        threading.Thread(target=self._send, name="moetion-outbox", daemon=True).start()

    def post(self, notice: Message) -> None:
        """Send a notice some time."""
        self._notices.put(notice)

    def close(self) -> None:
        """The worker is gone, and its connection is over, whoever else holds the other end."""
        self._notices.put(None)
        self.channel.cut()

    def _send(self) -> None:
        while (notice := self._notices.get()) is not None:
            try:
                self.channel.send(notice)
            except OSError:
                # Its exit is about to be seen, and that is what the job acts on.
                return
