"""What a job begins anew from, and that there is an end to it; an agent begins again in place of
itself.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_moetion.agent.escalation import Tier, Tried
from megatron_moetion.agent.fallback import (
    AFRESH,
    BEGUN_AFRESH,
    VARIABLE,
    Begun,
    FallBack,
    Limit,
    Source,
    Stored,
    inherited,
    next_source,
    way_on,
)
from tests.stub_jobs import finish, launch_plain, protected

PROGRAM = """
import os, sys
from megatron_moetion.agent.fallback import FallBack, Limit, Source, begin_again, inherited
before = inherited()
print(os.getpid(), sys.argv[1:], before, flush=True)
if before is None:
    begin_again(FallBack(Limit(Source(12, True), Source(14, False)), (0, 3)))
"""


def spill(iteration: int) -> Source:
    return Source(iteration, True)


def checkpoint(iteration: int) -> Source:
    return Source(iteration, False)


CASES: dict[str, tuple[Begun, Stored, int | None, Tier, bool, Source | None]] = {
    # What it began from, what is on disk, its newest spill, the first tier, distrusted; what next.
    "nothing": (BEGUN_AFRESH, Stored(), None, Tier.SPILL, False, None),
    "a spill": (BEGUN_AFRESH, Stored(), 6, Tier.SPILL, False, spill(6)),
    "the newer of both": (BEGUN_AFRESH, Stored((6,), 7), 6, Tier.SPILL, False, checkpoint(7)),
    "a spill as new as the checkpoint": (
        BEGUN_AFRESH, Stored((6,), 6), 6, Tier.SPILL, False, spill(6),
    ),
    "a checkpoint without spills": (
        BEGUN_AFRESH, Stored((), 5), None, Tier.SPILL, False, checkpoint(5),
    ),
    "no spill where that has not helped": (
        BEGUN_AFRESH, Stored((6,), 5), 6, Tier.CHECKPOINT, False, checkpoint(5),
    ),
    "from a spill to an older checkpoint": (
        Begun(spill(6), spill(6)), Stored((6, 3), 2), None, Tier.SPILL, False, checkpoint(2),
    ),
    "from a spill to a checkpoint of the same iteration": (
        Begun(spill(6), spill(6)), Stored((6, 3), 6), None, Tier.SPILL, False, checkpoint(6),
    ),
    "not once more from the same checkpoint": (
        Begun(checkpoint(6), checkpoint(6)), Stored((), 6), None, Tier.SPILL, False, None,
    ),
    "from a checkpoint to one that was saved since": (
        Begun(checkpoint(6), checkpoint(6)), Stored((), 8), None, Tier.SPILL, False, checkpoint(8),
    ),
    "not from a checkpoint that a user began with to the spills of a run before": (
        Begun(checkpoint(9), checkpoint(9)), Stored((6, 3), 9), None, Tier.SPILL, False, None,
    ),
    "an older spill where what came of the newest was rejected": (
        Begun(spill(6), spill(6)), Stored((6, 3), None), None, Tier.SPILL, True, spill(3),
    ),
    "a checkpoint that is newer than that": (
        Begun(spill(6), spill(6)), Stored((6, 3), 4), None, Tier.SPILL, True, checkpoint(4),
    ),
    "not back to where it was rejected before, though made again": (
        Begun(spill(6), spill(3)), Stored((6, 3), 6), 6, Tier.SPILL, True, None,
    ),
    "further than ever": (
        Begun(spill(6), checkpoint(3)), Stored((9, 6), 3), 9, Tier.SPILL, False, spill(9),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_what_a_job_begins_anew_from(name: str) -> None:
    begun, stored, spilled, tier, distrusted, expected = CASES[name]
    assert next_source(begun, stored, spilled, tier, distrusted) == expected


SOURCES = st.builds(Source, st.integers(1, 4), st.booleans())


@given(st.lists(st.frozensets(SOURCES), max_size=100))
def test_without_progress_there_is_an_end_whatever_there_is_to_begin_from(
    offers: list[frozenset[Source]],
) -> None:
    begun, taken = BEGUN_AFRESH, [AFRESH]
    for offered in offers:
        source = begun.next(offered)
        if source is None:
            continue
        assert source > max(taken) or source < taken[-1]
        begun = Begun(max(begun.highest, source), source)
        taken.append(source)
    # Of eight, each can be the newest once, and then it goes back through those below.
    assert len(taken) - 1 <= 8 * 9 // 2


def test_all_begin_from_what_was_chosen_or_worse_or_from_a_checkpoint_that_came_between() -> None:
    limit = Limit(spill(6), spill(8))
    allowed = {
        kind(n) for n in range(1, 10) for kind in (spill, checkpoint) if limit.allows(kind(n))
    }
    assert allowed == {kind(n) for n in range(1, 7) for kind in (spill, checkpoint)} | {
        checkpoint(9)
    }


def test_each_is_a_tier_and_said_in_words() -> None:
    assert (spill(6).tier, checkpoint(6).tier) == (Tier.SPILL, Tier.CHECKPOINT)
    assert way_on(spill(6), True) == "; the same command goes on from the spill of iteration 6"
    going = "; the same command goes on from the Megatron checkpoint of iteration 6"
    assert way_on(checkpoint(6), True) == going
    assert way_on(None, True) == "; restart from a Megatron checkpoint with --load, or afresh"
    assert way_on(None, False) == ""


def test_it_is_the_same_process_with_the_same_command_line() -> None:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, "a", "b c"],
        capture_output=True, text=True, env=env, check=True,
    )  # fmt: skip
    first, second = done.stdout.splitlines()
    pid = first.partition(" ")[0]
    assert first == f"{pid} ['a', 'b c'] None"
    told = FallBack(Limit(spill(12), checkpoint(14)), (0, 3))
    assert second == f"{pid} ['a', 'b c'] {told}"


def test_no_child_sees_why(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = Tried((1.0,), ((Tier.MEMORY, 2.0),))
    told = FallBack(Limit(checkpoint(6), spill(8)), (1,), 2, tried, distrusted=True)
    monkeypatch.setenv(VARIABLE, json.dumps(told.to_json()))
    assert inherited() == told
    assert VARIABLE not in os.environ


SAVING = str(Path(__file__).with_name("saving_worker.py"))


@pytest.mark.multirank
def test_without_spills_a_job_goes_down_to_the_checkpoint_once_and_then_ends(
    tmp_path: Path,
) -> None:
    # Each tier has a budget of one recovery; the fifth and the sixth are behind the last one.
    deaths = [f"1:{at}" for at in (3, 5, 7, 9, 11, 13)]
    script = [*protected(tmp_path, *deaths, iterations=20), "--moetion-restart-budget", "1/3600"]
    loads = ["--load", str(tmp_path), "--save-at", "6"]
    argv = ["--nproc-per-node", "2", SAVING, *loads]
    outcome = finish([launch_plain([*argv, *script])], tmp_path)
    assert outcome.codes == [137], outcome.errors
    assert [e["tier"] for e in outcome.of("escalated")] == ["memory restart", "spill"]
    (fell_back,) = outcome.of("fell-back")
    told = [fell_back[name] for name in ("tier", "iteration", "committed")]
    assert told == ["Megatron checkpoint", 6, 8]
    assert [e["iteration"] for e in outcome.of("loaded")] == [6, 6]
    # What was injected before is not injected again.
    assert [e["place"] for e in outcome.of("dying")] == ["3", "5", "7", "9", "11", "13"]
    reason = "more than 1 recoveries within 3600 s (--moetion-restart-budget 1/3600)"
    # A worker that is told of the end where it expects something else says so with a traceback.
    ours = [line for line in outcome.errors.splitlines() if line.startswith("moetion-run: ")]
    said = [line for line in ours if reason in line]
    assert [line.partition(reason)[2] for line in said] == [
        "; memory restart: all workers start anew from what memory holds: ranks [0] are killed, and"
        " a new round begins",
        "; iterations 7 to 8 are run again; all workers start anew from the Megatron checkpoint of"
        " iteration 6",
        "; tried: 3 localized recoveries, memory restart, Megatron checkpoint; restart from a"
        " Megatron checkpoint with --load, or afresh",
    ]
    assert said[-1].startswith("moetion-run: ending the job: ")
    assert "moetion-run: --load of iteration 6" in outcome.errors
