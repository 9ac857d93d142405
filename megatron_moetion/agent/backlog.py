"""What one stream of replication has still to tell the node at its other end."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass

from megatron_moetion.vault.entry import Entry, split_key


@dataclass(frozen=True)
class Sealed:
    """A frame of a local rank, or a header, is to be copied."""

    global_rank: int
    entry: Entry


@dataclass(frozen=True)
class Dropped:
    """A local rank needs nothing below an iteration any more."""

    global_rank: int
    below: int


@dataclass(frozen=True)
class Forgotten:
    """A frame that may have been copied before under the same key is not copied."""

    global_rank: int
    key: str


Item = Sealed | Dropped | Forgotten


class Backlog:
    """A queue, in order for each rank. It holds no bytes: a frame waits where its owner put it.

    One thread takes, any may put.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._items: deque[Item] = deque()
        self._closed = False

    def put(self, item: Item) -> bool:
        """Append; False when nobody takes any more."""
        with self._changed:
            if not self._closed:
                self._items.append(item)
                self._changed.notify()
            return not self._closed

    def take(self) -> Item:
        """Wait for the next item.

        Raises:
            EOFError: `close` was called.
        """
        with self._changed:
            self._changed.wait_for(lambda: bool(self._items) or self._closed)
            if not self._items:
                raise EOFError("closed")
            return self._items.popleft()

    def start_anew(self, global_rank: int) -> int:
        """Give up all frames of a rank that wait but the newest.

        A turn came too late, so the next ones would, too. A base needs consecutive frames: with
        every second one copied there would be none.

        Returns:
            How many were given up.
        """
        with self._changed:
            waiting = [
                item
                for item in self._items
                if isinstance(item, Sealed)
                and item.global_rank == global_rank
                and split_key(item.entry.key)[0] == "frame"
            ]
            late = {id(item) for item in waiting[:-1]}
            self._items = deque(
                Forgotten(global_rank, item.entry.key)
                if isinstance(item, Sealed) and id(item) in late
                else item
                for item in self._items
            )
            return len(late)

    def close(self) -> list[Item]:
        """Nobody takes any more; returns what was left."""
        with self._changed:
            self._closed = True
            self._changed.notify()
            left, self._items = list(self._items), deque()
            return left
