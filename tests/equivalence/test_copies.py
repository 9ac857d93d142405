"""Three agents, three copies of each frame: damage to one is made good by the next.

A worker is killed from outside once the scripted damage has been done and a frame that follows it
has been logged, so that the damaged frame is part of the newest base.
"""

from collections.abc import Sequence
from pathlib import Path

from megatron_moetion.events import FOLDER

from .harness import Run, Runner, assert_same_bits, follow, kill_workers

AGENTS = (2, 1, 1)
HOLDERS = {0: 2, 1: 0, 2: 1}
"""Node of each copy of rank 3's frames."""
WINDOW = 4
LAST = 60
ROUNDS = {9: (0,), 21: (0, 1), 33: (0, 1, 2)}
"""{frame: which copies of it are damaged}."""
IN_FLIGHT = 45


def corrupt(iteration: int, place: str, copy: int) -> str:
    return f"corrupt:global_rank=3,iteration={iteration},at={place},copy={copy}"


def flags(*faults: str) -> list[str]:
    # Bases are counted here, and a new order of experts would make one more.
    steady = ["--moetion-window", str(WINDOW), "--moetion-popularity", "none"]
    return ["--moetion", *steady, "--moetion-fault", ";".join(faults)]


def _kill_after(directory: Path, frames: Sequence[int]) -> None:
    for frame in frames:
        next(line for line in follow(directory / "log") if f" iteration {frame + 2:8d}/" in line)
        # The owner's own copy is damaged last, when the others have been acknowledged.
        (owner,) = (directory / FOLDER).glob("agent-2.*")
        wanted = f'"iteration":{frame},"copy":0'
        next(line for line in follow(owner) if '"kind":"fault"' in line and wanted in line)
        kill_workers(directory, (3,))


def bases(run: Run) -> list[int]:
    """Where the failed stage started from, by recovery."""
    return [e["base"] for e in run.events("restored") if e["who"] == "rank3"]


def test_the_next_copy_comes_before_an_older_base_and_damage_in_flight_is_sent_again(
    runner: Runner, off: Run
) -> None:
    faults = [corrupt(frame, "stored", copy) for frame, copies in ROUNDS.items() for copy in copies]
    faults += [corrupt(IN_FLIGHT, "transfer", 1), corrupt(IN_FLIGHT, "transfer", 2)]
    run = runner.run(
        "copies",
        iterations=LAST,
        workers_of_node=AGENTS,
        flags=flags(*faults),
        meddle=lambda directory: _kill_after(directory, list(ROUNDS)),
    )
    assert run.code == 0, run.tail()
    assert_same_bits(run, off, LAST, lines_may_repeat=True)
    assert [e["recovered"] for e in run.recoveries] == [[3]] * len(ROUNDS)
    quarantined = [(e["key"], e["copy"], e["who"]) for e in run.events("quarantined")]
    assert sorted(quarantined) == sorted(
        (f"frame/{frame}/state", copy, f"agent-{HOLDERS[copy]}")
        for frame, copies in ROUNDS.items()
        for copy in copies
    )
    # While a copy is left, the damaged frame is part of what is rebuilt from; then it is not.
    one, two, *_, three = bases(run)
    assert one <= 9 < one + WINDOW
    assert two <= 21 < two + WINDOW
    assert three <= 33 - WINDOW
    (resent,) = [e["resent frames"] for e in run.events("counted") if e["who"] == "agent-2"]
    assert resent == 2
    for line in (f"rank 3, iteration {frame}) is damaged" for frame in ROUNDS):
        assert line in run.log
    durable = {r: i for e in run.events("counted") for r, i in e["durable"].items()}
    assert set(durable) == {"0", "1", "2", "3"}
    assert min(durable.values()) >= LAST - 2, durable
    ranks, first = {}, 0
    for node, count in enumerate(AGENTS):
        ranks[f"agent-{node}"] = {f"rank{rank}" for rank in range(first, first + count)}
        first += count
    for node in run.events("vault"):
        here = {node["who"], *ranks[node["who"]]}
        claimed = sum(e["nbytes"] for e in run.events("claimed") if e["who"] in here)
        assert 0 < node["allocated_bytes"] <= claimed, (node, claimed)


def test_when_every_base_is_damaged_in_every_copy_the_job_ends_with_one_line(
    runner: Runner,
) -> None:
    # No four frames in a row are left of those that are kept.
    damaged = dict.fromkeys((8, 11), (0, 1, 2))
    faults = [
        corrupt(frame, "stored", copy) for frame, copies in damaged.items() for copy in copies
    ]
    run = runner.run(
        "copies-all",
        iterations=30,
        workers_of_node=AGENTS,
        flags=flags(*faults),
        meddle=lambda directory: _kill_after(directory, [11]),
    )
    assert run.code != 0
    ended = [line for line in run.log.splitlines() if line.startswith("moetion-run: ending")]
    assert len(ended) == 1, run.tail()
    assert "cannot be rebuilt" in ended[0]
    assert "restart from a Megatron checkpoint" in ended[0]
