"""Failures between two training steps: evaluating, saving, logging, loading data.

Also that everything reads as if nothing had happened, when the rank that writes died.
"""

import re
from pathlib import Path

import pytest

from .checkpoints import contents
from .harness import (
    CUTS,
    SABOTAGED,
    TORCHRUN,
    Run,
    Runner,
    assert_same_bits,
    kill_at_moments,
    kills,
)

ITERATIONS = 22
FLAGS = ["--log-interval", "4", "--eval-interval", "4", "--eval-iters", "2", "--save-interval", "7"]
"""An evaluation is six passes on each rank: two iterations of three microbatches."""
SAVED = [7, 14, 21, 22]
VALIDATION = re.compile(r"validation loss at (.*? lm loss PPL: \S+)")
WRITES = re.compile(r"saving checkpoint at iteration +(\d+)")
HAS_WRITTEN = re.compile(r"successfully saved checkpoint from iteration +(\d+)")
# Ranks 0 and 1 are the first stage. Rank 3 writes losses, rank 0 names the newest checkpoint. The
# first interlude of an evaluation is that parameters are gathered.
DEATHS = [
    # The second one in the second attempt.
    (3, 4, "evaluate:0"),
    (0, 4, "evaluate:5"),
    # Before the first file.
    (2, 7, "save:0"),
    (1, 8, "log"),
    (0, 9, "batch:2"),
    (2, 10, "log"),
    # All ranks are through, but for that one's saying so.
    (3, 12, "ended:1"),
    (3, 13, "batch:1"),
    # With all files there; then with the checkpoint named, too.
    (0, 14, "save:3"),
    (2, 14, "save:4"),
    (3, 20, "evaluate:3"),
    (0, 21, "ended:0"),
    (1, 22, "evaluate:4"),
]
MOMENTS: dict[int, tuple[tuple[int, ...], str, tuple[int, ...]]] = {
    16: ((1, 2), "", ()),
    20: ((), "gathered", (0,)),
}
"""{iteration behind whose log line the evaluation is: (who is killed then from outside, an event
that is waited for, who is killed at that)}.
"""
RECOVERED = [[3], [0], [2], [1], [0], [2], [3], [3], [0], [2], [1, 2], [0, 3], [0], [1]]
LOST = "corrupt:global_rank=3,iteration=20,at=capture"
"""Without that frame of a rank that dies everybody runs iteration 20 again, under the shard cut."""


def _kill_from_outside(directory: Path) -> None:
    kill_at_moments(directory, MOMENTS)


@pytest.fixture(scope="module")
def saved(runner: Runner) -> Path:
    """Where the runs of this module save, each in a folder of its own."""
    return runner.scratch / "between-saved"


@pytest.fixture(scope="module")
def plain(runner: Runner, saved: Path) -> Run:
    """A run without protection and without failures, with the same flags."""
    flags = [*FLAGS, "--save", str(saved / "plain")]
    run = runner.off("between-off", iterations=ITERATIONS, variant="overlap", flags=flags)
    assert run.code == 0, run.tail()
    assert len(run.lines) == 1 + ITERATIONS // 4
    assert len(VALIDATION.findall(run.log)) == ITERATIONS // 4 + 1
    return run


@pytest.fixture(scope="module", params=CUTS)
def killed(runner: Runner, saved: Path, request: pytest.FixtureRequest) -> Run:
    cut = request.param
    flags = ["--moetion", "--moetion-cut", cut, *FLAGS, "--save", str(saved / cut)]
    faults = ["--moetion-fault", f"{kills(*DEATHS)[1]};{LOST}"]
    return runner.run(
        f"between-{cut}", iterations=ITERATIONS, variant="overlap", flags=[*flags, *faults],
        meddle=_kill_from_outside,
    )  # fmt: skip


def test_what_is_interrupted_between_iterations_is_done_again_bit_for_bit(
    killed: Run, plain: Run
) -> None:
    assert killed.code == 0, killed.tail()
    assert_same_bits(killed, plain, ITERATIONS)
    assert VALIDATION.findall(killed.log) == VALIDATION.findall(plain.log)
    assert [e["recovered"] for e in killed.recoveries] == RECOVERED


def test_a_checkpoint_is_written_again_only_if_it_is_not_named_yet(
    killed: Run, plain: Run, saved: Path
) -> None:
    # Of 14 twice: not any more when rank 2 died.
    assert WRITES.findall(killed.log) == ["7", "7", "14", "14", "21", "22"]
    assert HAS_WRITTEN.findall(killed.log) == list(map(str, SAVED))
    folder = saved / killed.directory.name.removeprefix("between-")
    assert (folder / "latest_checkpointed_iteration.txt").read_text() == str(ITERATIONS)
    for iteration in SAVED:
        name = f"iter_{iteration:07d}"
        expected, found = contents(saved / "plain" / name), contents(folder / name)
        assert found.keys() == expected.keys()
        assert [n for n in expected if found[n] != expected[n]] == []


@pytest.mark.parametrize("killed", ["stage"], indirect=True)
def test_megatron_alone_goes_on_from_a_checkpoint_that_was_written_again(
    runner: Runner, plain: Run, killed: Run, saved: Path
) -> None:
    flags = [*FLAGS, "--load", str(saved / "stage"), "--ckpt-step", "14"]
    alone = runner.run(
        "between-loaded", iterations=ITERATIONS, variant="overlap", flags=flags, launcher=TORCHRUN
    )
    assert alone.code == 0, alone.tail()
    assert alone.records == {key: v for key, v in plain.records.items() if key[0] > 14}
    assert VALIDATION.findall(alone.log) == VALIDATION.findall(plain.log)[3:]


def test_validation_data_that_are_off_by_a_batch_are_seen(runner: Runner, plain: Run) -> None:
    run = runner.run(
        "between-control", iterations=8, variant="overlap", script=SABOTAGED,
        env={"MOETION_TEST_SABOTAGE": "late_validation"},
        flags=["--moetion", *FLAGS, *kills((3, 4, "ended:1"))],
    )  # fmt: skip
    assert run.code == 0, run.tail()
    assert [e["recovered"] for e in run.recoveries] == [[3]]
    first, second, *_ = zip(
        VALIDATION.findall(run.log), VALIDATION.findall(plain.log), strict=False
    )
    assert first[0] == first[1]
    assert second[0] != second[1]
