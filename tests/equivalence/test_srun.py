"""Workers that Slurm's srun starts: they find agents, which spill; the same command goes on.

Needs a cluster of two nodes that can be this host alone (`slurmd -N`): see slurm.conf(5), NodeName.
"""

import secrets
import shutil
import subprocess
from dataclasses import replace

import pytest

from .harness import Run, Runner, assert_same_bits, kills

SRUN = "tests.equivalence.srun"
SPILLS = ["--moetion", "--moetion-window", "3", "--moetion-spill-interval", "2"]


def idle_nodes() -> int:
    """Of the Slurm cluster that this host belongs to."""
    if shutil.which("sinfo") is None:
        return 0
    told = subprocess.run(
        ["sinfo", "--noheader", "--states", "idle", "--format", "%D"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return sum(map(int, told.stdout.split()))


@pytest.mark.skipif(idle_nodes() < 2, reason="no Slurm cluster of two idle nodes")
def test_under_srun_a_failure_ends_the_job_and_the_same_command_goes_on(
    runner: Runner, off: Run
) -> None:
    env = {"MOETION_SECRET": secrets.token_hex(16)}
    failing = [*SPILLS, *kills((3, 15, "backward:1"))]
    first = runner.run("srun", iterations=22, launcher=SRUN, env=env, flags=failing)
    assert first.code != 0
    ended = [line for line in first.log.splitlines() if "moetion-run: ending" in line]
    assert len(ended) == 1, first.tail()
    assert "rank 3 has ended, and its launcher starts no worker again" in ended[0]
    assert ended[0].endswith("the same command goes on from the spill of iteration 12")
    directory = first.directory.with_name("srun-again")
    shutil.copytree(first.directory, directory)
    again = runner.run("srun-again", iterations=22, launcher=SRUN, env=env, flags=SPILLS)
    assert again.code == 0, again.tail()
    both = replace(again, log=first.log + again.log)
    assert_same_bits(both, off, 22, lines_may_repeat=True)
