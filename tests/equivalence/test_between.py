"""Failures between two training steps: evaluating, saving, logging, loading data."""

import re
from pathlib import Path

import pytest

from megatron_moetion.events import FOLDER

from .harness import CUTS, Run, Runner, assert_same_bits, follow, kill_workers, kills

ITERATIONS = 22
FURTHER = 28
EVALUATION = ["--eval-interval", "4", "--eval-iters", "2"]
"""Eight passes on each rank: two iterations of four microbatches."""
VALIDATION = re.compile(r"validation loss at (.*? lm loss PPL: \S+)")
SAVING = re.compile(r"saving checkpoint at iteration +(\d+)")
SAVED = re.compile(r"successfully saved checkpoint from iteration +(\d+)")
# Ranks 0 and 1 are the first stage; rank 0 names the newest checkpoint, rank 3 prints losses.
DEATHS = [
    # The second one in the second attempt.
    (3, 4, "evaluate:0"),
    (0, 4, "evaluate:5"),
    (1, 6, "log"),
    # Before the first file.
    (2, 7, "save:0"),
    (0, 9, "batch:2"),
    # All ranks are through, but for that one's saying so.
    (3, 12, "ended:1"),
    (2, 13, "batch:1"),
    # With all files there; then with the file that names the checkpoint there, too.
    (0, 14, "save:3"),
    (2, 14, "save:4"),
    (1, 16, "evaluate:2"),
    (2, 16, "evaluate:2"),
    # Rank 0 is killed while the others recover from this one.
    (3, 20, "evaluate:3"),
    (0, 21, "ended:0"),
    (1, 22, "evaluate:4"),
]
LOST = ["corrupt:global_rank=3,iteration=20,at=capture"]
"""With that frame, what rank 3 had of iteration 20: under the shard cut everybody runs it again."""


def _flags(directory: Path) -> list[str]:
    return [*EVALUATION, "--save", str(directory), "--save-interval", "7"]


def _kill_another(directory: Path) -> None:
    """Rank 0, while the others recover from the death of rank 3 in the evaluation after 20."""
    next(line for line in follow(directory / "log") if f" iteration {20:8d}/" in line)
    (agent,) = (directory / FOLDER).glob("agent-*")
    next(line for line in follow(agent, after=agent.stat().st_size) if '"gathered"' in line)
    kill_workers(directory, (0,))


@pytest.fixture(scope="module")
def plain(runner: Runner, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run without protection and without failures, with the same flags."""
    saved = tmp_path_factory.mktemp("plain")
    run = runner.off("between-off", iterations=ITERATIONS, variant="overlap", flags=_flags(saved))
    assert run.code == 0, run.tail()
    return run


@pytest.mark.parametrize("cut", CUTS)
def test_what_is_interrupted_between_iterations_is_done_again_bit_for_bit(
    runner: Runner, plain: Run, cut: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    saved = tmp_path_factory.mktemp(cut) / "saved"
    flags = ["--moetion", "--moetion-cut", cut, *_flags(saved), *kills(*DEATHS)]
    run = runner.run(
        f"between-{cut}", iterations=ITERATIONS, variant="overlap", flags=flags,
        meddle=_kill_another,
    )  # fmt: skip
    assert run.code == 0, run.tail()
    assert_same_bits(run, plain, ITERATIONS)
    losses = VALIDATION.findall(plain.log)
    assert len(losses) == ITERATIONS // 4 + 1
    assert VALIDATION.findall(run.log) == losses
