"""What the agent counts, for metrics and for the last event of its log."""

from __future__ import annotations

import threading
from collections import Counter


class Counters:
    """Named numbers. Any thread may add."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._numbers: Counter[str] = Counter()

    def add(self, name: str, amount: int = 1) -> int:
        """Count something; returns the new number."""
        with self._changed:
            self._numbers[name] += amount
            self._changed.notify_all()
            return self._numbers[name]

    def reach(self, name: str, value: int) -> None:
        """Remember the largest value."""
        with self._changed:
            self._numbers[name] = max(self._numbers[name], value)

    def wait_for(self, name: str, number: int, seconds: float) -> bool:
        """Wait until something has been counted that often; False when it was not in time."""
        with self._changed:
            return self._changed.wait_for(lambda: self._numbers[name] >= number, seconds)

    def numbers(self) -> dict[str, int]:
        """All of them, now."""
        with self._changed:
            return dict(sorted(self._numbers.items()))
