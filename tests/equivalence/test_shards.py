"""The shard cut: state is rebuilt from the updates that were made to it, and nothing is replayed.

Wherever a test says what goes for both cuts, it is run with both, in the other files.
"""

import re
from pathlib import Path

import pytest

from megatron_moetion import digest

from .harness import Run, Runner, assert_same_bits, assert_within_claim, kills
from .noisy_pretrain import REBUILT
from .test_identity import BOTH_STAGES, PLACES, everywhere

NOISY = Path(__file__).with_name("noisy_pretrain.py")
WINDOW = 4
# Frames are counted here, and a new order of experts would make one more.
STEADY = ["--moetion-window", str(WINDOW), "--moetion-popularity", "none"]
SHARD = ["--moetion", "--moetion-cut", "shard", *STEADY]
UPDATED_BEFORE = ("optimizer", "param-gather", "capture")
"""Places of a kill behind which the dead rank's last frame lacks, so that its update is lost."""

AGENT_MAY_GROW_BYTES = 16 << 20
"""In 16 recoveries: what allocators keep. Frames, logs and sockets are counted exactly."""


@pytest.fixture(scope="module")
def killed(runner: Runner) -> Run:
    """Kills at every place on both stages."""
    flags = [*SHARD, *kills(*everywhere())]
    run = runner.run("shards", iterations=BOTH_STAGES, flags=flags, afresh=True)
    assert run.code == 0, run.tail()
    return run


def test_a_kill_at_any_place_on_either_stage_is_recovered_bit_for_bit(
    killed: Run, off: Run
) -> None:
    assert_same_bits(killed, off, BOTH_STAGES)
    assert_within_claim(killed)
    assert [e["recovered"] for e in killed.recoveries] == [[r] for r, *_ in everywhere()]


def test_only_what_the_dead_rank_had_not_captured_is_run_again(killed: Run) -> None:
    went = killed.events("went-back")
    for epoch, (rank, iteration, place) in enumerate(everywhere(), start=1):
        here = {e["who"]: e for e in went if e["epoch"] == epoch}
        assert len(here) == 4
        lost = place in UPDATED_BEFORE
        at = iteration if place == "end" else iteration - 1
        assert {e["iteration"] for e in here.values()} == {at}, (place, here)
        rebuilt = {who for who, e in here.items() if e["base"] is not None}
        # If an update is lost, everybody makes it undone, from its own frames.
        assert rebuilt == (set(here) if lost else {f"rank{rank}"}), (place, here)
        assert all(at - here[who]["base"] < WINDOW for who in rebuilt)


HELD = [
    # Who is killed behind the end of the training step, and who is where in the same one. Gathers
    # in the update would keep everybody in it, so they are overlapped with the next forward pass;
    # and whoever tells the loss of the last stage needs all of it, so the first one is killed.
    (8, (0, "end"), (3, "commit"), (1, "optimizer")),
    (16, (1, "end"), (2, "commit"), (0, "capture")),
    (24, (1, "end"), (2, "capture")),
    (32, (0, "end"), (1, "commit"), (3, "optimizer")),
]
OVERLAPPED = ["--overlap-grad-reduce", "--overlap-param-gather"]


def test_nothing_is_lost_where_others_are_still_in_the_update_that_was_captured(
    runner: Runner,
) -> None:
    reference = runner.run("shards-held-off", iterations=40, flags=OVERLAPPED)
    script = [
        f"{kind}:global_rank={rank},iteration={iteration},at={place}"
        for iteration, killed, *held in HELD
        for kind, (rank, place) in (("kill", killed), *(("hold", h) for h in held))
    ]
    flags = [*SHARD, *OVERLAPPED, "--moetion-fault", ";".join(script)]
    run = runner.run("shards-held", iterations=40, flags=flags)
    assert run.code == 0, run.tail()
    assert_same_bits(run, reference, 40)
    fired = [e["fault"] for e in run.events("fault")]
    assert len(fired) == len(script), fired
    assert [e["recovered"] for e in run.recoveries] == [[rank] for _, (rank, _), *_ in HELD]
    for epoch, (iteration, (rank, _), *_) in enumerate(HELD, start=1):
        here = {e["who"]: e for e in run.events("went-back") if e["epoch"] == epoch}
        assert {e["iteration"] for e in here.values()} == {iteration}
        assert {who for who, e in here.items() if e["base"] is not None} == {f"rank{rank}"}


