"""What happened when: append-only JSON lines, one file per process."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FOLDER = "events"


class EventLog:
    """Writes the events of one process. Each line is one write, so a kill tears none.

    Args:
        directory: the run's directory; None records nothing.
        name: who writes, for example "agent-0" or "rank-3".
    """

    def __init__(self, directory: Path | str | None, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._fd: int | None = None
        if directory is not None:
            folder = Path(directory) / FOLDER
            folder.mkdir(parents=True, exist_ok=True)
            # The pid keeps a replacement from appending to its predecessor's file.
            path = folder / f"{name}.{os.getpid()}.jsonl"
            self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)

    def emit(self, kind: str, **fields: Any) -> None:
        """Record an event.

        Args:
            kind: what happened, one word or dotted words.
            fields: JSON values; "time", "monotonic_ns", "who" and "kind" are taken.
        """
        if self._fd is None:
            return
        stamp = {"time": time.time(), "monotonic_ns": time.monotonic_ns()}
        record = {**stamp, "who": self._name, "kind": kind, **fields}
        line = json.dumps(record, separators=(",", ":")).encode() + b"\n"
        with self._lock:
            os.write(self._fd, line)

    def close(self) -> None:
        """Nothing may be emitted afterwards."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def read(directory: Path | str) -> list[dict[str, Any]]:
    """All events of a run, merged in order of wall time.

    Args:
        directory: as given to `EventLog`; one without events gives an empty list.

    Raises:
        ValueError: a line is not an event, naming file and line.
    """
    files = sorted((Path(directory) / FOLDER).glob("*.jsonl"))
    events = [event for file in files for event in _read_file(file)]
    return sorted(events, key=lambda event: event["time"])


def _read_file(file: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(file.read_text().splitlines(), start=1):
        try:
            event = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}:{number} is not an event: {error}") from None
        yield event
