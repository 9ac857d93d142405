"""What waits to be copied: in order, and begun anew when a turn came too late."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_moetion.agent.backlog import Backlog, Dropped, Forgotten, Sealed
from megatron_moetion.vault.entry import Entry


def sealed(global_rank: int, iteration: int) -> Sealed:
    return Sealed(global_rank, Entry(f"frame/{iteration}/x", 0, 0, 1, "0", {}))


def test_items_are_taken_in_order() -> None:
    backlog = Backlog()
    items = [sealed(0, 1), Dropped(0, 1), sealed(1, 1)]
    assert all(backlog.put(item) for item in items)
    assert [backlog.take() for _ in items] == items


def test_after_a_late_turn_only_the_newest_frame_of_that_rank_is_still_copied() -> None:
    backlog = Backlog()
    for item in (sealed(0, 1), sealed(1, 1), Dropped(0, 1), sealed(0, 2), sealed(0, 3)):
        backlog.put(item)
    assert backlog.start_anew(0) == 2
    assert [backlog.take() for _ in range(5)] == [
        Forgotten(0, "frame/1/x"),
        sealed(1, 1),
        Dropped(0, 1),
        Forgotten(0, "frame/2/x"),
        sealed(0, 3),
    ]
    assert backlog.start_anew(0) == 0


def test_a_closed_backlog_hands_back_what_waited_and_takes_nothing_more() -> None:
    backlog = Backlog()
    backlog.put(sealed(0, 1))
    assert backlog.close() == [sealed(0, 1)]
    assert not backlog.put(sealed(0, 2))
    assert backlog.close() == []
    with pytest.raises(EOFError):
        backlog.take()


def test_a_header_is_not_given_up_with_the_frames_that_are_late() -> None:
    backlog = Backlog()
    header = Sealed(0, replace(sealed(0, 2).entry, key="header/2/start"))
    for item in (sealed(0, 1), header, sealed(0, 2)):
        backlog.put(item)
    assert backlog.start_anew(0) == 1
    assert backlog.close()[1:] == [header, sealed(0, 2)]


def runs(share: float, kept: int, num_frames: int) -> list[list[int]]:
    """Consecutive frames that are copied when a network carries `share` frames per iteration and
    an owner keeps its newest `kept`.
    """
    backlog, found, free_at = Backlog(), [[]], 0.0
    queued = 0
    for now in range(num_frames):
        backlog.put(sealed(0, now))
        queued += 1
        while queued and free_at < now + 1:
            item = backlog.take()
            queued -= 1
            begin = max(free_at, float(now))
            if isinstance(item, Forgotten):
                continue
            assert isinstance(item, Sealed)
            iteration = int(item.entry.key.split("/")[1])
            if begin + 1 / share > iteration + kept:
                backlog.start_anew(0)
                found.append([])
                continue
            free_at = begin + 1 / share
            found[-1].append(iteration)
    return [run for run in found if run]


def test_half_a_network_still_copies_whole_windows() -> None:
    window = 4
    complete = [run for run in runs(0.5, window + 3, 60) if len(run) >= window]
    assert len(complete) >= 4
    for run in runs(0.5, window + 3, 60):
        assert run == list(range(run[0], run[0] + len(run)))
