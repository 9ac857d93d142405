"""Several workers at once, killed from outside at whatever they are doing; also all of them."""

from pathlib import Path

import pytest

from .harness import CUTS, Run, Runner, assert_same_bits, kill_at_moments

MOMENTS: dict[int, tuple[tuple[int, ...], str, tuple[int, ...]]] = {
    8: ((0, 1, 2, 3), "", ()),
    15: ((2, 3), "", ()),
    22: ((0, 3), "", ()),
    29: ((1, 2, 3), "", ()),
    36: ((3,), "detected", (0,)),
    43: ((1,), "planned", (2,)),
    50: ((2,), "settled", (3,)),
    57: ((0,), "quiesced", (0,)),
    64: ((3,), "gathered", (1,)),
}
"""{iteration whose log line is waited for: (who is killed then, an event of the recovery that is
waited for, who is killed at that)}. The last event is the one right before groups are made again.
"""
LAST = 74


def _kill_at_each_moment(directory: Path) -> None:
    kill_at_moments(directory, MOMENTS)


@pytest.mark.parametrize("cut", CUTS)
def test_any_number_of_workers_is_replaced_as_long_as_their_agents_live(
    runner: Runner, off: Run, cut: str
) -> None:
    flags = ["--moetion", "--moetion-cut", cut]
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
    assert [e["recovered"] for e in run.recoveries] == killed
    # Each of those that died at once has had a warm start, too.
    starts = [e["start"] for e in run.events("started") if e["epoch"] > 0]
    assert starts == ["warm"] * sum(
        len(first) + len(second) for first, _, second in MOMENTS.values()
    )
    assert_same_bits(run, off, LAST, lines_may_repeat=True)
