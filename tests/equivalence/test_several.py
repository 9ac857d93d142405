"""Several workers at once, killed from outside at whatever they are doing; also all of them, and in
the midst of recoveries.
"""

from pathlib import Path

import pytest

from .harness import CUTS, Run, Runner, assert_same_bits, kill_at_moments, kills

MOMENTS: dict[int, tuple[tuple[int, ...], str, tuple[int, ...]]] = {
    8: ((0, 1, 2, 3), "", ()),
    15: ((2, 3), "", ()),
    22: ((0, 3), "", ()),
    29: ((1, 2, 3), "", ()),
    36: ((3,), "detected", (0,)),
    43: ((1,), "planned", (2,)),
    50: ((2,), "settled", (3,)),
    # While the replacement boots.
    57: ((1,), "started", (1,)),
    64: ((3,), "gathered", (1,)),
}
"""{iteration whose log line is waited for: (who is killed then, an event of the recovery that is
waited for, who is killed at that)}.
"""
SCRIPTED_FROM = 70
APART = 4
BEGINS = "backward:1"
RECOVERIES = (
    ((1, BEGINS), (3, "planning")),
    ((1, BEGINS), (2, "regroup")),
    ((1, BEGINS), (0, "restore")),
    ((3, BEGINS), (2, "restore")),
    # Three, one of them the replacement itself.
    ((1, BEGINS), (1, "resume"), (3, "resume")),
    ((3, BEGINS), (0, "planning"), (1, "regroup")),
)
"""(global_rank, place) of who dies in training and of whoever dies in the recovery from that."""
REPLAYS = (
    ((1, BEGINS), (0, "replay:0")),
    ((2, BEGINS), (2, "replay:1"), (0, "resume")),
)
"""The same where there is a replay."""
SINGLY = ((2, "start"), (0, "start"), (1, "commit"), (3, "commit"))
"""Alone, every other iteration, after all that."""
SINGLY_FROM = SCRIPTED_FROM + APART * len(RECOVERIES + REPLAYS)
LAST = SINGLY_FROM + 2 * len(SINGLY)


def scripted(cut: str) -> tuple[list[tuple[int, int, str]], list[list[int]]]:
    """What is killed at places, and who is replaced in each recovery from that."""
    failures, recovered = [], []
    for number, attempt in enumerate(RECOVERIES + (REPLAYS if cut == "stage" else ())):
        iteration = SCRIPTED_FROM + APART * number
        # In a recovery it is the iteration that is done, which is the one before.
        done = {BEGINS: iteration, "planning": iteration}
        failures += [(rank, done.get(place, iteration - 1), place) for rank, place in attempt]
        recovered.append(sorted({rank for rank, _ in attempt}))
    failures += [(rank, SINGLY_FROM + 2 * n, place) for n, (rank, place) in enumerate(SINGLY)]
    return failures, recovered + [[rank] for rank, _ in SINGLY]


def _kill_at_each_moment(directory: Path) -> None:
    kill_at_moments(directory, MOMENTS)


@pytest.mark.parametrize("cut", CUTS)
def test_any_number_of_workers_is_replaced_as_long_as_their_agents_live(
    runner: Runner, off: Run, cut: str
) -> None:
    failures, recovered = scripted(cut)
    # On a busy machine `auto` comes to a window of one frame, and nothing is replayed.
    flags = ["--moetion", "--moetion-cut", cut, "--moetion-window", "4", *kills(*failures)]
    name = f"several-{cut}"
    run = runner.run(
        name,
        iterations=LAST,
        flags=flags,
        launcher_flags=["--spares", "2"],
        meddle=_kill_at_each_moment,
        afresh=cut == "stage",
    )
    assert run.code == 0, run.tail()
    killed = [sorted({*first, *second}) for first, _, second in MOMENTS.values()]
    assert [e["recovered"] for e in run.recoveries] == killed + recovered
    # Each of those that died at once has had a warm start, too.
    starts = [e["start"] for e in run.events("started") if e["epoch"] > 0]
    num_killed = sum(len(first) + len(second) for first, _, second in MOMENTS.values())
    assert starts == ["warm"] * (num_killed + len(failures))
    assert_same_bits(run, off, LAST, lines_may_repeat=True)