def test_sixteen_recoveries_leave_no_thread_connection_or_file_behind(killed: Run) -> None:
    counts: dict[str, list[tuple[int, ...]]] = {}
    for e in killed.events("holds"):
        if e.get("left_alone"):
            # A call that gloo forgot keeps its groups until their timeout.
            continue
        # Chunks of arenas are files, mapped as they are used; `assert_within_claim` bounds them.
        files = e["files"] - e["memfds"]
        here = (e["threads"], e["children"], e["sockets"], files)
        counts.setdefault(e["who"], []).append(here)
    assert set(counts) == {"agent-0", "rank0", "rank1", "rank2", "rank3"}
    told = counts.pop("agent-0")
    assert {who: here for who, here in counts.items() if len(set(here)) != 1} == {}
    # An agent tells when all are to go on; some ranks have let go of what was before by then.
    half = len(told) // 2
    before, after = (
        tuple(map(max, zip(*part, strict=True))) for part in (told[:half], told[half:])
    )
    assert all(b <= a for a, b in zip(before, after, strict=True)), told
    agent = [e for e in killed.events("holds") if e["who"] == "agent-0"]
    assert len(agent) == len(killed.recoveries) == 2 * len(PLACES)
    # A process reads what it maps from the agent, which holds all there is.
    assert max(e["memfds"] for e in killed.events("holds")) <= agent[-1]["memfds"]
    assert agent[-1]["resident_bytes"] - agent[1]["resident_bytes"] < AGENT_MAY_GROW_BYTES


def test_nothing_that_crosses_stages_is_logged_and_frames_are_what_the_formula_says(
    killed: Run, runner: Runner
) -> None:
    run = runner.run("shards-bytes", iterations=40, flags=SHARD)
    assert run.code == 0, run.tail()
    (numbers,) = run.events("counted")
    assert "boundary entries" not in numbers
    # Ranks 0 and 2 tell what they own, 12 bytes for each parameter; their peers have as much.
    full = [int(n) for n in re.findall(r"^\w+ +\d+ +\d+ +(\d+) +\d+$", run.log, re.MULTILINE)]
    assert len(full) > 4, run.tail()
    parameters = 2 * sum(full) / 12
    # In the frame of the starting state there are no moments yet.
    captured = numbers["captured bytes"] - 4 * parameters
    expected = 40 * parameters * (12 / WINDOW + 4 * (WINDOW - 1) / WINDOW)
    assert abs(captured / expected - 1) < 0.02, (captured, expected)


def rebuilt(run: Run) -> dict[tuple[int, int], dict[str, str]]:
    return digest.read(run.directory / REBUILT)


def test_a_forward_pass_that_cannot_be_repeated_is_no_obstacle(runner: Runner) -> None:
    failures = kills((3, 8, "backward:1"), (0, 14, "optimizer"), (1, 20, "end"))
    run = runner.run("noisy", iterations=25, script=NOISY, flags=[*SHARD, *failures])
    assert run.code == 0, run.tail()
    assert len(run.recoveries) == 3
    found = rebuilt(run)
    assert {iteration for iteration, _ in found} == {7, 13, 20}
    assert len(found) == 3 * 4
    for key, hashes in found.items():
        # What the rank that died had then, and what the others have had all the time.
        recorded = run.records.get(key)
        if recorded is None:
            # It died before it could say.
            assert key == (20, 1)
            continue
        assert hashes == {n: bits for n, bits in recorded.items() if not n.startswith("loss")}, key


def test_but_the_stage_cut_says_that_it_cannot_be_replayed(runner: Runner) -> None:
    flags = ["--moetion", "--moetion-window", str(WINDOW), *kills((3, 8, "backward:1"))]
    run = runner.run("noisy-stage", iterations=25, script=NOISY, flags=flags)
    assert run.code != 0
    assert "gave other bits than training" in run.log
