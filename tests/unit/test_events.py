"""Events of several processes are read back as one timeline."""

import json
from pathlib import Path

import pytest

from megatron_moetion.events import EventLog, read


def test_events_of_two_writers_are_merged_in_time_order(tmp_path: Path) -> None:
    first, second = EventLog(tmp_path, "rank-0"), EventLog(tmp_path, "agent-0")
    first.emit("a", iteration=1)
    second.emit("b")
    first.emit("c")
    events = read(tmp_path)
    assert [(event["who"], event["kind"]) for event in events] == [
        ("rank-0", "a"),
        ("agent-0", "b"),
        ("rank-0", "c"),
    ]
    assert events[0]["iteration"] == 1
    assert events[0]["monotonic_ns"] <= events[2]["monotonic_ns"]


def test_no_directory_records_nothing(tmp_path: Path) -> None:
    log = EventLog(None, "rank-0")
    log.emit("a")
    log.close()
    assert read(tmp_path) == []


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    EventLog(tmp_path, "x").emit("a")
    (file,) = (tmp_path / "events").iterdir()
    file.write_text(json.dumps({"time": 0}) + "\n{torn\n")
    with pytest.raises(ValueError, match=r":2 is not an event"):
        read(tmp_path)
