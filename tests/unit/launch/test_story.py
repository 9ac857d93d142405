"""What the demo concludes from events."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from megatron_moetion.digest import Comparison, Difference

PATH = Path(__file__).parents[3] / "launch" / "demo" / "story.py"
_spec = importlib.util.spec_from_file_location("demo_story", PATH)
story = importlib.util.module_from_spec(_spec)
# Data classes look their own module up while they are made.
sys.modules["demo_story"] = story
_spec.loader.exec_module(story)

EQUAL = Comparison(records=72, tensors=8046, difference=None)
SURVIVORS = {0: 10, 1: 11, 2: 12}


def event(ms, who, kind, **fields):
    return {"time": ms / 1e3, "monotonic_ns": int(ms * 1e6), "who": who, "kind": kind, **fields}


def recovery():
    plan = "epoch 1, committed 7, dead [3]: stage 1: base 4, replay 5..6"
    found = [
        event(1000, "rank3", "fault", iteration=8),
        event(1002, "agent-0", "exited", global_rank=3, code=137, pid=13),
        event(1003, "agent-0", "detected", epoch=1, code=137, global_rank=3),
        event(1004, "agent-0", "started", start="warm", pid=14),
        event(1005, "agent-0", "planned", committed=7),
        event(1010, "agent-0", "quiesced"),
    ]
    for rank, late in ((2, 0), (3, 5)):
        found += [
            event(1020 + late, f"rank{rank}", "planned", plan=plan),
            event(1030 + late, f"rank{rank}", "regrouped"),
            event(1040 + late, f"rank{rank}", "restored", base=4),
            event(1050 + late, f"rank{rank}", "replayed", iteration=5),
            event(1060 + late, f"rank{rank}", "replayed", iteration=6),
        ]
    # Stage 0 has nothing to load; its regrouping may end after stage 1 is restored.
    found += [event(1062, f"rank{rank}", "regrouped") for rank in (0, 1)]
    found.append(event(1070, "agent-0", "resumed"))
    pids = {0: 10, 1: 11, 2: 12, 3: 14}
    found += [
        event(2000, "agent-0", "exited", global_rank=rank, code=0, pid=pid)
        for rank, pid in pids.items()
    ]
    return sorted(found, key=lambda e: e["time"])


def written(directory, events):
    """The events as the processes of a run leave them on disk."""
    folder = directory / "events"
    folder.mkdir()
    pids = {"agent-0": 1, "rank0": 10, "rank1": 11, "rank2": 12}
    for found in events:
        pid = pids.get(found["who"]) or (13 if found["kind"] == "fault" else 14)
        with (folder / f"{found['who']}.{pid}.jsonl").open("a") as file:
            file.write(json.dumps(found) + "\n")
    return directory


def test_the_timeline_ends_each_phase_with_the_last_rank_of_the_failed_stage():
    rows = story.timeline(recovery())
    assert [row.what for row in rows] == [
        *("fault", "detected", "committed", "booted", "planned"),
        *("regrouped", "restored", "replayed", "resumed"),
    ]
    assert [round(row.at_ms) for row in rows] == [0, 3, 5, 10, 25, 35, 45, 65, 70]
    assert rows[4].detail == "stage 1: base 4, replay 5..6"


def test_an_incomplete_recovery_is_said_to_be_one():
    events = [e for e in recovery() if e["kind"] != "restored"]
    with pytest.raises(story.NoRecovery, match="'restored'"):
        story.timeline(events)


def test_replays_are_counted_and_pids_compared(tmp_path):
    after = story.aftermath(written(tmp_path, recovery()), world_size=4)
    assert after == story.Aftermath({0: 0, 1: 0, 2: 2, 3: 2}, SURVIVORS, (3,))


def test_a_survivor_that_ended_as_another_process_is_no_survivor(tmp_path):
    events = recovery()
    for found in events:
        if found["kind"] == "exited" and found["pid"] == 10:
            found["pid"] = 99
    after = story.aftermath(written(tmp_path, events), world_size=4)
    assert after.replaced == (0, 3)


def judged(comparison=EQUAL, replayed=None, survivors=None, replaced=(3,)):
    counts = replayed or {0: 0, 1: 0, 2: 2, 3: 2}
    after = story.Aftermath(counts, survivors or SURVIVORS, replaced)
    return story.verdict(comparison, after, num_records=72, failed_rank=3, stage_size=2)


def test_the_good_verdict_says_who_replayed_and_who_lived():
    found = judged()
    assert found.good
    assert found.text == (
        "VERDICT: bit-identical (8046 hashes over 72 digests agree); "
        "stage 0 replayed 0 iterations, stage 1 replayed 2 iterations; "
        "survivors' PIDs unchanged (rank 0: 10, rank 1: 11, rank 2: 12)"
    )


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"comparison": Comparison(72, 5, Difference(9, 2, "x main"))}, "global rank 2: x main"),
        ({"comparison": Comparison(71, 8000, None)}, "71 digests were recorded instead of 72"),
        ({"replayed": {0: 1, 1: 1, 2: 2, 3: 2}}, "stage 0 replayed too"),
        ({"replayed": {0: 0, 1: 0, 2: 1, 3: 2}}, "ranks of stage 1 replayed differently"),
        ({"replaced": ()}, "global ranks [] were replaced, not just 3"),
        ({"replaced": (0, 3)}, "global ranks [0, 3] were replaced"),
    ],
)
def test_everything_else_is_no_good_verdict(changes, text):
    found = judged(**changes)
    assert not found.good
    assert text in found.text
    assert found.text.startswith("VERDICT: NOT")
