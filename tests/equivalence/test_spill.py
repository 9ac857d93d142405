"""Everything is killed, agents too; the same command goes on from a spill, bit for bit."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_moetion import events
from megatron_moetion.vault.spill import FOLDER, iteration_of

from .harness import (
    TORCHRUN,
    Run,
    Runner,
    assert_same_bits,
    assert_within_claim,
    follow,
    kill_workers,
)

SPILLS = ["--moetion", "--moetion-window", "3", "--moetion-spill-interval", "2"]
"""A spill every 6 iterations."""
ITERATIONS = 22
KILLED_AFTER = 12


def agents(directory: Path) -> dict[str, int]:
    """Process ids of agents, which are the launchers, by name."""
    files = (directory / events.FOLDER).glob("agent-*")
    return {file.name.split(".")[0]: int(file.name.split(".")[1]) for file in files}


def kill_everything(directory: Path) -> None:
    """SIGKILL the agents and all workers."""
    started = {e["pid"] for e in events.read(directory) if e["kind"] == "started"}
    for pid in {*agents(directory).values(), *started}:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            # The kernel ends a worker with its agent.
            continue


def at_event(kind: str, then: Callable[[Path], None], **fields: int) -> Callable[[Path], None]:
    """Meddles when the leader records an event."""
    wanted = [f'"kind":"{kind}"', *(f'"{name}":{value},' for name, value in fields.items())]

    def meddle(directory: Path) -> None:
        # When the memory is granted, the agents' logs are there.
        next(line for line in follow(directory / "log") if "this node" in line)
        (leader,) = (directory / events.FOLDER).glob("agent-0.*")
        if any(all(text in line for text in wanted) for line in follow(leader)):
            then(directory)

    return meddle


def spills(directory: Path) -> list[int]:
    return sorted(iteration_of(path.name) for path in (directory / FOLDER).glob("*-*"))


@pytest.fixture(scope="module")
def killed(runner: Runner) -> Run:
    """A run that was killed with all its agents once the spill of iteration 12 was valid."""
    meddle = at_event("spilled", kill_everything, iteration=KILLED_AFTER)
    run = runner.run("spill", iterations=ITERATIONS, flags=SPILLS, meddle=meddle)
    assert run.code == -signal.SIGKILL, run.tail()
    assert spills(run.directory)[-2:] == [6, 12]
    return run


def again(runner: Runner, before: Run, name: str, **options: Any) -> Run:
    """The same command in a copy of the directory; records and log lines are those of both runs."""
    directory = before.directory.with_name(name)
    shutil.copytree(before.directory, directory)
    # The copy's events and log are the second run's own.
    shutil.rmtree(directory / events.FOLDER)
    (directory / "log").unlink()
    flags = [*SPILLS, *options.pop("flags", [])]
    return runner.run(name, iterations=ITERATIONS, flags=flags, **options)


def assert_goes_on(before: Run, after: Run, off: Run, iteration: int) -> None:
    assert after.code == 0, after.tail()
    assert f"moetion-run: starting from the spill of iteration {iteration} in" in after.log
    assert [int(line[0]) for line in after.lines] == [*range(iteration + 1, ITERATIONS + 1)]
    both = replace(after, log=before.log + after.log)
    assert_same_bits(both, off, ITERATIONS, lines_may_repeat=True)
    assert [e["recovered"] for e in after.recoveries] == [[0, 1, 2, 3]]


def test_a_cold_start_goes_on_bit_for_bit(runner: Runner, off: Run, killed: Run) -> None:
    run = again(runner, killed, "spill-again")
    assert_goes_on(killed, run, off, 12)
    assert_within_claim(run)
    assert spills(run.directory) == [12, 18]


def damage(directory: Path, iteration: int) -> Path:
    (spilled,) = (directory / FOLDER).glob(f"{iteration:010d}-*")
    path = spilled / "rank2.safetensors"
    content = bytearray(path.read_bytes())
    content[-1000] ^= 1
    path.write_bytes(content)
    return path


def take_the_folder_away(directory: Path) -> None:
    (directory / FOLDER).rename(directory / "spills-so-far")
    (directory / FOLDER).touch()


def test_a_damaged_spill_is_named_and_one_that_cannot_be_written_costs_a_warning(
    runner: Runner, off: Run, killed: Run
) -> None:
    before = Run(killed.directory.with_name("spill-damaged-before"), killed.code, killed.log)
    shutil.copytree(killed.directory, before.directory)
    path = damage(before.directory, KILLED_AFTER)
    meddle = at_event("cold-start", take_the_folder_away)
    run = again(runner, before, "spill-damaged", meddle=meddle)
    assert f"{path.parent.name}/{path.name}: " in run.log
    assert "does not match its checksum" in run.log
    assert_goes_on(killed, run, off, 6)
    failed = [e["iteration"] for e in run.events("spill-failed")]
    assert failed == [12, 18]
    warnings = [line for line in run.log.splitlines() if "moetion-run: warning" in line]
    assert len(warnings) == 1, warnings
    assert "no spill of iteration 12: node 0: " in warnings[0]
    assert [p.name[:10] for p in sorted((run.directory / "spills-so-far").iterdir())] == [
        "0000000006",
        "0000000012",
    ]


def test_two_agents_go_on_together(runner: Runner, off: Run) -> None:
    meddle = at_event("spilled", kill_everything, iteration=KILLED_AFTER)
    first = runner.run("spill-nodes", iterations=ITERATIONS, flags=SPILLS, nodes=2, meddle=meddle)
    assert first.code == -signal.SIGKILL, first.tail()
    assert_goes_on(first, again(runner, first, "spill-nodes-again", nodes=2), off, 12)


def wait_for_line(directory: Path, iteration: int) -> None:
    wanted = f" iteration {iteration:8d}/"
    next(line for line in follow(directory / "log") if wanted in line)


def test_what_cannot_be_rebuilt_in_memory_starts_anew_from_a_spill_until_none_is_sound(
    runner: Runner, off: Run
) -> None:
    # Of any three frames in a row one is damaged, but for those of the first spill, and for those
    # of iteration 12 when they come again: each fault fires once.
    faults = [f"corrupt:global_rank=3,iteration={i},at=capture" for i in range(8, 41, 3)]

    def meddle(directory: Path) -> None:
        at_event("spilled", lambda _: wait_for_line(directory, 12), iteration=6)(directory)
        kill_workers(directory, (3,))
        at_event("spilled", lambda _: wait_for_line(directory, 19), iteration=12)(directory)
        for iteration in (6, 12):
            damage(directory, iteration)
        kill_workers(directory, (3,))

    flags = [*SPILLS, "--moetion-popularity", "none", "--moetion-fault", ";".join(faults)]
    run = runner.run("spill-chain", iterations=40, nodes=2, flags=flags, meddle=meddle)
    assert_same_bits(run, off, 19, lines_may_repeat=True)
    assert [e["iteration"] for e in run.events("fell-back")] == [6, 12]
    for iteration in (6, 12):
        anew = f"; all workers start anew from the spill of iteration {iteration}"
        (line,) = (line for line in run.log.splitlines() if line.endswith(anew))
        assert "cannot be rebuilt" in line
    assert "moetion-run: starting from the spill of iteration 6 in" in run.log
    assert [e["recovered"] for e in run.recoveries] == [[0, 1, 2, 3]]
    # Both spills were damaged, and each agent says why it ends.
    assert run.code == 1, run.tail()
    assert run.log.count("does not match its checksum") == 2
    ends = [line for line in run.log.splitlines() if line.startswith("moetion-run: error:")]
    assert len(ends) == 2, run.tail()
    assert all("is sound, and --load names no Megatron checkpoint: give one" in e for e in ends)


def test_another_run_is_refused_in_one_line(runner: Runner, killed: Run) -> None:
    run = again(runner, killed, "spill-other", flags=["--clip-grad", "2.0"])
    assert run.code != 0
    ending = [line for line in run.log.splitlines() if line.startswith("moetion-run: ending")]
    assert len(ending) == 1, run.tail()
    assert "clip_grad was 1.0 and is 2.0" in ending[0]
    assert spills(run.directory)[-2:] == [6, 12]


def test_under_the_shard_cut_it_goes_on_too_and_not_under_the_other(
    runner: Runner, off: Run
) -> None:
    shard = ["--moetion-cut", "shard"]
    meddle = at_event("spilled", kill_everything, iteration=KILLED_AFTER)
    first = runner.run("spill-shard", iterations=ITERATIONS, flags=[*SPILLS, *shard], meddle=meddle)
    assert first.code == -signal.SIGKILL, first.tail()
    refused = again(runner, first, "spill-shard-stage")
    assert refused.code != 0
    assert "moetion_cut was shard and is stage" in refused.log
    after = again(runner, first, "spill-shard-again", flags=shard)
    assert_goes_on(first, after, off, 12)
    assert_within_claim(after)


def test_an_export_is_an_ordinary_checkpoint(runner: Runner, off: Run, killed: Run) -> None:
    checkpoint = killed.directory.with_name("checkpoint")
    export = again(runner, killed, "export", flags=["--moetion-export", str(checkpoint)])
    assert export.code == 0, export.tail()
    assert export.lines == [], "it trained on"
    assert (checkpoint / "latest_checkpointed_iteration.txt").read_text() == "12"
    alone = runner.run(
        "megatron-alone",
        iterations=ITERATIONS,
        flags=["--load", str(checkpoint)],
        launcher=TORCHRUN,
    )
    assert alone.code == 0, alone.tail()
    expected = {key: v for key, v in off.records.items() if 12 < key[0] <= ITERATIONS}
    assert alone.records == expected
    # Whenever it starts, Megatron's second line shows the mean of two iterations.
    assert [alone.lines[0], *alone.lines[2:]] == [off.lines[12], *off.lines[14:ITERATIONS]]
